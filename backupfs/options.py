# SPDX-License-Identifier: GPL-3.0-or-later
"""The words of `-o`: one table, from which they are parsed, documented and completed.

mount(8) hands a helper whatever stands in fstab, its own words too. Those that mean something
to the kernel are passed on to it, those that only mount(8) or systemd reads are taken and have
no effect here (`IGNORED`), and any other is an error that names it: a misspelt option would be a
backup that is not what was asked for.
"""

from __future__ import annotations

import difflib
import grp
import os
import pwd
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from backupfs.errors import UsageError

MOST_CONNECTIONS: Final = 16


@dataclass(frozen=True, slots=True)
class Options:
    """What one mount was asked to do; times in seconds, 0 meaning never."""

    uri: str | None = None
    disks: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    begin: str = "look"
    idle: float = 900.0
    idle_max: float = 12 * 3600.0
    scratch: str | None = None
    connections: int = 2
    timeout: float = 30.0
    allow_other: bool = False
    allow_root: bool = False
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int | None = None
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
    """One option: its name, what its value looks like (None: it has none), and its help."""

    name: str
    metavar: str | None
    help: str
    parse: Callable[[str], Any] | None = None


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)?", text)
    if match is None:
        raise ValueError("is not a time; write 90, 90s, 15m, 12h or 1d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2] or "s"]


def _positive_seconds(text: str) -> float:
    if (value := _seconds(text)) <= 0:
        raise ValueError("must be more than 0")
    return value


def _folder(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path; QEMU has another working directory")
    return os.path.normpath(text)


def _connections(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MOST_CONNECTIONS:
        raise ValueError(f"is not a number from 1 to {MOST_CONNECTIONS}")
    return int(text)


def _begin(text: str) -> str:
    if text not in ("look", "command"):
        raise ValueError("is neither look nor command")
    return text


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(re.split(r"[:,]", text)))
    if not all(names):
        raise ValueError("names no disk; write vda or vda:vdb")
    return names


def _umask(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{1,3}", text):
        raise ValueError("is not an octal mode, like 022")
    return int(text, 8)


def _uid(text: str) -> int:
    try:
        return int(text) if text.isascii() and text.isdigit() else pwd.getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise ValueError("is no user of this host") from None


def _gid(text: str) -> int:
    try:
        return int(text) if text.isascii() and text.isdigit() else grp.getgrnam(text).gr_gid
    except (KeyError, ValueError):
        raise ValueError("is no group of this host") from None


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("is empty, or has unprintable characters")
    return text


OPTIONS: Final = (
    Word("uri", "URI", "libvirt's connection (default: libvirt's own)", _text),
    Word("disks", "NAME[:NAME...]", "only these disks, by target name (default: all)", _names),
    Word("exclude", "NAME[:NAME...]", "all disks but these", _names),
    Word(
        "begin",
        "look|command",
        "what begins a point in time: the first look inside raw/ (default), or only `backupfs begin`",
        _begin,
    ),
    Word(
        "idle",
        "TIME",
        "end a point in time that nobody has used for so long (default 15m; 0: never)",
        _seconds,
    ),
    Word(
        "idle-max",
        "TIME",
        "give a point in time up after so long without any request, even if a file is open (default 12h; 0: never)",
        _seconds,
    ),
    Word("scratch", "DIR", "where QEMU saves old blocks (default: beside each disk)", _folder),
    Word("connections", "N", "NBD connections for each disk, 1 to 16 (default 2)", _connections),
    Word(
        "timeout",
        "TIME",
        "answer EIO when libvirt or QEMU has not answered for so long (default 30s)",
        _positive_seconds,
    ),
    Word("allow_other", None, "let other users in; see also umask="),
    Word("allow_root", None, "let root in, where an ordinary user mounts"),
    Word("uid", "USER", "who owns the files (default: who mounts)", _uid),
    Word("gid", "GROUP", "their group", _gid),
    Word(
        "umask",
        "OCTAL",
        "take these permissions from 555 and 444 (default: 500 for folders, 400 for files)",
        _umask,
    ),
    Word("debug", None, "log more"),
)

# Words of mount(8)'s that the kernel knows.
KERNEL: Final = frozenset({
    "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "nodiratime",
    "relatime", "norelatime", "strictatime", "sync", "async", "dirsync",
})  # fmt: skip
_OPPOSITES: Final = tuple(
    frozenset(pair.split())
    for pair in (
        "ro rw",
        "nosuid suid",
        "nodev dev",
        "noexec exec",
        "noatime atime",
        "relatime norelatime",
        "sync async",
    )
)

# Words that are for mount(8), systemd or an automounter, which all leave (some of) them in.
IGNORED: Final = frozenset({
    "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers", "owner", "noowner",
    "group", "nogroup", "lazytime", "nolazytime", "silent", "loud", "mand", "nomand",
})  # fmt: skip
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "helper=", "uhelper=")

_BY_NAME: Final = {word.name: word for word in OPTIONS}


def _split(text: str) -> Iterator[str]:
    r"""Split at commas; `\,` is a comma of the value's own."""
    for part in re.split(r"(?<!\\),", text):
        if part:
            yield part.replace("\\,", ",")


def _is_known(word: str) -> bool:
    name = word.partition("=")[0]
    return name in _BY_NAME or word in KERNEL or word in IGNORED or word.startswith(_IGNORED_PREFIXES)


def parse_options(texts: Iterable[str]) -> Options:
    """Parse the values of all `-o`; the last of two that contradict wins, as with mount(8).

    A list of disks may go on after a comma (`disks=vda,vdb`): what follows it and is no option
    belongs to it. Raises UsageError, which names the word.
    """
    values: dict[str, Any] = {}
    kernel: set[str] = set()
    listing: str | None = None
    for word in (part for text in texts for part in _split(text)):
        name, equals, value = word.partition("=")
        if listing is not None and not equals and not _is_known(word):
            values[listing] = tuple(dict.fromkeys((*values[listing], *_value(listing, word))))
            continue
        listing = None
        if word in KERNEL:
            kernel -= {other for pair in _OPPOSITES if word in pair for other in pair}
            kernel.add(word)
        elif name in _BY_NAME:
            values[name.replace("-", "_")] = _value(name, value if equals else None)
            if _BY_NAME[name].parse is _names:
                listing = name
        elif not _is_known(word):
            raise UsageError(_unknown(name))
    if values.get("allow_other") and values.get("allow_root"):
        raise UsageError("allow_other and allow_root exclude each other")
    return replace(Options(), kernel=frozenset(kernel), **values)


def _value(name: str, value: str | None) -> Any:
    word = _BY_NAME[name]
    if word.parse is None:
        if value is not None:
            raise UsageError(f"option {name} takes no value")
        return True
    if value is None:
        raise UsageError(f"option {name} needs a value: {name}={word.metavar}")
    try:
        return word.parse(value)
    except ValueError as error:
        raise UsageError(f"option {name}={ascii(value)[1:-1]}: {error}") from None


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, [*_BY_NAME, *KERNEL, *IGNORED], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `backupfs --help` lists them"
    return f"unknown option {ascii(name)[1:-1]}{hint}"


def render_option_help() -> str:
    """Return the table of options as text for --help."""
    lines = []
    for word in OPTIONS:
        name = f"{word.name}={word.metavar}" if word.metavar else word.name
        lines.append(f"  {name:<26} {word.help}")
    lines.append("  ro, nosuid, nodev, …       as mount(8) has them; noauto, nofail, _netdev, x-… are for fstab alone")
    return "\n".join(lines)
