# SPDX-License-Identifier: GPL-3.0-or-later
"""Short jobs: one reads the bitmap of an older checkpoint, and moves no data.

    begin, base c1 ─► connect ─► read qemu:dirty-bitmap ─► abort ─► wait for its end       some 0.1 s

One job has one base on each disk, so each older checkpoint takes one. They run before the real
job, and before the guest is frozen for it. See `increments`.

Law: a bitmap that could not be read is a `Reason`, never an empty set.
"""

from __future__ import annotations

from collections.abc import Mapping

import trio

from backupfs.changes import Changes, from_extents
from backupfs.domainxml import Reason
from backupfs.errors import (
    CheckpointUnusable,
    NbdProtocolError,
    NbdUnavailable,
)
from backupfs.increments import Job
from backupfs.launch import Backup, Launcher, Survey
from backupfs.nbdbitmap import read_bitmap
from backupfs.nbdclient import Address

BROKEN_CURE = "delete it, and make a new checkpoint"

Reading = Changes | Reason


def broken(error: CheckpointUnusable) -> Reason:
    """Say that libvirt has no bitmap to count from."""
    return Reason(error.reason, BROKEN_CURE)


async def read_base(launcher: Launcher, seen: Survey, job: Job) -> Mapping[tuple[str, str], Reading]:
    """Do one short *job*; return what was read, by (checkpoint, disk).

    Where libvirt refuses the checkpoint, each disk is tried by itself: it may be broken on one only.
    """
    try:
        return await _read(launcher, seen, job)
    except CheckpointUnusable as error:
        if len(job.disks) == 1:
            return {(job.checkpoint, job.disks[0]): broken(error)}
    found: dict[tuple[str, str], Reading] = {}
    for disk in job.disks:
        found.update(await read_base(launcher, seen, Job(job.checkpoint, (disk,))))
    return found


async def _read(launcher: Launcher, seen: Survey, job: Job) -> Mapping[tuple[str, str], Reading]:
    disks = tuple(disk for disk in seen.selection.taking if disk.target in job.disks)
    bases = dict.fromkeys(job.disks, job.checkpoint)
    async with launcher.open(seen, disks, launcher.domain.begin_backup, bases=bases) as backup:
        return await read_bitmaps(backup, bases, launcher.options.timeout)


async def read_bitmaps(backup: Backup, bases: Mapping[str, str], timeout: float) -> dict[tuple[str, str], Reading]:
    """Read the bitmap of each disk's base from a running job; return it by (checkpoint, disk)."""
    found: dict[tuple[str, str], Reading] = {}

    async def read(disk: str, checkpoint: str) -> None:
        try:
            extents = await read_bitmap(Address(backup.socket, disk), backup.bitmap, timeout=timeout)
        except (NbdUnavailable, NbdProtocolError) as error:
            found[checkpoint, disk] = Reason(f"its bitmap could not be read: {error}", "begin another point in time")
        else:
            found[checkpoint, disk] = await trio.to_thread.run_sync(from_extents, extents)

    async with trio.open_nursery() as nursery:
        for disk, checkpoint in bases.items():
            nursery.start_soon(read, disk, checkpoint)
    return found
