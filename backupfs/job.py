# SPDX-License-Identifier: GPL-3.0-or-later
"""The backup job: the one window onto a domain's disks, and who looks through it.

A domain has at most one job, so all readers share one point in time; each holds a lease.

    IDLE --wanted--> STARTING --began--> RUNNING --unused--> STOPPING --ended--> IDLE
                         `--refused--> IDLE   `--broke--> LOST --quiet--> IDLE

Law: this file holds the only mutable truth about the job, in `Job.state`, and every change goes
through `TRANSITIONS`. All of it runs in the trio thread, so whatever stands between two awaits
is one step to everybody else.

**Generations.** Each point has a number, and the folders of the *next* point carry its number
already while the job is idle: whoever enters `raw/` and then looks inside is bound to the point
that his look begins, not thrown out by it. When the point ends the number moves on, and what was
entered under the old one answers `EIO` until it has been looked up by its path again.

**In use** means: a file is open, or a process that opened one still lives, or something was
asked for within `idle=`. So a tool that is between two files, or was stopped for an hour by a
slow target, keeps its point.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs.checkpoints import Checkpoints
from backupfs.domain import Domain
from backupfs.domainxml import Reason, parse_backup
from backupfs.errors import BackupfsError, NotBegun, PointInUse, PointLost
from backupfs.holders import Holders, Lease
from backupfs.keeper import Keeper
from backupfs.launch import Launcher
from backupfs.leftover import ABORT_SECONDS, GONE_SECONDS
from backupfs.link import Happening, Kind
from backupfs.options import Options
from backupfs.point import Point, open_point, preflight
from backupfs.state import State

log = logging.getLogger("backupfs.job")

QUIET_SECONDS: Final = 60.0  # a lost point is forgotten when nobody has asked for so long


class JobState(enum.Enum):
    """Where the job is; see the module's drawing."""

    IDLE = "idle"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    LOST = "lost"


class Event(enum.Enum):
    """What moves it."""

    WANTED = "wanted"
    BEGAN = "began"
    REFUSED = "refused"
    UNUSED = "unused"
    ENDED = "ended"
    BROKE = "broke"
    QUIET = "quiet"


TRANSITIONS: Final = {
    (JobState.IDLE, Event.WANTED): JobState.STARTING,
    (JobState.STARTING, Event.BEGAN): JobState.RUNNING,
    (JobState.STARTING, Event.REFUSED): JobState.IDLE,
    (JobState.RUNNING, Event.UNUSED): JobState.STOPPING,
    (JobState.STOPPING, Event.ENDED): JobState.IDLE,
    (JobState.RUNNING, Event.BROKE): JobState.LOST,
    (JobState.LOST, Event.QUIET): JobState.IDLE,
}


@dataclass(eq=False)
class Job:
    """The domain's backup job as this mount sees it. Got with `open_job`."""

    domain: Domain
    record: State
    options: Options
    keeper: Keeper
    checkpoints: Checkpoints
    state: JobState = JobState.IDLE
    generation: int = 1
    point: Point | None = None
    holders: Holders = field(init=False)
    refusal: str | None = None
    lost: str | None = None
    last_loss: str | None = None  # until the next point begins
    left_out: Mapping[str, Reason] = field(default_factory=dict)
    last_activity: float = field(default_factory=trio.current_time)
    _nursery: trio.Nursery | None = None
    _settled: trio.Event = field(default_factory=trio.Event)
    _end_wanted: trio.Event = field(default_factory=trio.Event)
    _changed: trio.Event = field(default_factory=trio.Event)
    _error: BackupfsError | None = None
    _unquiesced: str | None = None
    _ended_by_guard: tuple[str, str] | None = None  # the latest job that it ended, and why
    _closing: bool = False
    _making: trio.Lock = field(default_factory=trio.Lock)

    def __post_init__(self) -> None:
        self.holders = Holders(self.touch, self._reconsider)

    def _reconsider(self) -> None:
        """Have the clock's watcher look again; the event is made anew after each time."""
        self._changed.set()

    # --- what the tree asks ------------------------------------------------------------------

    async def look(self) -> Point:
        """Return the point in time, and begin it if this is the first look.

        Raises what `open_point` raises, PointLost while a lost point is not forgotten, and
        NotBegun where only a command begins one.
        """
        while self.state is not JobState.RUNNING:
            if self.state is JobState.LOST:
                self.touch()
                raise PointLost(self.domain.name, self.lost or "the backup job ended")
            if self.state is JobState.IDLE:
                if self.options.begin != "look":
                    cure = "run `backupfs begin MOUNTPOINT`"
                    raise NotBegun(
                        self.domain.name,
                        f"mkdir checkpoints/NAME, or {cure}" if self.options.begin == "mkdir" else cure,
                    )
                self._want()
            await self._wait_settled()
        self.touch()
        assert self.point is not None
        return self.point

    async def begin(self) -> Point:
        """Begin a point in time by command; return the running one if there is one."""
        if self.state is JobState.LOST:
            await self.release()
        if self.state is JobState.IDLE:
            self._want()
        while self.state is not JobState.RUNNING:
            if self.state is JobState.IDLE:
                self._want()
            await self._wait_settled()
        assert self.point is not None
        return self.point

    async def make_checkpoint(self, name: str, pid: int) -> None:
        """Make a checkpoint, and with it a new point in time, which takes the place of the one that is held.

        The new one is looked at before the old one is ended, on behalf of the process *pid*. Raises
        PointInUse while another process uses the old one, and what `preflight` and `open_point` raise.
        """
        async with self._making:
            while self.state in (JobState.STARTING, JobState.STOPPING):
                await self._wait_settled()
            if self.state is JobState.LOST:
                self.touch()
                raise PointLost(self.domain.name, self.lost or "the backup job ended")
            await preflight(self.launcher, name, self.checkpoints)
            if self.point is not None and (others := await self.holders.others(self.point, pid)):
                raise PointInUse(self.domain.name, self.point.instant, others)
            if self.state is JobState.RUNNING:
                self._end(f"checkpoint {name} is to be made")
                await self._wait_settled(ABORT_SECONDS + GONE_SECONDS)
            if self.state is not JobState.IDLE:  # somebody else's look has begun one meanwhile
                raise PointInUse(self.domain.name, self.record.last_instant, "another process")
            self._want(name)
            await self._wait_settled()

    async def release(self) -> int:
        """End the point in time, or forget the lost one; return how many open files it cut off."""
        while self.state in (JobState.STARTING, JobState.STOPPING):
            with contextlib.suppress(BackupfsError):
                await self._wait_settled(ABORT_SECONDS + GONE_SECONDS)
        if self.state is JobState.LOST:
            await self._settled.wait()  # its remains are still being cleared away
            if self.state is JobState.LOST:
                self._fire(Event.QUIET)
            return 0
        if self.state is JobState.IDLE:
            return 0
        cut_off = self.holders.open_files
        self._end("released by command")
        # Whoever asks for it needs it to be over: he has a snapshot to make, say.
        await self._wait_settled(ABORT_SECONDS + GONE_SECONDS)
        return cut_off

    def lease(self, point: Point, pid: int) -> Lease:
        """Claim *point* for a file that the process *pid* opens."""
        lease = self.holders.lease(point, pid)
        if self._nursery is not None:
            self.holders.add(pid, self._nursery)
        return lease

    def touch(self) -> None:
        """Note that somebody asked for something."""
        self.last_activity = trio.current_time()

    def touch_if_lost(self) -> None:
        """Note that somebody still asks for what is lost, so that it is not forgotten yet."""
        if self.state is JobState.LOST:
            self.touch()

    # --- the life of a point -----------------------------------------------------------------

    def _fire(self, event: Event) -> None:
        """Change the state; an event that the state does not know raises and changes nothing."""
        self.state = TRANSITIONS[self.state, event]
        self._changed.set()
        if self.state is JobState.IDLE and event is not Event.REFUSED:
            self.lost = None
            self.generation += 1

    @property
    def launcher(self) -> Launcher:
        """What begins jobs."""
        return Launcher(self.domain, self.record, self.options, self.keeper)

    def _want(self, checkpoint: str | None = None) -> None:
        if self._closing or self._nursery is None:
            raise PointLost(self.domain.name, "the file system is being unmounted")
        self._fire(Event.WANTED)
        self._settled = trio.Event()
        self._end_wanted = trio.Event()
        self._error = None
        self._ended_by_guard = None
        self._nursery.start_soon(self._live, checkpoint)

    async def _wait_settled(self, patience: float = 0.0) -> None:
        """Wait until the job is neither starting nor stopping; raise what a start has met.

        That is for *patience* seconds, at least for `timeout=`.
        """
        # A begin behind a stopped QEMU can take for ever, and a reader in the kernel cannot be
        # killed before he is answered.
        settled = self._settled
        patience = max(patience, self.options.timeout)
        with trio.move_on_after(patience):
            await settled.wait()
            if self._error is not None and self.state is not JobState.RUNNING:
                raise self._error
            return
        raise PointLost(self.domain.name, f"the backup job is still {self.state.value} after {patience:g} s")

    async def _live(self, checkpoint: str | None) -> None:
        """Live through one point in time, from the first look to the job's end; a *checkpoint* may be made with it."""
        try:
            async with open_point(
                self.launcher,
                self.checkpoints,
                checkpoint=checkpoint,
                generation=self.generation,
                on_lost=self._lose,
            ) as point:
                self.point = point
                self.left_out = point.left_out
                self.refusal = self.last_loss = None
                self.touch()
                self._fire(Event.BEGAN)
                self._settled.set()
                log.info(
                    "%s: point in time %d begins%s (job %s, made in %.0f ms; %s)",
                    self.domain.name,
                    point.instant,
                    f", with checkpoint {point.checkpoint}" if point.checkpoint else "",
                    point.job_id,
                    point.took * 1000,
                    point.quiesced,
                )
                self._tell_unquiesced(point)
                self._check_guard()
                await self._end_wanted.wait()
                await trio.lowlevel.checkpoint()  # answers that are on their way belong to the point
        except BackupfsError as error:
            self._refused(error)
        except Exception:
            log.exception("%s: unexpected", self.domain.name)
            self._refused(PointLost(self.domain.name, "an unexpected error; see the log"))
        finally:
            self.point = None
            if self.state is JobState.STOPPING:
                self._fire(Event.ENDED)
            self._settled.set()
            self._changed.set()

    def _tell_unquiesced(self, point: Point) -> None:
        """Warn of a point that was not quiesced though it was to be; once a cause."""
        why = point.quiesced.why_not if point.quiesced.alarming else None
        if why is not None and why != self._unquiesced:
            log.warning("%s: the copy may need its journals replayed: %s", self.domain.name, why)
        self._unquiesced = why

    def _refused(self, error: BackupfsError) -> None:
        if self.state is not JobState.STARTING:
            log.error("%s", error)
            return
        if self._ended_by_guard is not None:  # what NBD says of it is but the consequence
            error = PointLost(self.domain.name, self._ended_by_guard[1])
        self._error = error
        if str(error) != self.refusal:  # once a cause, not once a look
            log.warning("no point in time: %s", error)
        error.told = True
        self.refusal = str(error)
        self._fire(Event.REFUSED)

    def _end(self, reason: str) -> None:
        """Begin to end the running point, in good order."""
        point = self.point
        assert point is not None
        assert self.state is JobState.RUNNING
        log.info("%s: point in time %d ends: %s", self.domain.name, point.instant, reason)
        point.over = True
        self._settled = trio.Event()
        self._error = None
        self._fire(Event.UNUSED)
        self.holders.forget_processes()
        self._end_wanted.set()

    def _lose(self, reason: str) -> None:
        """The job is dead: readers get EIO until nobody has asked for a while."""
        point = self.point
        if self.state is not JobState.RUNNING or point is None:
            return
        log.warning(
            "%s: point in time %d is lost: %s; readers get EIO until nobody has asked for %g s, or `backupfs release`",
            self.domain.name,
            point.instant,
            reason,
            QUIET_SECONDS,
        )
        point.over = True
        point.lost = self.lost = self.last_loss = reason
        self.touch()
        self._settled = trio.Event()
        self._error = None
        self._fire(Event.BROKE)
        self.holders.forget_processes()
        self._end_wanted.set()

    def end_by_guard(self, job_id: str, reason: str) -> None:
        """Hear from the watchdog that it ends a job for want of scratch space."""
        self._ended_by_guard = job_id, reason
        self._check_guard()

    def _check_guard(self) -> None:
        if self.point is not None and self._ended_by_guard is not None:
            job_id, reason = self._ended_by_guard
            if job_id == self.point.job_id:
                self._lose(reason)

    # --- what happens by itself --------------------------------------------------------------

    async def _listen(self) -> None:
        """Hear what happens to the domain."""
        async for happening in self.domain.happenings:
            if self.state is JobState.RUNNING:
                await self._hear(happening)

    async def _hear(self, happening: Happening) -> None:
        point = self.point
        assert point is not None
        if happening.kind is Kind.STOPPED:
            self._lose(f"the domain was {happening.detail}")
            return
        if happening.kind not in (Kind.JOB_ENDED, Kind.RECONNECTED):
            return  # for the guard
        # The job has ended, or may have while libvirt was away: ask what runs now.
        try:
            ours = await self._is_running(point)
        except BackupfsError as error:
            log.debug("%s: %s", self.domain.name, error)  # the next event or read will tell
            return
        if not ours and point is self.point:
            why = f": {happening.detail}" if happening.detail else ""
            self._lose(f"the backup job was ended from outside{why}")

    async def _is_running(self, point: Point) -> bool:
        if (xml := await self.domain.backup_xml()) is None:
            return False
        return parse_backup(xml).socket == point.socket

    async def _watch_the_clock(self) -> None:
        """End a point that nobody uses, forget a lost one that nobody asks for."""
        while True:
            with trio.move_on_at(self._deadline()):
                await self._changed.wait()
            self._changed = trio.Event()
            self._check_clock()

    def _deadline(self) -> float:
        """Say when, on trio's clock, time alone will change something if nothing else does."""
        waits = [math.inf]
        if self.state is JobState.LOST and self._settled.is_set():
            waits.append(QUIET_SECONDS)
        elif self.state is JobState.RUNNING:
            waits.append(self.options.idle_max or math.inf)
            if not self.holders.is_held:
                waits.append(self.options.idle or math.inf)
        return self.last_activity + min(waits)

    def _check_clock(self) -> None:
        if trio.current_time() < self._deadline():
            return
        quiet = trio.current_time() - self.last_activity
        if self.state is JobState.LOST:
            log.info("%s: the lost point in time is forgotten; the next look begins another", self.domain.name)
            self._fire(Event.QUIET)
        elif self.options.idle_max and quiet >= self.options.idle_max:
            self._lose(f"no request for {quiet:.0f} s (idle-max)")
        else:
            self._end(f"idle for {quiet:.0f} s")

    # --- its end ---------------------------------------------------------------------------------

    async def shut(self) -> None:
        """End the point whoever uses it, and begin no other; readers get EIO."""
        await self._close("the process was told to end")

    async def _close(self, reason: str = "unmounted") -> None:
        """End what runs, before the file system goes."""
        self._closing = True
        with trio.move_on_after(self.options.timeout) as scope:
            scope.shield = True
            while self.state is JobState.STARTING:
                with contextlib.suppress(BackupfsError):
                    await self._wait_settled()
            scope.deadline = trio.current_time() + max(self.options.timeout, ABORT_SECONDS + GONE_SECONDS)
            if self.state is JobState.RUNNING:
                self._end(reason)
            await self._settled.wait()
            return
        log.error(
            "%s: the backup job is still %s; it stays recorded, the next mount will end it",
            self.domain.name,
            self.state.value,
        )


@contextlib.asynccontextmanager
async def open_job(
    domain: Domain, record: State, options: Options, keeper: Keeper, checkpoints: Checkpoints
) -> AsyncIterator[Job]:
    """Watch over the domain's backup job; on the way out, end it."""
    job = Job(domain, record, options, keeper, checkpoints)
    job._settled.set()
    keeper.on_lost = job.end_by_guard
    async with trio.open_nursery() as nursery:
        job._nursery = nursery
        nursery.start_soon(job._listen)
        nursery.start_soon(job._watch_the_clock)
        try:
            yield job
        finally:
            await job._close()
            job.holders.forget_processes()
            nursery.cancel_scope.cancel()
