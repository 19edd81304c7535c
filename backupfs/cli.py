# SPDX-License-Identifier: GPL-3.0-or-later
"""The command line.

`backupfs SOURCE MOUNTPOINT` goes to the background when the mount answers, not before:

    parent   fork ──────── waits for a word ─────────── looks at the mount ── exits 0
    child       └─ checks, mounts, begins to serve ──"ready"┘   └─ lets go of the terminal
                └─ anything wrong ──"STATUS sentence"──► parent prints it and exits so

The fork comes before trio, libvirt and all threads: none of them lives through one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

from backupfs import __version__
from backupfs.errors import BackupfsError, MountPointError, UsageError
from backupfs.options import Options, parse_options, render_option_help

EXIT_STATUS: Final = """\
exit status:
  0  done                              5  no such domain
  1  failed; stderr says why           6  the domain is mounted already
  2  wrong usage                       7  a disk cannot take part as things are
  3  a program or module is missing    8  the state folder cannot be used
  4  libvirt cannot be reached        32  the mount point cannot be used
"""

EXAMPLES: Final = """\
examples:
  backupfs web01 /mnt/web01                     mount the domain web01
  cp --sparse=always /mnt/web01/raw/* /backup/  copy its disks, all of one instant
  backupfs status /mnt/web01                    see what is going on
  umount /mnt/web01                             end the backup job
"""

COMMANDS: Final = ("status", "release", "begin", "forget")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # A domain may be called like a command: `backupfs ./status MOUNTPOINT` cannot be meant, so
        # a command is a first word that is followed by at most its options and one mount point.
        if words and words[0] in COMMANDS and not _is_mount(words):
            return _run_command(words)
        return _run_mount(words)
    except BackupfsError as error:
        print(f"backupfs: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:  # before the mount was ready; then it is a signal like SIGTERM
        return 128 + signal.SIGINT


def _is_mount(words: Sequence[str]) -> bool:
    return len(words) >= 3 and all(not word.startswith("-") for word in words[:3])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in our own words and with our own exit status."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the mount command; --help is its text."""
    parser = _Parser(
        prog="backupfs",
        usage="backupfs [-f] [-o OPT,...] SOURCE MOUNTPOINT\n       backupfs status [--json] MOUNTPOINT\n"
        "       backupfs release MOUNTPOINT\n       backupfs begin MOUNTPOINT\n"
        "       backupfs forget [-o uri=URI] DOMAIN",
        description="Mount a libvirt domain as a directory: its disks as files, as they were at one instant.",
        epilog=f"options (-o):\n{render_option_help()}\n\n{EXIT_STATUS}\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="the domain: its name or UUID")
    parser.add_argument("mount_point", metavar="MOUNTPOINT", help="an empty directory")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground, log to stderr")
    parser.add_argument("-o", dest="options", metavar="OPT,...", action="append", default=[], help="see below")
    parser.add_argument("--version", action="version", version=f"backupfs {__version__}")
    return parser


# --- mounting ----------------------------------------------------------------------------------


def _run_mount(words: Sequence[str]) -> int:
    parsed = make_parser().parse_args(words)
    options = parse_options(parsed.options)
    if not parsed.source:
        raise UsageError("SOURCE is empty; give a domain's name or UUID")
    if parsed.foreground:
        _serve(parsed.source, parsed.mount_point, options, foreground=True, ready=lambda: None)
        return 0
    return _to_background(
        parsed.mount_point,
        lambda ready: _serve(parsed.source, parsed.mount_point, options, foreground=False, ready=ready),
    )


def _serve(source: str, mount_point: str, options: Options, *, foreground: bool, ready: Callable[[], None]) -> None:
    # Late: these need the distribution's modules, and `--help` shall work without.
    import trio  # noqa: PLC0415

    from backupfs import mount  # noqa: PLC0415
    from backupfs.logs import configure_logging  # noqa: PLC0415

    ring = configure_logging(foreground=foreground, debug=options.debug)

    async def run() -> None:
        await mount.serve(source, mount_point, options, ring, ready=ready)

    try:
        trio.run(run, strict_exception_groups=True)  # trio 0.22 has another default
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of ours in *group*: whoever waits for an exit status wants one."""
    ours = group.subgroup(BackupfsError)
    found: BaseException = group if ours is None else ours
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def _to_background(mount_point: str, serve: Callable[[Callable[[], None]], None]) -> int:
    """Run *serve* in a child of its own session; return when it is ready, or has failed."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        os._exit(_run_child(send, serve))
    os.close(send)
    with os.fdopen(receive, "rb") as pipe:
        word = pipe.read().decode("utf-8", "replace")
    if word == "ready":
        # Only another process may look: the first answer shows that the mount lives.
        try:
            os.stat(mount_point)
        except OSError as error:
            raise MountPointError(mount_point, f"mounted, but does not answer: {error.strerror}") from error
        return 0
    _, wait_status = os.waitpid(child, 0)
    status, _, sentence = word.partition(" ")
    if sentence:
        print(f"backupfs: {sentence}", file=sys.stderr)
        return int(status)
    ended = os.waitstatus_to_exitcode(wait_status)
    how = f"signal {signal.Signals(-ended).name}" if ended < 0 else f"status {ended}"
    print(f"backupfs: the background process ended with {how} before the mount was ready", file=sys.stderr)
    return 1


def _run_child(send: int, serve: Callable[[Callable[[], None]], None]) -> int:
    os.setsid()
    pipe = os.fdopen(send, "wb")

    def ready() -> None:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.close(null)
        pipe.write(b"ready")
        pipe.close()

    try:
        serve(ready)
    except BackupfsError as error:
        if not pipe.closed:
            pipe.write(f"{error.exit_status} {error}".encode("utf-8", "surrogateescape"))
            pipe.close()
        return error.exit_status
    except BaseException:
        import traceback  # noqa: PLC0415

        if not pipe.closed:
            pipe.write(f"1 unexpected: {traceback.format_exc()}".encode("utf-8", "replace"))
            pipe.close()
        return 1
    return 0


# --- talking to a mount ------------------------------------------------------------------------


def _run_command(words: Sequence[str]) -> int:
    if words[0] == "forget":
        return _run_forget(words)
    parser = _Parser(prog=f"backupfs {words[0]}", description=_COMMAND_HELP[words[0]])
    parser.add_argument("mount_point", metavar="MOUNTPOINT", help="where the domain is mounted")
    if words[0] == "status":
        parser.add_argument("--json", action="store_true", help="print status.json as it is")
    parsed = parser.parse_args(words[1:])
    status, text = read_status(parsed.mount_point)
    if words[0] == "status":
        if parsed.json:
            sys.stdout.write(text)
        else:
            from rich.console import Console  # noqa: PLC0415

            from backupfs.status import render_table  # noqa: PLC0415

            render_table(status, Console())
        return 0
    from backupfs.control import call  # noqa: PLC0415

    print(call(status["control"], words[0], timeout=240.0))
    return 0


def _run_forget(words: Sequence[str]) -> int:
    parser = _Parser(prog="backupfs forget", description=_COMMAND_HELP["forget"])
    parser.add_argument("source", metavar="DOMAIN", help="its name or UUID; it must not be mounted")
    parser.add_argument(
        "-o", dest="options", metavar="uri=URI", action="append", default=[], help="libvirt's connection"
    )
    parsed = parser.parse_args(words[1:])
    options = parse_options(parsed.options)
    import trio  # noqa: PLC0415

    from backupfs import mount  # noqa: PLC0415

    async def run() -> str:
        return await mount.forget(parsed.source, options)

    try:
        print(trio.run(run))
    except BaseExceptionGroup as group:
        raise _first(group) from group
    return 0


_COMMAND_HELP: Final = {
    "forget": "Throw away what is known of a domain's earlier points in time: all counts as changed then, "
    "and pruned checkpoints are gone. Libvirt's own are left alone.",
    "status": "Tell what is mounted there and what is going on; begins nothing.",
    "release": "End the point in time; the next look begins another. Open files get EIO.",
    "begin": "Begin a point in time, also with begin=command; do nothing if one runs.",
}


def read_status(mount_point: str) -> tuple[dict[str, Any], str]:
    """Return the mount's status.json, parsed and as it is; raise MountPointError."""
    path = os.path.join(mount_point, ".backupfs/status.json")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        status = json.loads(text)
    except FileNotFoundError:
        raise MountPointError(mount_point, "no backupfs is mounted there") from None
    except OSError as error:
        raise MountPointError(mount_point, f"does not answer: {error.strerror}") from error
    except ValueError:
        raise MountPointError(mount_point, "its status cannot be read; is it of this version?") from None
    return status, text
