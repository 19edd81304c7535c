# SPDX-License-Identifier: GPL-3.0-or-later
"""Which file an image is: what tells it from an older copy that was put in its place.

A copy has another inode, and should that number be used again, another birth time. Python's own
stat does not tell the birth time, so it is asked for by statx(2).
"""

from __future__ import annotations

import ctypes
import os
import stat
from typing import Final

from backupfs.history import ImageIdentity

_QCOW2: Final = b"QFI\xfb"
_AT_FDCWD: Final = -100
_STATX_INO: Final = 0x100
_STATX_BTIME: Final = 0x800


class _Timestamp(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_uint32), ("_reserved", ctypes.c_int32))


class _Statx(ctypes.Structure):
    """`struct statx` of linux/stat.h, which is the same on every architecture."""

    _fields_ = (
        ("mask", ctypes.c_uint32),
        ("_blksize", ctypes.c_uint32),
        ("_attributes", ctypes.c_uint64),
        ("_nlink", ctypes.c_uint32),
        ("_uid", ctypes.c_uint32),
        ("_gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("_spare0", ctypes.c_uint16),
        ("inode", ctypes.c_uint64),
        ("_size", ctypes.c_uint64),
        ("_blocks", ctypes.c_uint64),
        ("_attributes_mask", ctypes.c_uint64),
        ("_atime", _Timestamp),
        ("birth", _Timestamp),
        ("_ctime", _Timestamp),
        ("_mtime", _Timestamp),
        ("_rdev", ctypes.c_uint32 * 2),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("_spare", ctypes.c_uint64 * 14),
    )


def identify_image(path: str) -> ImageIdentity | None:
    """Return what tells the image file at *path* from others; None where nothing does.

    That is for a block device, whose node is made anew at every boot. Raises OSError.
    """
    found = _Statx()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statx(_AT_FDCWD, os.fsencode(path), 0, _STATX_INO | _STATX_BTIME, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    if not stat.S_ISREG(found.mode):
        return None
    born = found.mask & _STATX_BTIME  # not every file system keeps it
    birth = max(0, found.birth.seconds * 10**9 + found.birth.nanoseconds) if born else 0
    return ImageIdentity(os.makedev(found.dev_major, found.dev_minor), found.inode, birth)


def qcow2_version(path: str) -> int | None:
    """Return the version of the qcow2 image at *path*; None where it cannot be read, or is none.

    The first bytes never change while QEMU has it open.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError:
        return None
    return int.from_bytes(head[4:], "big") if head[:4] == _QCOW2 and len(head) == 8 else None
