# SPDX-License-Identifier: GPL-3.0-or-later
"""What status tells, gathered from the job and its exports as they are now."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs import __version__
from backupfs.errors import BackupfsError
from backupfs.job import Job, JobState
from backupfs.point import Point
from backupfs.preflight import kind_of
from backupfs.scratch import Room, measure
from backupfs.status import DiskStatus, Snapshot

RATE_SECONDS: Final = 10  # a rate is the mean of the last ones


@dataclass(eq=False)
class Reporter:
    """Knows the mount's figures. `watch` must run for the rates and the scratch's use."""

    job: Job
    mount_point: str
    control: str
    log: str
    read_ahead: Callable[[], int] = lambda: 0
    why_no_seeks: str | None = None
    _read: collections.deque[tuple[float, str, dict[str, int]]] = field(
        default_factory=lambda: collections.deque(maxlen=RATE_SECONDS + 1)
    )
    _scratch_used: int | None = None

    async def watch(self) -> None:
        """Take the figures that need time or libvirt, once a second while a point is served."""
        while True:
            await trio.sleep(1)
            point = self.job.point
            if point is None or self.job.state is not JobState.RUNNING:
                self._scratch_used = None
                self._read.clear()
                continue
            reads = {target: export.bytes_read for target, export in point.exports.items()}
            self._read.append((trio.current_time(), point.job_id, reads))
            try:
                statistics = await self.job.domain.job_statistics()
            except BackupfsError:
                continue  # libvirt is away, or QEMU is stopped: the last figure stands
            if statistics is not None and statistics.operation == "backup":
                self._scratch_used = statistics.scratch_used

    def total_size(self) -> int:
        """Return the bytes of all disks that are being served; for df."""
        return sum(image.size for image in self.job.point.images.values()) if self.job.point else 0

    def snapshot(self) -> Snapshot:
        """Return the figures as they are now."""
        job, point = self.job, self.job.point
        return Snapshot(
            version=__version__,
            pid=os.getpid(),
            mount_point=self.mount_point,
            domain=job.domain.name,
            uuid=job.domain.uuid,
            uri=job.domain.uri,
            source="live",
            state=job.state.value,
            instant=point.instant if point else None,
            age=time.time() - point.began if point else None,
            point=point.job_id if point else None,
            socket=point.socket if point else None,
            why=self._why(point),
            open_files=job.holders.open_files,
            holders=job.holders.pids,
            unused_for=trio.current_time() - job.last_activity,
            idle=job.options.idle,
            idle_max=job.options.idle_max,
            last_instant=job.record.last_instant,
            quiesced=point.quiesced.is_sure if point else None,
            frozen_ms=None if point is None or point.quiesced.frozen is None else point.quiesced.frozen * 1000,
            frozen_filesystems=point.quiesced.filesystems if point else None,
            scratch_used=self._scratch_used,
            disks={target: self._disk(point, target) for target in point.exports} if point else {},
            rate_limit=job.options.rate,
            read_ahead=self.read_ahead(),
            sparse_seeks=self.why_no_seeks is None,
            control=self.control,
            log=self.log,
            watchdog=job.keeper.pid,
        )

    def _why(self, point: Point | None) -> dict[str, str]:
        job = self.job
        left_out = {**job.left_out, **({**point.forms.left_out, **point.bases.left_out} if point else {})}
        why = {name: f"{reason.text}; {reason.cure}" for name, reason in left_out.items()}
        if point is not None and point.quiesced.why_not is not None:
            why["quiesce"] = point.quiesced.why_not
        if job.lost is not None:
            why["point"] = f"lost: {job.lost}"
        elif job.refusal is not None and point is None:
            why["point"] = f"could not begin: {job.refusal}"
        elif job.last_loss is not None and point is None:
            why["point"] = f"lost: {job.last_loss}"
        if self.why_no_seeks is not None:
            why["sparse seeks"] = f"no: {self.why_no_seeks}"
        return why

    def _disk(self, point: Point, target: str) -> DiskStatus:
        export = point.exports[target]
        folder = os.path.dirname(point.scratches[target])
        room = _room(folder) if self.job.domain.is_local else None
        return DiskStatus(
            size=export.size,
            allocated=point.images[target].allocated,
            read=export.bytes_read,
            rate=self._rate(point, target),
            requests=export.requests,
            connections=len(export.traffic),
            reconnects=export.reconnects,
            extents=len(export.extents),
            mapped=export.extents.mapped,
            why_no_extents=export.why_no_extents,
            scratch=point.scratches[target],
            scratch_free=room.free if room else None,
            scratch_reserve=self.job.options.scratch_reserve.of(room.total) if room else None,
            scratch_file_system=kind_of(folder) if room else None,
        )

    def _rate(self, point: Point, target: str) -> float:
        samples = [(when, reads[target]) for when, job_id, reads in self._read if job_id == point.job_id]
        if len(samples) < 2 or samples[-1][0] == samples[0][0]:
            return 0.0
        return (samples[-1][1] - samples[0][1]) / (samples[-1][0] - samples[0][0])


def _room(folder: str) -> Room | None:
    try:
        return measure(folder)
    except OSError:
        return None
