# SPDX-License-Identifier: GPL-3.0-or-later
"""contrib/bench: measure, and tell."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Final

from lab import open_libvirt
from rich.console import Console

from tests.bench import dense, freeze, growth, guestside, holes, increments
from tests.bench.figures import Result, measure
from tests.bench.report import render_chart, render_lines, render_table
from tests.bench.stage import Bench, Stage

STAGES: Final = (*dense.STAGES, *holes.STAGES, *growth.STAGES, *freeze.STAGES, *increments.STAGES, *guestside.STAGES)
WIDTH: Final = 150  # columns, where there is no terminal
NAMES: Final = tuple(name for stage in STAGES for name in stage.names)
_PACKAGES: Final = ("qemu-system-x86", "libvirt-daemon", "libnbd-bin", "fio", "coreutils", "tar")


def machine() -> dict[str, str | int]:
    """Tell what the figures come from."""
    found: dict[str, str | int] = {"cores": os.cpu_count() or 0, "kernel": platform.release()}
    found["system"] = platform.freedesktop_os_release()["PRETTY_NAME"]
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        words = ["dpkg-query", "-W", "-f", "${Version}", package]
        found[package] = subprocess.run(words, capture_output=True, text=True, check=False).stdout or "not a package"
    for module in ("pyfuse3", "trio"):
        found[module] = version(module)
    return found


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="contrib/bench",
        description="Measure backupfs beside its rivals, on guests of its own. Takes minutes; needs a quiet machine.",
        epilog=f"NAME is one of: {', '.join(NAMES)}. Without one, all are measured.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="small disks and 2 rounds: to see that it works")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds (5)")
    parser.add_argument("--json", metavar="FILE", help="append one JSON line per figure to FILE; - for stdout")
    parser.add_argument("--chart", metavar="FILE", help="draw the figures into an SVG")
    found = parser.parse_args(arguments)
    if unknown := [name for name in found.names if name not in NAMES]:
        parser.error(f"no figure named {unknown[0]}; there are {', '.join(NAMES)}")
    if found.rounds is not None and found.rounds < 1:
        parser.error("--rounds must be 1 or more")
    return found


def run(
    stages: Sequence[Stage], names: Sequence[str], quick: bool, rounds: int, console: Console, results: list[Result]
) -> None:
    """Measure the groups *names*, stage by stage, and add them to *results* as they are done."""
    folder = Path(tempfile.mkdtemp(prefix="bfb", dir="/tmp"))  # short: sockets lie in it
    folder.chmod(0o755)
    try:
        with open_libvirt(folder / "lab") as lab:
            for number, stage in enumerate(stages):
                wanted = [name for name in stage.names if name in names]
                if not wanted:
                    continue
                own = folder / str(number)
                own.mkdir()
                shutil.chown(own, "nobody", "nogroup")  # QEMU saves old blocks beside the images
                with ExitStack() as stack, console.status(f"setting the stage for {', '.join(wanted)}") as status:
                    groups = stack.enter_context(stage.open(Bench(own, lab, quick)))
                    for name in wanted:
                        results += measure(groups[name](), rounds, status.update)
                shutil.rmtree(own)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def tell(results: Sequence[Result], options: argparse.Namespace, console: Console) -> None:
    """Write what was measured, be it all or not."""
    told = machine()
    if options.json == "-":
        sys.stdout.write(render_lines(results, told))
    elif options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            file.write(render_lines(results, told))
    title = f"backupfs, {told['cores']} cores, {told['system']}, kernel {told['kernel']}"
    if options.chart:
        Path(options.chart).write_text(render_chart(results, title), encoding="utf-8")
    console.print(title, highlight=False)
    if options.quick:
        console.print("--quick: these figures say nothing but that it works", highlight=False)
    console.print(render_table(results))


def main(arguments: Sequence[str]) -> int:
    options = parse_arguments(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    # Into a file or a pipe the table goes whole.
    console = Console(stderr=options.json == "-")
    if not console.is_terminal:
        console.width = WIDTH
    rounds = options.rounds or (2 if options.quick else 5)
    results: list[Result] = []
    status = 0
    try:
        run(STAGES, options.names or NAMES, options.quick, rounds, console, results)
    except KeyboardInterrupt:
        print("contrib/bench: interrupted; everything was cleaned up; this was done by then:", file=sys.stderr)
        status = 130
    finally:
        tell(results, options, console)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
