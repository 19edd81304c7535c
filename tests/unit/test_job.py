# SPDX-License-Identifier: GPL-3.0-or-later
"""The job's states on a clock of the tests' own; the point behind them is a stand-in."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from backupfs import job as job_module
from backupfs.bases import Bases
from backupfs.errors import BadCheckpointName, DomainNotRunning, NotBegun, PointInUse, PointLost, PointOver
from backupfs.forms import Forms
from backupfs.job import QUIET_SECONDS, TRANSITIONS, Event, Job, JobState, open_job
from backupfs.link import Happening, Kind
from backupfs.options import BackingName, Options
from backupfs.point import Point
from backupfs.quiesce import Quiesced
from backupfs.tracking import Concluded


@dataclass(eq=False)
class Backend:
    """What stands for libvirt: says whether a begin works, and how many jobs run."""

    error: Exception | None = None
    running: int = 0
    begun: int = 0
    slow: float = 0.0
    slow_to_end: float = 0.0
    name: str = "web01"
    on_lost: Callable[[str], None] | None = None
    last_instant: int = 0
    send: Any = None
    happenings: Any = field(default=None)
    quiesced: Quiesced = field(default_factory=Quiesced)

    def __post_init__(self) -> None:
        self.send, self.happenings = trio.open_memory_channel[Happening](100)

    async def backup_xml(self) -> str | None:
        return f"<domainbackup mode='pull'><server socket='/s{self.begun}'/></domainbackup>" if self.running else None

    @contextlib.asynccontextmanager
    async def open_point(
        self,
        launcher: Any,
        checkpoints: Any,
        *,
        checkpoint: str | None,
        generation: int,
        on_lost: Callable[[str], None],
    ) -> AsyncIterator[Point]:
        await trio.sleep(self.slow)
        if self.error is not None:
            raise self.error
        self.running += 1
        self.begun += 1
        self.on_lost = on_lost
        self.last_instant = self.begun
        try:
            yield Point(
                generation=generation, domain=self.name, job_id="j", socket=f"/s{self.begun}", began=time.time(),
                took=0.0, instant=self.begun, images={}, newest={},
                forms=Forms(self.name, "", self.begun, "<domain/>", {}, {}, {}), checkpoint=checkpoint,
                bases=Bases(self.name, "", self.begun, BackingName(), {}, {}, {}, Concluded({}, {})),
                exports={}, scratches={}, left_out={}, quiesced=self.quiesced,
            )  # fmt: skip
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.slow_to_end)
            self.running -= 1


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend()
    monkeypatch.setattr(job_module, "open_point", made.open_point)
    return made


def opened(backend: Backend, **options: Any) -> contextlib.AbstractAsyncContextManager[Job]:
    return open_job(backend, backend, Options(**options), backend, backend)  # type: ignore[arg-type]


async def test_all_who_look_share_one_point(backend: Backend, autojump_clock: Any) -> None:
    backend.slow = 2
    async with opened(backend) as job:
        seen: list[Point] = []

        async def look() -> None:
            seen.append(await job.look())

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(look)
        assert len({id(point) for point in seen}) == 1
        assert backend.begun == 1
    assert backend.running == 0


async def test_release_and_unmount_wait_for_an_end_that_takes_a_minute_and_readers_do_not(
    backend: Backend, autojump_clock: Any
) -> None:
    # Libvirt 9.0 needs so long after a reset of the guest.
    backend.slow_to_end = 60.0
    async with opened(backend, timeout=5.0) as job:
        await job.look()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(job.release)
            await trio.testing.wait_all_tasks_blocked()
            begun = trio.current_time()
            with pytest.raises(PointLost, match="still stopping after 5 s"):
                await job.look()
            assert trio.current_time() - begun == 5.0
        assert job.state is JobState.IDLE
        assert trio.current_time() - begun == 60.0
        await job.look()
    assert backend.running == 0


async def test_an_unused_point_ends_and_the_next_has_another_generation(backend: Backend, autojump_clock: Any) -> None:
    async with opened(backend, idle=10.0) as job:
        first = await job.look()
        assert first.generation == job.generation
        await trio.sleep(9)
        job.touch()
        await trio.sleep(9)
        assert job.state is JobState.RUNNING
        await trio.sleep(2)
        assert job.state is JobState.IDLE
        assert first.over
        assert job.generation == first.generation + 1
        with pytest.raises(PointOver):
            job.lease(first, pid=0)
        second = await job.look()
        assert second.generation == job.generation


async def test_an_open_file_holds_the_point_until_idle_max(
    backend: Backend, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    async with opened(backend, idle=10.0, idle_max=100.0) as job:
        point = await job.look()
        lease = job.lease(point, pid=0)
        await trio.sleep(90)
        lease.check()
        await trio.sleep(99)
        assert job.state is JobState.RUNNING
        await trio.sleep(2)
        assert job.state is JobState.LOST
        with pytest.raises(PointLost, match="idle-max"):
            lease.check()
        lease.release()
        lease.release()
    assert "idle-max" in logged_warnings[0]
    logged_warnings.clear()


async def test_a_closed_file_lets_the_point_end_at_once_if_it_was_idle_for_long(
    backend: Backend, autojump_clock: Any
) -> None:
    async with opened(backend, idle=10.0) as job:
        lease = job.lease(await job.look(), pid=0)
        await trio.sleep(500)
        assert job.state is JobState.RUNNING
        lease.release()
        await trio.sleep(9)
        assert job.state is JobState.RUNNING
        await trio.sleep(2)
        assert job.state is JobState.IDLE


async def test_a_lost_point_is_forgotten_when_nobody_has_asked_for_a_while(
    backend: Backend, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    async with opened(backend) as job:
        point = await job.look()
        await backend.send.send(Happening(Kind.STOPPED, "destroyed"))
        await trio.testing.wait_all_tasks_blocked()
        assert (job.state, point.lost) == (JobState.LOST, "the domain was destroyed")
        assert backend.running == 0
        for _ in range(3):
            await trio.sleep(QUIET_SECONDS - 1)
            with pytest.raises(PointLost, match="destroyed"):
                await job.look()
        await trio.sleep(QUIET_SECONDS + 1)
        assert job.state is JobState.IDLE
        assert (await job.look()).generation == point.generation + 1
    assert "is lost: the domain was destroyed" in logged_warnings[0]
    logged_warnings.clear()


async def test_the_end_of_another_job_is_not_ours(backend: Backend, autojump_clock: Any) -> None:
    async with opened(backend) as job:
        await job.look()
        await backend.send.send(Happening(Kind.JOB_ENDED))
        await trio.testing.wait_all_tasks_blocked()
        assert job.state is JobState.RUNNING


async def test_a_job_that_vanished_is_lost(backend: Backend, autojump_clock: Any, logged_warnings: list[str]) -> None:
    async with opened(backend) as job:
        await job.look()
        backend.running = 0
        await backend.send.send(Happening(Kind.RECONNECTED))
        await trio.testing.wait_all_tasks_blocked()
        assert job.state is JobState.LOST
        assert await job.release() == 0
        assert job.state is JobState.IDLE
        backend.running = 0
        await job.look()
    assert "ended from outside" in logged_warnings[0]
    logged_warnings.clear()


async def test_a_refused_begin_is_told_once_and_tried_again(
    backend: Backend, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    backend.error = DomainNotRunning("web01", "shut off")
    async with opened(backend) as job:
        for _ in range(3):
            with pytest.raises(DomainNotRunning):
                await job.look()
        assert job.state is JobState.IDLE
        assert len(logged_warnings) == 1
        logged_warnings.clear()
        backend.error = None
        assert (await job.look()).generation == 1
        assert job.refusal is None


async def test_an_unexpected_error_is_logged_and_not_for_ever(
    backend: Backend, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    backend.error = ValueError("bug")
    async with opened(backend) as job:
        with pytest.raises(PointLost, match="unexpected"):
            await job.look()
        assert "ValueError: bug" in logged_warnings[0]
        logged_warnings.clear()
        backend.error = None
        await job.look()


async def test_a_begin_that_takes_long_does_not_hold_its_reader(backend: Backend, autojump_clock: Any) -> None:
    backend.slow = 50
    async with opened(backend, timeout=5.0) as job:
        begun = trio.current_time()
        with pytest.raises(PointLost, match="still starting"):
            await job.look()
        assert trio.current_time() - begun == pytest.approx(5)
        await trio.sleep(50)
        assert job.state is JobState.RUNNING


async def test_begin_by_command_only(backend: Backend, autojump_clock: Any) -> None:
    async with opened(backend, begin="command") as job:
        with pytest.raises(NotBegun):
            await job.look()
        point = await job.begin()
        assert await job.begin() is point
        assert await job.look() is point
        lease = job.lease(point, pid=0)
        assert await job.release() == 1
        assert await job.release() == 0
        with pytest.raises(PointOver):
            lease.check()
        with pytest.raises(NotBegun):
            await job.look()


async def test_shut_ends_the_point_and_begins_no_other(backend: Backend, autojump_clock: Any) -> None:
    async with opened(backend) as job:
        lease = job.lease(await job.look(), pid=0)
        assert await job.holders.settle()
        await job.shut()
        assert backend.running == 0
        with pytest.raises(PointOver):
            lease.check()
        with pytest.raises(PointLost, match="being unmounted"):
            await job.look()


def test_an_event_that_a_state_does_not_know_changes_nothing() -> None:
    for state in JobState:
        for event in Event:
            if (state, event) not in TRANSITIONS:
                made: Any = Job.__new__(Job)
                made.state = state
                with pytest.raises(KeyError):
                    Job._fire(made, event)
                assert made.state is state


@pytest.mark.expects_warning
async def test_why_the_guest_was_not_frozen_is_told_once_a_cause(
    backend: Backend, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    async with opened(backend) as job:
        for why, alarming in (("hung", True), ("hung", True), ("none there", False), ("hung", True), ("gone", True)):
            backend.quiesced = Quiesced(why_not=why, alarming=alarming)
            await job.look()
            await job.release()
    told = [line.rpartition(": ")[2] for line in logged_warnings]
    assert told == ["hung", "hung", "gone"], "again only after it was well in between"


@pytest.mark.expects_warning
async def test_guard_that_ends_the_job_loses_the_point_with_its_reason(backend: Backend, autojump_clock: Any) -> None:
    async with opened(backend) as job:
        point = await job.look()
        job.end_by_guard("another job", "no room")
        assert job.state is JobState.RUNNING
        job.end_by_guard(point.job_id, "no room")
        assert job.state is JobState.LOST
        assert job.lost == "no room"
        with pytest.raises(PointLost, match="no room"):
            await job.look()
        await job.release()
        assert (job.lost, job.last_loss) == (None, "no room"), "told until the next point begins"
        await job.look()
        assert job.last_loss is None


@pytest.mark.expects_warning
@pytest.mark.parametrize("fails", [True, False])
async def test_guard_that_ends_the_job_while_the_point_begins_is_why_it_is_lost(
    backend: Backend, autojump_clock: Any, fails: bool
) -> None:
    backend.slow = 2
    async with opened(backend) as job, trio.open_nursery() as nursery:

        async def look() -> None:
            with pytest.raises(PointLost, match="no room"):
                await job.look()

        nursery.start_soon(look)
        await trio.sleep(1)
        if fails:  # as when NBD finds nobody
            backend.error = DomainNotRunning("web01", "gone")
        job.end_by_guard("j", "no room")
    if not fails:
        assert job.lost == "no room"


async def test_what_the_guard_wants_to_know_changes_nothing_here(backend: Backend) -> None:
    async with opened(backend) as job:
        await job.look()
        backend.running = 0  # were it looked at, the point would be lost
        backend.send.send_nowait(Happening(Kind.IO_ERROR, "enospc"))
        backend.send.send_nowait(Happening(Kind.SCRATCH_GREW, "vda[2]"))
        await trio.testing.wait_all_tasks_blocked()
        assert job.state is JobState.RUNNING
        backend.running = 1


@pytest.fixture
def preflights(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of checkpoints that were looked at; what is put in as `error` is raised."""
    seen: list[str] = []

    async def preflight(launcher: Any, checkpoint: str, checkpoints: Any) -> None:
        seen.append(checkpoint)
        if checkpoint == "bad":
            raise BadCheckpointName("web01", checkpoint, "it is bad")

    monkeypatch.setattr(job_module, "preflight", preflight)
    return seen


async def test_mkdir_ends_the_one_point_and_begins_the_next(
    backend: Backend, preflights: list[str], autojump_clock: Any
) -> None:
    async with opened(backend, begin="mkdir") as job:
        with pytest.raises(NotBegun, match="mkdir checkpoints/NAME"):
            await job.look()
        await job.make_checkpoint("one", pid=os.getpid())
        first = await job.look()
        assert first.checkpoint == "one"
        await job.make_checkpoint("two", pid=os.getpid())
        assert first.over
        assert (await job.look()).checkpoint == "two"
        assert backend.running == 1
        assert preflights == ["one", "two"]


async def test_mkdir_that_cannot_be_leaves_the_point_alone(
    backend: Backend, preflights: list[str], autojump_clock: Any
) -> None:
    async with opened(backend) as job:
        point = await job.look()
        with pytest.raises(BadCheckpointName):
            await job.make_checkpoint("bad", pid=os.getpid())
        lease = job.lease(point, pid=0)
        with pytest.raises(PointInUse, match="not known"):
            await job.make_checkpoint("one", pid=os.getpid())
        assert await job.look() is point
        lease.release()
        await job.make_checkpoint("one", pid=os.getpid())
        assert point.over


@pytest.mark.expects_warning
async def test_mkdir_is_refused_while_a_lost_point_is_not_forgotten(
    backend: Backend, preflights: list[str], autojump_clock: Any
) -> None:
    async with opened(backend) as job:
        await job.look()
        assert backend.on_lost is not None
        backend.on_lost("gone")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(PointLost):
            await job.make_checkpoint("one", pid=os.getpid())
        await job.release()
        backend.error = DomainNotRunning("web01", "shut off")
        with pytest.raises(DomainNotRunning):
            await job.make_checkpoint("one", pid=os.getpid())
        assert job.state is JobState.IDLE
