# SPDX-License-Identifier: GPL-3.0-or-later
"""The mount point: whether it can be used, whether it is still mounted, and taking it off.

`/proc/self/mountinfo` is the truth about mounts. Looking at the mount point itself would ask the
file system, and the process that serves a file system must never wait for itself.
"""

from __future__ import annotations

import os
import select
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from backupfs.errors import MissingDependency, MountPointError

MOUNTINFO: Final = "/proc/self/mountinfo"
BDI: Final = "/sys/class/bdi"
READ_AHEAD: Final = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: what is mounted where."""

    device: str  # "0:47": one superblock, in all its copies
    path: str
    kind: str
    source: str


def parse_mountinfo(text: str) -> list[Mount]:
    """Parse proc_pid_mountinfo(5); the last one of a path is the one on top."""
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if len(fields) >= 5 and len(rest) >= 2:
            mounts.append(Mount(fields[2], _unescape(fields[4]), rest[0], _unescape(rest[1])))
    return mounts


def _unescape(field: str) -> str:
    r"""Undo the kernel's octal escapes of space, tab, newline and backslash (\040 …)."""
    head, *parts = field.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] if part[:3].isdigit() else "\\" + part for part in parts)


def read_mounts() -> list[Mount]:
    """Return the mounts of this process's namespace."""
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def mount_at(path: str) -> Mount | None:
    """Return what is mounted at exactly *path*, or None; asks no file system."""
    at = [mount for mount in read_mounts() if mount.path == path]
    return at[-1] if at else None


def check_tools() -> None:
    """Raise MissingDependency where FUSE cannot work."""
    if shutil.which("fusermount3") is None:
        raise MissingDependency("the program fusermount3", "fuse3")
    if not os.path.exists("/dev/fuse"):
        raise MissingDependency("/dev/fuse", "fuse3, and load the kernel's module: modprobe fuse")


def check_mount_point(path: str) -> str:
    """Return the mount point's absolute path; raise MountPointError unless it is free and empty."""
    absolute = os.path.realpath(path)
    mounted = mount_at(absolute)
    if mounted is not None and mounted.kind.startswith("fuse"):
        raise MountPointError(path, f"already mounted: {mounted.source} ({mounted.kind}); unmount it first")
    try:
        status = os.stat(absolute)
        if not stat.S_ISDIR(status.st_mode):
            raise MountPointError(path, "not a directory")
        if os.listdir(absolute):
            raise MountPointError(path, "not empty; a mount would hide what is there")
    except FileNotFoundError:
        raise MountPointError(path, "no such directory; make it first") from None
    except OSError as error:
        raise MountPointError(path, f"cannot be used: {error.strerror}") from error
    return absolute


def check_overlap(mount_point: str, paths: Iterable[str]) -> None:
    """Raise MountPointError if the mount would lie over a folder that the backup itself needs.

    QEMU would then wait for the file system, and the file system for QEMU.
    """
    for path in paths:
        real = os.path.realpath(path)
        if os.path.commonpath((mount_point, real)) == mount_point:
            raise MountPointError(mount_point, f"the mount would hide {path}, which the domain needs; choose another")


def raise_read_ahead(device: str) -> None:
    """Let the kernel read farther ahead on the mount of *device*, if we may.

    It reads 128 KiB ahead unless told otherwise, and asks for no more at a time. Only root may
    tell it. More than a megabyte is slower again.
    """
    path = f"{BDI}/{device}/read_ahead_kb"
    try:
        with open(path, "r+", encoding="ascii") as file:
            if int(file.read()) < READ_AHEAD // 1024:
                file.seek(0)
                file.write(str(READ_AHEAD // 1024))
                file.flush()
    except OSError:
        pass  # then what it is, is told


def read_ahead(device: str) -> int:
    """Return how far the kernel reads ahead on the mount of *device*, in bytes; 0: not known.

    Asked for anew each time, for root may raise it at any time.
    """
    try:
        with open(f"{BDI}/{device}/read_ahead_kb", encoding="ascii") as file:
            return int(file.read()) * 1024
    except OSError:
        return 0  # no sysfs here


async def wait_unmounted(device: str) -> None:
    """Wait until no mount of *device* is left in this process's namespace.

    Another namespace may hold a copy for as long as it likes (each QEMU has its own); the
    kernel then does not tell us, for to it the file system is still mounted.
    """
    with open(MOUNTINFO, "rb") as file, select.epoll() as changes:
        # mountinfo is always readable; only a change shows as EPOLLERR | EPOLLPRI.
        changes.register(file.fileno(), select.EPOLLPRI | select.EPOLLERR)
        while any(mount.device == device for mount in read_mounts()):
            await trio.lowlevel.wait_readable(changes.fileno())
            changes.poll(0)


async def unmount(path: str) -> str | None:
    """Take the mount off unless it is busy; return None, or why not.

    Never lazily: what is detached while somebody looks on becomes an empty directory to the
    next who looks, and `rsync --delete` would empty the copy.
    """
    # umount(8) as root, for fusermount3 wants /etc/mtab, which a small system may lack.
    program = ["umount", "-i", "--", path] if os.geteuid() == 0 else ["fusermount3", "-u", "--", path]
    done = await trio.run_process(program, capture_stdout=True, capture_stderr=True, check=False)
    return None if done.returncode == 0 else done.stderr.decode(errors="replace").strip()
