# SPDX-License-Identifier: GPL-3.0-or-later
"""What must be so before a job may begin: QEMU can save old blocks where it is told to, and has room.

    exists here ─► the same folder as QEMU sees ─► QEMU's user may enter it (and write) ─► room above the reserve

QEMU has a mount namespace of its own: a file system that was mounted after the guest started is
not in it, and QEMU sees the folder below, on another file system or none. That can be told only by
who may look into QEMU's `/proc`, which is root, or QEMU's user. What cannot be known is not held
against a folder: libvirt then says at the begin what it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backupfs import mountpoint
from backupfs.errors import ScratchFull, ScratchUnusable
from backupfs.scratch import Reserve, measure, room_text

SEARCH: Final = 1
WRITE: Final = 2


def check_scratch(folders: Collection[str], reserve: Reserve, *, domain: str, uuid: str, uri: str) -> None:
    """Raise ScratchUnusable or ScratchFull unless QEMU can save old blocks in all *folders*."""
    qemu = find_qemu(domain, uuid, uri)
    for folder in sorted(folders):
        try:
            room = measure(folder)
            if not stat.S_ISDIR(os.stat(folder).st_mode):
                raise NotADirectoryError(20, "it is not a directory")
        except OSError as error:
            raise ScratchUnusable(
                domain, folder, _reason(error), "make it, or name another with -o scratch=DIR"
            ) from error
        if qemu is not None:
            _check_view(folder, qemu, domain, session="/session" in uri)
        must_stay = reserve.of(room.total)
        if room.free <= must_stay:
            raise ScratchFull(domain, folder, kind_of(folder), room_text(room.free), room_text(must_stay))


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def kind_of(folder: str) -> str:
    """Say on what file system *folder* lies: "ext4", "xfs" …"""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    kinds = [mount.kind for mount in mountpoint.read_mounts() if mount.device == number]
    # btrfs gives each subvolume a device of its own, which mountinfo does not have.
    return kinds[-1] if kinds else _kind_above(folder)


def _kind_above(folder: str) -> str:
    real = os.path.realpath(folder)
    above = [mount for mount in mountpoint.read_mounts() if os.path.commonpath((mount.path, real)) == mount.path]
    return max(above, key=lambda mount: len(mount.path)).kind if above else "unknown file system"


# --- QEMU's view -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Qemu:
    """The domain's QEMU: its process, and as whom it runs."""

    pid: int
    uid: int
    groups: frozenset[int]


def find_qemu(domain: str, uuid: str, uri: str) -> Qemu | None:
    """Return the domain's QEMU on this host, None where it cannot be found."""
    folder = Path("/run/libvirt/qemu")
    if "/session" in uri:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if not runtime:
            return None
        folder = Path(runtime, "libvirt/qemu/run")
    try:
        pid = int((folder / f"{domain}.pid").read_text())
        process = Path(f"/proc/{pid}")
        if uuid.encode() not in (process / "cmdline").read_bytes():
            return None  # the file is an old one's
        return Qemu(pid, *parse_ids((process / "status").read_text()))
    except (OSError, ValueError):
        return None


def parse_ids(status: str) -> tuple[int, frozenset[int]]:
    """Return user and groups, as files are checked against, from proc_pid_status(5); raise ValueError."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    try:
        uid, gid = int(fields["Uid"].split()[3]), int(fields["Gid"].split()[3])
        return uid, frozenset({gid, *(int(group) for group in fields["Groups"].split())})
    except (KeyError, IndexError) as error:
        raise ValueError("not a process's status") from error


def _check_view(folder: str, qemu: Qemu, domain: str, *, session: bool) -> None:
    try:
        # The real path, for a link would lead from there into our own namespace.
        theirs = os.stat(f"/proc/{qemu.pid}/root{os.path.realpath(folder)}")
    except FileNotFoundError:
        theirs = None
    except OSError:
        return  # not ours to look at
    ours = os.stat(folder)
    if theirs is None or (theirs.st_dev, theirs.st_ino) != (ours.st_dev, ours.st_ino):
        raise ScratchUnusable(
            domain,
            folder,
            "in QEMU's own mount namespace it is another folder, or none; was it mounted after the guest started?",
            "restart the guest, or name another with -o scratch=DIR",
        )
    # A system's libvirtd makes the file as root, and hands it over; a session's is QEMU's user.
    wanted = SEARCH | WRITE if session else SEARCH
    if not may(ours, qemu, wanted) and not _has_acl(folder):
        raise ScratchUnusable(
            domain,
            folder,
            f"user {qemu.uid}, as whom QEMU runs, may not {'write there' if session else 'enter it'}",
            "give it to that user, or name another with -o scratch=DIR",
        )


def may(status: os.stat_result, qemu: Qemu, wanted: int) -> bool:
    """Whether the mode's bits let QEMU have *wanted* of a folder."""
    if qemu.uid == 0:
        return True
    shift = 6 if status.st_uid == qemu.uid else 3 if status.st_gid in qemu.groups else 0
    return (status.st_mode >> shift) & wanted == wanted


def _has_acl(folder: str) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(folder)
    except OSError:
        return False
