# SPDX-License-Identifier: GPL-3.0-or-later
"""The scratch guard: ends the job before the scratch space is full, for then QEMU pauses the guest.

    free space, looked at every 10 ms to 1 s ─┐
    a scratch file has grown (libvirt's event)├─► look ──short of room──► abort ─► job gone ─► was the guest
    an I/O error paused the guest (event)     ┘                             paused for it? resume it

It runs in the watchdog, so it works while the mount is stopped. How often it looks follows from how
far the reserve is and how fast the room goes (`scratch.Gauge`). The event is asked for where half of
that way is used up, so that a gust is seen before the next look is due.

Law: the abort comes before everything else. A guest is resumed only if libvirt says that an I/O error
paused it, and it happened while our job ran and there was no more room, or the job was being ended
for it. Who was suspended by a person, or paused for a full disk of his own, stays so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs import domainxml
from backupfs.domain import Domain
from backupfs.errors import BackupfsError, NoSuchDomain
from backupfs.link import Happening, Kind, in_thread
from backupfs.scratch import FULL, LONGEST, SHORTEST, Gauge, Look, Reserve, Room, measure, room_text
from backupfs.state import JobRecord

log = logging.getLogger("backupfs.guard")

GRACE_SECONDS: Final = 2.0  # what QEMU told before the job's end may reach us after it
STATISTICS_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 0.1
THRESHOLD_STEP: Final = 2**20  # bytes: nearer ones would only cost calls


@dataclass(eq=False)
class Guard:
    """Guards one job. *say* hands a log line to the mount; *lose* tells it that its point is lost."""

    domain: Domain
    record: JobRecord
    reserve: Reserve
    say: Callable[[int, str], None]
    lose: Callable[[str, str], None]
    aborting: trio.Lock = field(default_factory=trio.Lock)  # two aborts at once could hit two jobs
    _gauges: dict[str, Gauge] = field(default_factory=dict)
    _fullest: Room | None = None
    _armed: dict[str, int] = field(default_factory=dict)
    _saved: int = 0
    _nudged: trio.Event = field(default_factory=trio.Event)
    _unsure: trio.Event = field(default_factory=trio.Event)
    _begun: trio.Event = field(default_factory=trio.Event)
    _io_error: bool = False
    _paused_since: float | None = None  # by an I/O error
    _paused_by_other: bool = False  # by one that was not for want of scratch space
    _ending: bool = False

    def __post_init__(self) -> None:
        for path in self.record.scratches:
            folder = os.path.dirname(path)
            self._gauges[folder] = Gauge(folder, self.reserve)

    def hear(self, happening: Happening) -> None:
        """Take note of what happened to the domain."""
        match happening.kind:
            case Kind.SCRATCH_GREW:
                self._nudged.set()
            case Kind.IO_ERROR:
                self._io_error = True
                self._nudged.set()
            case Kind.PAUSED_BY_ERROR:
                self._note_pause()
            case Kind.RESUMED:
                self._paused_since, self._paused_by_other = None, False
            case Kind.RECONNECTED:  # it may have happened meanwhile
                self._unsure.set()

    def job_runs(self) -> None:
        """Know that the begin is over, and that libvirt may be asked things that need QEMU."""
        self._begun.set()

    def _note_pause(self) -> None:
        if self._paused_since is None:
            self._paused_since = trio.current_time()
        self._nudged.set()

    @property
    def is_ending(self) -> bool:
        """Whether it has begun to end the job; it sees to the guest then by itself."""
        return self._ending

    # --- looking -----------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look until the job had to be ended; then see to the guest."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_statistics)
            nursery.start_soon(self._watch_pauses)
            while True:
                nudged = self._nudged = trio.Event()
                look = await self._look()
                if look.why is not None:
                    break
                with trio.move_on_after(look.wait):
                    await nudged.wait()
            nursery.cancel_scope.cancel()
        await self._end(look.why)

    async def _look(self) -> Look:
        """Look at all scratch file systems; return the most urgent of what they say."""
        looks = []
        paused, io_error = self._paused_since, self._io_error
        self._io_error = False
        fullest = None
        for folder, gauge in self._gauges.items():
            try:
                # In a thread: a network's file system may not answer.
                room = await in_thread(functools.partial(measure, folder))
            except OSError as error:
                log.debug("%s: cannot measure %s: %s", self.domain.name, folder, error)
                continue
            if fullest is None or room.free < fullest.free:
                fullest = room
            look = gauge.look(trio.current_time(), room)
            if look.why is None and room.free < FULL and (io_error or paused is not None):
                look = Look(f"QEMU had no room left for old blocks ({folder})", SHORTEST)
            if look.why is not None:
                return look
            looks.append(look)
        self._fullest = fullest
        # Measured after the pause, there is room: so it was for another reason.
        self._paused_by_other |= paused is not None
        return min(looks, key=lambda look: look.wait, default=Look(None, LONGEST))

    # --- what libvirt tells ------------------------------------------------------------------

    async def _watch_pauses(self) -> None:
        """See whether the guest is paused already, when no event has told."""
        while True:
            with contextlib.suppress(BackupfsError):
                if await self.domain.is_paused_by_error():
                    self._note_pause()
            await self._unsure.wait()
            self._unsure = trio.Event()

    async def _watch_statistics(self) -> None:
        """Keep what QEMU has saved, and ask for an event where a scratch file has grown by half of the way."""
        await self._begun.wait()  # before, each question would stand in the way of a begin, or of a thaw
        while True:
            try:
                statistics = await self.domain.job_statistics()
                if statistics is not None and statistics.operation == "backup":
                    self._saved = statistics.scratch_used or 0
                    await self._arm()
            except BackupfsError as error:
                log.debug("%s: %s", self.domain.name, error)  # libvirtd is away, or QEMU is stopped
            await trio.sleep(STATISTICS_SECONDS)

    async def _arm(self) -> None:
        xml = await self.domain.backup_xml()
        job = domainxml.parse_backup(xml) if xml is not None else None
        if job is None or job.socket != self.record.socket or self._fullest is None:
            return
        way = self._fullest.free - self.reserve.of(self._fullest.total)
        step = max(way // 2 // len(self.record.scratches), THRESHOLD_STEP)
        for target, index in job.indexes.items():
            threshold = _size(job.scratches.get(target, "")) + step
            # Not anew each time for a little: each is a job in libvirt, and an abort waits for it.
            if abs(threshold - self._armed.get(target, 0)) > step // 4:
                await self.domain.set_threshold(f"{target}[{index}]", threshold)
                self._armed[target] = threshold

    # --- ending ------------------------------------------------------------------------------

    async def _end(self, why: str) -> None:
        self._ending = True
        saved = max(self._saved, sum(map(_size, self.record.scratches)))
        self.lose(self.record.job_id, f"{why}; {room_text(saved)} were saved: make room, or `-o scratch=` elsewhere")
        told = False
        while True:
            try:
                async with self.aborting:
                    await self.domain.abort_backup(self.record.socket)
                break
            except BackupfsError as error:  # libvirtd is away, say; the mount, told above, tries too
                if not told:
                    self.say(logging.WARNING, f"{self.domain.name}: the scratch guard cannot end the job yet: {error}")
                told = True
            await trio.sleep(RETRY_SECONDS)
        await self.rescue()

    async def rescue(self) -> None:
        """When the job is gone, resume the guest if it was paused for want of scratch space."""
        if not self._ending and self._paused_since is None:
            return
        while await self._runs():  # noqa: ASYNC110 - no event tells reliably
            await trio.sleep(SHORTEST)
        with trio.move_on_after(GRACE_SECONDS):
            while not self._paused_by_other:
                nudged = self._nudged = trio.Event()
                with contextlib.suppress(BackupfsError):
                    since = self._paused_since
                    if await self.domain.resume_after_error():
                        self._tell_resumed(since)
                        return
                await nudged.wait()

    def _tell_resumed(self, since: float | None) -> None:
        lasted = f" after {trio.current_time() - since:.2f} s" if since is not None else ""
        name = self.domain.name
        self.say(logging.WARNING, f"{name}: the guest was paused for want of scratch space, and was resumed{lasted}")

    async def _runs(self) -> bool:
        try:
            xml = await self.domain.backup_xml()
        except NoSuchDomain:
            return False
        except BackupfsError:
            return True
        return xml is not None and domainxml.parse_backup(xml).socket == self.record.socket


def _size(path: str) -> int:
    """Return how large a scratch file is; 0 before it is there, and after."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
