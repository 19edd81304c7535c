# SPDX-License-Identifier: GPL-3.0-or-later
"""The words of `-o`: one table, from which they are parsed, documented and completed.

mount(8) hands a helper whatever stands in fstab, its own words too. Each falls into one of four:

    OPTIONS   ours                                    idle=15m
    KERNEL    for the kernel; libfuse takes them      nosuid
    IGNORED   for somebody else, or always so here    nofail, relatime
    the rest  an error that names it: a misspelt option would be a backup that is not what was
              asked for
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from backupfs.checkpointxml import LONGEST_CHECKPOINT, why_bad_name
from backupfs.errors import UsageError
from backupfs.scratch import Reserve, parse_reserve

MOST_CONNECTIONS: Final = 16
LEAST_RATE: Final = 2**16  # bytes a second: a block of 1 MiB takes 16 s
LONGEST_SECONDS: Final = 10 * 365 * 86400.0
HELP_WIDTH: Final = 100
NO_ID: Final = 2**32 - 1  # as a user or a group it means "none"


@dataclass(frozen=True, slots=True)
class Quiesce:
    """What `quiesce=` asks for: `mode` is auto, require or no; `mounts`: only these file systems."""

    mode: str = "auto"
    mounts: tuple[str, ...] = ()

    @property
    def is_wanted(self) -> bool:
        """Whether the guest shall be frozen if it can be."""
        return self.mode != "no"

    @property
    def is_required(self) -> bool:
        """Whether nothing shall begin without."""
        return self.mode == "require"


@dataclass(frozen=True, slots=True)
class BackingName:
    """What the backing file of an increment is called, and its format: `backing=` and `format=`."""

    template: str = "{disk}.{checkpoint}.qcow2"
    format: str = "qcow2"

    def name(self, disk: str, checkpoint: str) -> str:
        """Return the name; `{disk}` and `{checkpoint}` in it stand for theirs."""
        return self.template.replace("{disk}", disk).replace("{checkpoint}", checkpoint)


@dataclass(frozen=True, slots=True)
class Options:
    """What one mount was asked to do; times in seconds, 0 meaning never."""

    uri: str | None = None
    disks: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    begin: str = "look"
    checkpoint: str | None = None
    keep: int | None = None
    backing: BackingName = field(default_factory=BackingName)
    quiesce: Quiesce = field(default_factory=Quiesce)
    idle: float = 900.0
    idle_max: float = 12 * 3600.0
    scratch: str | None = None
    scratch_reserve: Reserve = field(default_factory=Reserve)
    rate: int | None = None
    connections: int = 2
    timeout: float = 30.0
    allow_other: bool = False
    allow_root: bool = False
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int | None = None
    direct_io: bool = False
    debug: bool = False
    kernel: frozenset[str] = frozenset()  # words for the kernel's mount

    @property
    def folder_mode(self) -> int:
        """The folders' mode: only the owner's, unless `umask=` says more."""
        return 0o500 if self.umask is None else 0o555 & ~self.umask

    @property
    def file_mode(self) -> int:
        """The files' mode; nothing can be written or run."""
        return 0o400 if self.umask is None else 0o444 & ~self.umask

    @property
    def kernel_words(self) -> tuple[str, ...]:
        """The words that libfuse hands to the kernel."""
        own = {word for word in ("allow_other", "allow_root") if getattr(self, word)}
        return tuple(sorted(self.kernel | own))


@dataclass(frozen=True, slots=True)
class Word:
    """One option: its name, what its value looks like (None: it has none), and its help.

    *default* is the value as one would write it, or, where there is none to write, in words.
    """

    name: str
    metavar: str | None
    help: str
    default: str | None = None
    parse: Callable[[str], Any] | None = None

    @property
    def described(self) -> str:
        """The help with the default."""
        return self.help if self.default is None else f"{self.help} (default: {self.default})"


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|m|h|d)?", text)
    if match is None:
        raise ValueError("is not a time; write 90, 90s, 15m, 12h or 1d")
    value = float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2] or "s"]
    if value > LONGEST_SECONDS:
        raise ValueError("is longer than ten years; write 0 where never is meant")
    return value


def _positive_seconds(text: str) -> float:
    if (value := _seconds(text)) <= 0:
        raise ValueError("must be more than 0")
    return value


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([KMGT])?", text)
    if match is None:
        raise ValueError("is not a size; write 65536, 64K, 50M or 1G")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def _rate(text: str) -> int:
    if (value := _size(text)) < LEAST_RATE:
        raise ValueError(f"is less than {LEAST_RATE // 1024}K a second; a read would take for ever")
    return value


def _folder(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path; QEMU has another working directory")
    # XML cannot carry control characters, nor what is not UTF-8, and the path goes into it.
    if not text.isprintable():
        raise ValueError("has characters that libvirt's XML cannot hold")
    return "/" + os.path.normpath(text).lstrip("/")


def _connections(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_CONNECTIONS:
        raise ValueError(f"is not a number from 1 to {MOST_CONNECTIONS}")
    return int(text)


def _begin(text: str) -> str:
    if text not in ("look", "mkdir", "command"):
        raise ValueError("is neither look, mkdir nor command")
    return text


def _checkpoint(text: str) -> str | None:
    if text == "none":
        return None
    if (why := why_bad_name(time.strftime(text))) is not None:
        raise ValueError(f"makes no name for a checkpoint: {why}")
    return text


def _keep(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise ValueError("is not a number from 1 to 9999")
    return int(text)


def _backing(text: str) -> BackingName:
    made = BackingName(text)
    if not text or not text.isprintable() or len(made.name("x" * 100, "x" * LONGEST_CHECKPOINT).encode()) > 1023:
        raise ValueError("is empty, too long, or has unprintable characters")
    return made


def _format(text: str) -> str:
    if text not in ("qcow2", "raw"):
        raise ValueError("is neither qcow2 nor raw")
    return text


def _quiesce(text: str) -> Quiesce:
    if text in ("auto", "require", "no"):
        return Quiesce(text)
    mounts = tuple(dict.fromkeys(path.rstrip("/") or "/" for path in text.split(":")))
    if not all(path.startswith("/") and path.isprintable() for path in text.split(":")):
        raise ValueError("is neither auto, require, no, nor a list of the guest's mount points, like /srv:/home")
    return Quiesce("require", mounts)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(re.split(r"[:,]", text)))
    if not all(names):
        raise ValueError("names no disk; write vda or vda:vdb")
    return names


def _umask(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text):
        raise ValueError("is not an octal mode, like 022")
    return int(text, 8)


def _number(text: str, known: Callable[[str], int], what: str) -> int:
    try:
        number = int(text) if text.isascii() and text.isdigit() else known(text)
    except (KeyError, ValueError):
        number = -1
    if not 0 <= number < NO_ID:
        raise ValueError(f"is no {what} of this host")
    return number


def _uid(text: str) -> int:
    return _number(text, lambda name: pwd.getpwnam(name).pw_uid, "user")


def _gid(text: str) -> int:
    return _number(text, lambda name: grp.getgrnam(name).gr_gid, "group")


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("is empty, or has unprintable characters")
    return text


OPTIONS: Final = (
    Word("uri", "URI", "libvirt's connection", "libvirt's own", _text),
    Word("disks", "NAME[:NAME...]", "only these disks, by target name; a comma may part them too", "all", _names),
    Word("exclude", "NAME[:NAME...]", "all disks but these", "none", _names),
    Word(
        "begin",
        "look|mkdir|command",
        "what begins a point in time: the first look inside raw/, or only `mkdir checkpoints/NAME`, "
        "or only `backupfs begin`, which does it in any case",
        "look",
        _begin,
    ),
    Word(
        "checkpoint",
        "TEMPLATE|none",
        "make a checkpoint whenever a point in time begins, called so, as strftime(3) has it",
        "none",
        _checkpoint,
    ),
    Word("keep", "N", "prune all but the newest checkpoints of our own at each begin", "all are kept", _keep),
    Word(
        "backing",
        "NAME[,format=raw]",
        "what an increment's backing file is called; {disk} and {checkpoint} stand for their names",
        "{disk}.{checkpoint}.qcow2, and qcow2",
        _backing,
    ),
    Word(
        "quiesce",
        "auto|require|no|DIR[:DIR...]",
        "freeze the guest's file systems while a point in time begins: if its agent answers, or else begin none, "
        "or never; a list: only those at these mount points, or else begin none",
        "auto",
        _quiesce,
    ),
    Word("idle", "TIME", "end a point in time that nobody has used for so long; 0: never", "15m", _seconds),
    Word(
        "idle-max",
        "TIME",
        "give a point in time up after so long without any request, even if a file is open; 0: never",
        "12h",
        _seconds,
    ),
    Word("scratch", "DIR", "where QEMU saves old blocks", "beside each disk", _folder),
    Word(
        "scratch-reserve",
        "SIZE|PERCENT",
        "end the point in time when less than that is free where QEMU saves old blocks",
        "10% of that file system, at least 1G, half of a smaller one",
        parse_reserve,
    ),
    Word("rate", "SIZE", "read no more than so many bytes a second from all disks together", "no limit", _rate),
    Word("connections", "N", f"NBD connections for each disk, 1 to {MOST_CONNECTIONS}", "2", _connections),
    Word(
        "timeout",
        "TIME",
        "answer EIO when libvirt or QEMU has not answered for so long",
        "30s",
        _positive_seconds,
    ),
    Word("allow_other", None, "let other users in; see also umask="),
    Word("allow_root", None, "let root in, where an ordinary user mounts"),
    Word("uid", "USER", "who owns the files", "who mounts", _uid),
    Word("gid", "GROUP", "their group", "that of who mounts", _gid),
    Word("umask", "OCTAL", "take these permissions from 555 and 444", "500 for folders, 400 for files", _umask),
    Word("direct_io", None, "hand disks past the page cache: for tools that read a megabyte at a time"),
    Word("debug", None, "log more"),
)

# Words for the kernel: those that libfuse 3 takes from its caller, in all its versions. It refuses
# the whole mount over any other, relatime and atime among them.
KERNEL: Final = frozenset({
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "sync", "async", "dirsync",
})  # fmt: skip

# Words that are taken and have no effect, by the reason. One that ends with = or - begins others.
_NO_EFFECT: Final = {
    "mount(8), systemd and automounters act on it before we are run": (
        "defaults auto noauto nofail _netdev user= user nouser users nousers owner noowner group nogroup "
        "x- X- comment= helper= uhelper="
    ),
    "reading never changes a time here": (
        "atime diratime nodiratime relatime norelatime strictatime nostrictatime lazytime nolazytime"
    ),
    "nothing is ever written here": "mand nomand iversion noiversion",
    "there are no symbolic links here": "symfollow nosymfollow",
    "it is so anyway": "default_permissions silent loud",
}
IGNORED: Final[Mapping[str, str]] = {word: why for why, words in _NO_EFFECT.items() for word in words.split()}
_IGNORED_PREFIXES: Final = tuple(word for word in IGNORED if word.endswith(("=", "-")))

# Which words a later one takes back.
_TAKES_BACK: Final = {
    "ro": "rw", "rw": "ro", "nosuid": "suid", "suid": "nosuid", "nodev": "dev", "dev": "nodev",
    "noexec": "exec", "exec": "noexec", "sync": "async", "async": "sync",
    "atime": "noatime", "relatime": "noatime", "strictatime": "noatime",
}  # fmt: skip

_BY_NAME: Final = {word.name: word for word in OPTIONS}


def _split(text: str) -> Iterator[str]:
    r"""Split at commas. `\,` is a comma of the value's own and `\\` a backslash, as libfuse has it."""
    for part in re.findall(r"(?:\\.|[^,])+", text, re.DOTALL):
        yield re.sub(r"\\([\\,])", r"\1", part)


def _is_known(word: str) -> bool:
    name = word.partition("=")[0]
    return name in _BY_NAME or word in KERNEL or word in IGNORED or word.startswith(_IGNORED_PREFIXES)


def parse_options(texts: str | Iterable[str]) -> Options:
    """Parse the value of one `-o`, or of several; the last of two that contradict wins, as with mount(8).

    A list of disks may go on after a comma (`disks=vda,vdb`): what follows it and is no option
    belongs to it. Raises UsageError, which names the word.
    """
    values: dict[str, Any] = {}
    kernel: set[str] = set()
    listing: str | None = None
    for word in (part for text in ([texts] if isinstance(texts, str) else texts) for part in _split(text)):
        name, equals, value = word.partition("=")
        if listing is not None and not equals and not _is_known(word):
            values[listing] = tuple(dict.fromkeys((*values[listing], *_value(listing, word))))
            continue
        listing = None
        if name == "format" and "backing" in values and equals:  # it goes on after a comma, as QEMU's own words do
            values["backing"] = replace(values["backing"], format=_value_of(name, value, _format))
            continue
        kernel.discard(_TAKES_BACK.get(word, ""))
        if word in KERNEL:
            kernel.add(word)
        elif name in _BY_NAME:
            values[name.replace("-", "_")] = _value(name, value if equals else None)
            if _BY_NAME[name].parse is _names:
                listing = name
        elif not _is_known(word):
            raise UsageError(_unknown(name))
    if values.get("allow_other") and values.get("allow_root"):
        raise UsageError("allow_other and allow_root exclude each other")
    found = replace(Options(), kernel=frozenset(kernel), **values)
    if "idle" in values and 0 < found.idle_max < found.idle:
        # It would be lost, with EIO for all, before it could end in peace.
        raise UsageError(f"option idle-max={found.idle_max:g} is less than idle={found.idle:g}; raise it too")
    return found


def _value(name: str, value: str | None) -> Any:
    word = _BY_NAME[name]
    if word.parse is None:
        if value is not None:
            raise UsageError(f"option {name} takes no value")
        return True
    if value is None:
        raise UsageError(f"option {name} needs a value: {name}={word.metavar}")
    return _value_of(name, value, word.parse)


def _value_of(name: str, value: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(f"option {name}={ascii(value)[1:-1]}: {error}") from None


def _unknown(name: str) -> str:
    words = [*_BY_NAME, *sorted(KERNEL), *(word for word in IGNORED if word not in _IGNORED_PREFIXES)]
    near = difflib.get_close_matches(name, words, n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `backupfs --help` lists them"
    return f"unknown option {ascii(name)[1:-1]}{hint}"


def render_option_help() -> str:
    """Return the table of options as text for --help."""
    lines = []
    for word in OPTIONS:
        name = f"{word.name}={word.metavar}" if word.metavar else word.name
        lines += textwrap.wrap(word.described, HELP_WIDTH, initial_indent=f"  {name:<26} ", subsequent_indent=" " * 29)
    lines.append("  ro, nosuid, nodev, …       as mount(8) has them; noauto, nofail, _netdev, x-… are for fstab alone")
    return "\n".join(lines)
