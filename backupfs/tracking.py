# SPDX-License-Identifier: GPL-3.0-or-later
"""What changed since each checkpoint, found out while a point in time begins.

    redefine what libvirt lost ─► list ─► plan ─► short jobs ─► (the real job begins)
      ─► read its bitmaps ─► list again ─► conclude ─► write the records ─► prune

What follows from what is in `increments`; here it is asked for. All that can be slow or fail comes
before the real job, and so before the guest is frozen for it.

Law: a point is served only when its records are written, and nothing is pruned before.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs import imagefile
from backupfs.checkpoints import Base, Checkpoints
from backupfs.checkpointxml import why_no_bitmap
from backupfs.domainxml import Disk, Reason
from backupfs.errors import CheckpointUnusable
from backupfs.history import ImageIdentity, Record
from backupfs.increments import Conclusion, DiskNow, Plan, conclude, plan
from backupfs.launch import Backup, Launcher, Survey
from backupfs.lineage import SETTLE_SECONDS, Identity, Mark, libvirt_clock
from backupfs.shortjob import BROKEN_CURE, Reading, broken, read_base, read_bitmaps

log = logging.getLogger("backupfs.tracking")

NO_CHUNKS: Final = 0  # the size of chunk files: there are none yet
SETTLE_MARGIN: Final = 0.1


@dataclass(frozen=True, slots=True)
class Concluded:
    """What is known of a point: of each disk, and which checkpoints libvirt listed right after it began."""

    disks: Mapping[str, Conclusion]
    live: Mapping[str, Base]


@dataclass(eq=False)
class Tracking:
    """One point's begin. Made by `track`."""

    launcher: Launcher
    checkpoints: Checkpoints
    seen: Survey
    now: Mapping[str, DiskNow]
    records: Mapping[str, Record]
    listed: Sequence[Base]
    clock: float | None
    trusted: set[Identity]
    why_not: Mapping[str, Reason]  # by target, of the disks that cannot hold a bitmap
    readings: dict[tuple[str, str], Reading] = field(default_factory=dict)
    _plan: Plan | None = None

    @property
    def bases(self) -> Mapping[str, str]:
        """The base of the real job, by disk."""
        assert self._plan is not None
        return self._plan.base

    async def _settle(self) -> None:
        """Plan; where a checkpoint was made just now, wait until no other can pass for it."""
        await self._replan()
        assert self._plan is not None
        if not self._plan.unsettled:
            return
        before = {base.identity for base in self.listed}
        await trio.sleep(SETTLE_SECONDS + SETTLE_MARGIN)
        self.listed = list((await self.checkpoints.live()).values())
        self.trusted |= {base.identity for base in self.listed} & before
        await self._replan()

    async def _replan(self) -> None:
        make = functools.partial(
            plan,
            [base.checkpoint for base in self.listed],
            self.now,
            self.records,
            clock=self.clock,
            unreadable={
                (base.name, disk): reason
                for base in self.listed
                for (identity, disk), reason in self.checkpoints.unreadable.items()
                if identity == base.identity
            },
            trusted=self.trusted,
        )
        self._plan = await trio.to_thread.run_sync(make)

    async def read_older(self) -> None:
        """Do the short jobs that are still to be done."""
        assert self._plan is not None
        for job in self._plan.short:
            if any((job.checkpoint, disk) not in self.readings for disk in job.disks):
                found = await read_base(self.launcher, self.seen, job)
                self.readings.update(found)
                for (name, disk), reading in found.items():
                    if isinstance(reading, Reason) and reading.cure == BROKEN_CURE:
                        self._remember(name, disk, reading)

    def _remember(self, name: str, disk: str, reason: Reason) -> None:
        """Note what cannot be read, so that no later point tries it."""
        identity = next(base.identity for base in self.listed if base.name == name)
        self.checkpoints.unreadable[identity, disk] = reason

    async def refuse_bases(self, error: CheckpointUnusable) -> None:
        """Plan anew after libvirt refused the real job because of a base; raise *error* if there is none."""
        if not self.bases:
            raise error
        # Libvirt names the bitmap, which is called as the checkpoint is, and the disk; but in a sentence.
        named = [
            (disk, name)
            for disk, name in self.bases.items()
            if f"'{name}'" in error.reason and f"'{disk}'" in error.reason
        ]
        for disk, name in named or self.bases.items():
            self._remember(name, disk, broken(error))
        await self._replan()
        await self.read_older()

    async def conclude(self, backup: Backup, sizes: Mapping[str, int], instant: int, made: Mark | None) -> Concluded:
        """Read what the real job tells, and say what changed; the records are written when this returns.

        Raises LibvirtRefused, StateFolderError.
        """
        assert self._plan is not None
        self.readings.update(await read_bitmaps(backup, self.bases, self.launcher.options.timeout))
        live = await self.checkpoints.live()
        made_now = next((base for base in live.values() if made is not None and base.identity.mark == made), None)
        if made_now is not None:
            self.checkpoints.note_made(made_now)
        work = functools.partial(
            conclude,
            self._plan,
            self.readings,
            [base.checkpoint for base in live.values()],
            sizes,
            instant=instant,
            chunk=NO_CHUNKS,
            made=made,
        )
        found = await trio.to_thread.run_sync(work)
        await trio.to_thread.run_sync(self.checkpoints.store.save, [one.record for one in found.values()])
        for disk, one in found.items():
            known = self.records.get(disk)
            if one.doubt is not None and known is not None and known.seen:  # without checkpoints it is always so
                log.info("%s: all of %s counts as changed: %s", self.launcher.domain.name, disk, one.doubt)
        return Concluded(found, live)


async def track(launcher: Launcher, checkpoints: Checkpoints, seen: Survey) -> Tracking:
    """Plan what to read, and read what takes jobs of its own; the real one may begin then.

    Raises what libvirt and a job can raise.
    """
    domain = launcher.domain
    await checkpoints.redefine_lost()
    now, records, why_not = await trio.to_thread.run_sync(_look_at_disks, checkpoints, seen, domain.is_local)
    made = [one.identity for one in checkpoints.store.checkpoints.values()]
    clock = libvirt_clock(made, time.time() if domain.is_local else None)
    listed = list((await checkpoints.live()).values())
    tracking = Tracking(launcher, checkpoints, seen, now, records, listed, clock, checkpoints.trusted(), why_not)
    await tracking._settle()
    await tracking.read_older()
    return tracking


def _look_at_disks(
    checkpoints: Checkpoints, seen: Survey, local: bool
) -> tuple[dict[str, DiskNow], dict[str, Record], dict[str, Reason]]:
    now: dict[str, DiskNow] = {}
    records: dict[str, Record] = {}
    why_not = dict(seen.selection.left_out)
    for disk in seen.selection.taking:
        path = disk.source or ""
        now[disk.target] = DiskNow(path, _image(disk) if local else None)
        record = checkpoints.store.load(disk.target, path)
        if record is not None:
            records[disk.target] = record
        if (reason := look_for_bitmap(disk, local)) is not None:
            why_not[disk.target] = reason
    return now, records, why_not


def look_for_bitmap(disk: Disk, local: bool) -> Reason | None:
    """Say why *disk* cannot hold a checkpoint's bitmap; None if it can. Reads its image's first bytes."""
    version = imagefile.qcow2_version(disk.source) if local and disk.source is not None else None
    return why_no_bitmap(disk, version)


def _image(disk: Disk) -> ImageIdentity | None:
    try:
        return imagefile.identify_image(disk.source) if disk.source is not None else None
    except OSError as error:
        log.debug("%s: %s", disk.target, error)  # a network disk, or not ours to look at
        return None
