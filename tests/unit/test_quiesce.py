# SPDX-License-Identifier: GPL-3.0-or-later
"""What is done around a begin, on a clock of the tests' own; a stand-in answers for the guest agent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from backupfs.domain import AgentState
from backupfs.errors import (
    AccessRefused,
    AgentRefused,
    AgentUnavailable,
    BackupfsError,
    DomainNotRunning,
    LibvirtRefused,
    LibvirtUnavailable,
    NoSuchDomain,
    NotQuiesced,
    NotThawed,
)
from backupfs.options import Quiesce
from backupfs.quiesce import (
    AGENT_SECONDS,
    FROZEN_SECONDS,
    LAST_THAW_SECONDS,
    LIBVIRT_SECONDS,
    THAW_SECONDS,
    Quiesced,
    missing_mounts,
    open_freezer,
    shortfall,
    thaw_left_over,
)
from backupfs.state import JobRecord, State, open_state

RECORD = JobRecord("j1", "/s", ("/i",), 3, 1.5)
AUTO, REQUIRE = Quiesce(), Quiesce("require")
GONE = AgentUnavailable("web01", "reach the guest agent", "not connected")


@dataclass(eq=False)
class Backend:
    """What stands for libvirt, the agent and the guest: each call is noted, and answered as told."""

    calls: list[Any] = field(default_factory=list)
    state: AgentState | Exception = AgentState.READY
    count: int | Exception = 2
    freezes: float = 0.01
    begins: float = 0.06
    begin_error: Exception | None = None
    thaws: list[Exception] = field(default_factory=list)  # before it works
    alive: bool = True
    xml: str | Exception = "<domain id='3'/>"
    reset_error: Exception | None = None
    name: str = "web01"

    async def set_agent_timeout(self, seconds: int | None) -> None:
        self.calls.append(seconds)
        if seconds is None and self.reset_error:
            raise self.reset_error

    async def agent_state(self) -> AgentState:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    async def mount_points(self) -> frozenset[str]:
        return frozenset({"/", "/srv"})

    async def freeze(self, mounts: tuple[str, ...]) -> int:
        self.calls.append(("freeze", *mounts))
        await trio.sleep(self.freezes)
        if isinstance(self.count, Exception):
            raise self.count
        return self.count

    async def begin(self) -> None:
        self.calls.append("begin")
        await trio.sleep(self.begins)
        self.calls.append("begun")
        if self.begin_error:
            raise self.begin_error

    async def thaw(self) -> int:
        self.calls.append("thaw")
        await trio.sleep(0)
        if self.thaws:
            raise self.thaws.pop(0)
        return 2

    async def is_alive(self) -> bool:
        return self.alive

    async def live_xml(self) -> str:
        if isinstance(self.xml, Exception):
            raise self.xml
        return self.xml


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    with open_state("host", "uuid", domain="web01", holder="/mnt") as opened:
        opened.record_job(RECORD)
        yield opened


async def run(backend: Backend, state: State, wanted: Quiesce = AUTO) -> Quiesced:
    async with open_freezer(backend, state, wanted) as freezer:  # type: ignore[arg-type]
        return await freezer.begin(backend.begin)


async def test_nothing_but_the_begin_lies_between_freeze_and_thaw(state: State, autojump_clock: Any) -> None:
    backend = Backend()
    found = await run(backend, state)
    assert backend.calls == [AGENT_SECONDS, ("freeze",), "begin", "begun", "thaw", None]
    assert found.is_sure
    assert found.frozen == pytest.approx(0.07)
    assert str(found) == "2 file systems frozen for 70 ms"
    assert state.job == RECORD


async def test_the_record_says_that_the_guest_is_frozen_while_it_is(state: State, autojump_clock: Any) -> None:
    backend = Backend()
    told = []

    async def begin() -> None:
        with open_again(state) as record:
            told.append(record)

    async with open_freezer(backend, state, AUTO) as freezer:  # type: ignore[arg-type]
        await freezer.begin(begin)
    assert told == [dataclasses.replace(RECORD, frozen=True)]


class open_again:
    """What another process finds in the state folder."""

    def __init__(self, state: State) -> None:
        self.state = State(state.folder)

    def __enter__(self) -> JobRecord | None:
        self.state._load()
        return self.state.job

    def __exit__(self, *_: object) -> None: ...


async def test_no_is_never(state: State) -> None:
    backend = Backend(begins=0)
    found = await run(backend, state, Quiesce("no"))
    assert backend.calls == ["begin", "begun"]
    assert found == Quiesced()
    assert str(found) == "not frozen"
    assert not found.is_sure


@pytest.mark.parametrize(
    ("answer", "reason", "alarming"),
    [
        (GONE, "not connected", True),
        (AgentUnavailable("web01", "x", "not configured", configured=False), "not configured", False),
        (AccessRefused("web01", "x", "no permission"), "no permission", True),
        (AgentState.FROZEN, "somebody else has frozen the guest, and has to thaw it", True),
    ],
)
async def test_an_agent_that_will_not_freeze(
    state: State, answer: Any, reason: str, alarming: bool, autojump_clock: Any
) -> None:
    backend = Backend(state=answer)
    found = await run(backend, state)
    assert found == Quiesced(why_not=reason, alarming=alarming)
    assert str(found) == f"not frozen: {reason}"
    assert backend.calls == [AGENT_SECONDS, "begin", "begun", None]
    backend.calls.clear()
    with pytest.raises(NotQuiesced, match=reason):
        await run(backend, state, REQUIRE)
    assert backend.calls == [AGENT_SECONDS, None]


async def test_without_libvirt_nothing_goes_on(state: State) -> None:
    with pytest.raises(LibvirtUnavailable):
        await run(Backend(state=LibvirtUnavailable("qemu:///system", "gone")), state)


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_refused_freeze_needs_no_thaw(state: State, frozen: bool, autojump_clock: Any) -> None:
    backend = Backend(count=AgentRefused("web01", "x", "a hook failed", frozen))
    found = await run(backend, state)
    assert found.why_not == ("somebody else has frozen the guest, and has to thaw it" if frozen else "a hook failed")
    assert "thaw" not in backend.calls
    assert "begun" in backend.calls
    assert state.job == RECORD
    with pytest.raises(NotQuiesced):
        await run(backend, state, REQUIRE)
    assert backend.calls.count("begin") == 1


@pytest.mark.parametrize("error", [GONE, None, LibvirtUnavailable("u", "gone")])
async def test_a_freeze_without_an_answer_is_thawed_before_the_begin(
    state: State, error: Exception | None, autojump_clock: Any
) -> None:
    backend = Backend(count=error) if error else Backend(freezes=1e9)
    before = trio.current_time()
    found = await run(backend, state)
    assert backend.calls == [AGENT_SECONDS, ("freeze",), "thaw", "begin", "begun", None]
    assert trio.current_time() - before < AGENT_SECONDS + LIBVIRT_SECONDS + 1
    assert found.why_not
    assert found.alarming
    assert state.job == RECORD
    with pytest.raises(NotQuiesced):
        await run(backend, state, REQUIRE)
    assert backend.calls[-2:] == ["thaw", None]


async def test_an_agent_that_froze_none_is_not_told_to_thaw(state: State, autojump_clock: Any) -> None:
    backend = Backend(count=0)
    found = await run(backend, state)
    assert "no file system" in (found.why_not or "")
    assert not found.alarming
    assert "thaw" not in backend.calls
    assert state.job == RECORD


async def test_fewer_than_were_listed_is_no_freeze(state: State, autojump_clock: Any) -> None:
    backend = Backend(count=1)
    with pytest.raises(NotQuiesced, match="only 1 of the 2 file systems"):
        await run(backend, state, Quiesce("require", ("/", "/srv")))
    assert backend.calls == [AGENT_SECONDS, ("freeze", "/", "/srv"), "thaw", None]


async def test_a_listed_mount_point_that_is_none_is_told_before_the_freeze(state: State) -> None:
    backend = Backend()
    with pytest.raises(NotQuiesced, match="nothing is mounted at /x, /y in the guest"):
        await run(backend, state, Quiesce("require", ("/x", "/srv", "/y")))
    assert backend.calls == [AGENT_SECONDS, None]
    assert missing_mounts(AUTO, frozenset()) is None


def test_what_is_frozen_is_counted() -> None:
    assert shortfall(AUTO, 0)
    assert shortfall(AUTO, 1) is None
    assert shortfall(Quiesce("require", ("/a", "/b")), 2) is None
    assert str(Quiesced(0.0101, 1)) == "1 file system frozen for 10 ms"


async def test_a_begin_that_fails_is_followed_by_the_thaw(state: State, autojump_clock: Any) -> None:
    backend = Backend(begin_error=LibvirtRefused("web01", "begin", "no"))
    with pytest.raises(LibvirtRefused, match="no"):
        await run(backend, state)
    assert backend.calls[-2:] == ["thaw", None]
    assert state.job == RECORD


async def test_a_begin_that_takes_too_long_goes_on_thawed(state: State, autojump_clock: Any) -> None:
    backend = Backend(begins=60)
    found = await run(backend, state)
    assert backend.calls == [AGENT_SECONDS, ("freeze",), "begin", "thaw", "begun", None]
    assert found.frozen == pytest.approx(FROZEN_SECONDS, abs=0.1)
    assert not found.is_sure
    assert found.alarming
    assert str(found).startswith("2 file systems frozen for 10010 ms, but the begin took more than 10 s")
    with pytest.raises(NotQuiesced, match="more than 10 s"):
        await run(backend, state, REQUIRE)


async def test_a_begin_that_is_given_up_is_followed_by_the_thaw(state: State, autojump_clock: Any) -> None:
    backend = Backend(begins=1e9)
    with trio.move_on_after(1) as scope:
        await run(backend, state)
    assert scope.cancelled_caught
    assert backend.calls == [AGENT_SECONDS, ("freeze",), "begin", "thaw", None]
    assert state.job == RECORD


async def test_a_freeze_that_is_given_up_half_way_is_thawed(state: State, autojump_clock: Any) -> None:
    backend = Backend(freezes=5)
    with trio.move_on_after(1):
        await run(backend, state)
    assert "thaw" in backend.calls
    assert backend.calls.index(("freeze",)) < backend.calls.index("thaw")
    assert state.job == RECORD


async def test_a_thaw_is_tried_again(state: State, autojump_clock: Any) -> None:
    backend = Backend(thaws=[GONE] * 5)
    found = await run(backend, state)
    assert found.is_sure
    assert backend.calls.count("thaw") == 6
    assert state.job == RECORD


@pytest.mark.expects_warning
async def test_a_thaw_that_fails_is_an_error_with_the_cure(
    state: State, autojump_clock: Any, logged_warnings: list[str]
) -> None:
    backend = Backend(thaws=[GONE] * 10000)
    before = trio.current_time()
    with pytest.raises(NotThawed, match=r"not connected; restart .* until `virsh domfsthaw web01` works"):
        await run(backend, state)
    assert THAW_SECONDS <= trio.current_time() - before < THAW_SECONDS + 1
    frozen = dataclasses.replace(RECORD, frozen=True)
    assert state.job == frozen
    # Whoever clears up tries before and after the job's end.
    assert len(logged_warnings) == 1, "told at once: the guest stands still"
    assert await thaw_left_over(backend, state, frozen) is not None  # type: ignore[arg-type]
    assert len(logged_warnings) == 1
    before = trio.current_time()
    await thaw_left_over(backend, state, frozen, last=True)  # type: ignore[arg-type]
    assert trio.current_time() - before == pytest.approx(LAST_THAW_SECONDS, abs=1)
    assert len(logged_warnings) == 2
    assert all("may still be frozen" in line for line in logged_warnings)
    backend.thaws[:] = [LibvirtUnavailable("u", "gone")]
    await thaw_left_over(backend, state, frozen, last=True)  # type: ignore[arg-type]
    assert state.job == RECORD


@pytest.mark.expects_warning
async def test_no_job_begins_over_a_freeze_that_cannot_be_undone(state: State, autojump_clock: Any) -> None:
    backend = Backend(count=GONE, thaws=[GONE] * 10000)
    with pytest.raises(NotThawed):
        await run(backend, state)
    assert "begin" not in backend.calls
    assert state.job is not None
    assert state.job.frozen


@pytest.mark.parametrize("error", [NoSuchDomain("web01", "u"), DomainNotRunning("web01", "shut off")])
async def test_a_guest_that_has_gone_is_not_frozen(state: State, error: BackupfsError, autojump_clock: Any) -> None:
    await run(Backend(thaws=[error]), state)
    assert state.job == RECORD


async def test_a_left_over_freeze_is_thawed_and_the_time_out_taken_back(state: State) -> None:
    frozen = dataclasses.replace(RECORD, frozen=True)
    state.record_job(frozen)
    backend = Backend(reset_error=LibvirtRefused("web01", "x", "y"))
    await thaw_left_over(backend, state, frozen)  # type: ignore[arg-type]
    assert backend.calls == ["thaw", None]
    assert state.job == RECORD


async def test_a_left_over_freeze_is_thawed_though_libvirt_does_not_say_what_runs(state: State) -> None:
    frozen = dataclasses.replace(RECORD, frozen=True)
    state.record_job(frozen)
    backend = Backend(xml=LibvirtUnavailable("u", "gone"))
    await thaw_left_over(backend, state, frozen)  # type: ignore[arg-type]
    assert backend.calls == ["thaw", None]


@pytest.mark.expects_warning
async def test_a_state_folder_that_breaks_while_frozen_does_not_keep_the_job_from_its_end(
    state: State, logged_warnings: list[str], autojump_clock: Any
) -> None:
    backend = Backend()

    async def begin() -> None:
        (state.folder / "job.new").mkdir()

    async with open_freezer(backend, state, AUTO) as freezer:  # type: ignore[arg-type]
        assert (await freezer.begin(begin)).is_sure
    assert "thaw" in backend.calls
    assert "cannot write job" in logged_warnings[0]


async def test_what_was_not_frozen_by_us_is_not_thawed(state: State) -> None:
    backend = Backend()
    await thaw_left_over(backend, state, RECORD)  # type: ignore[arg-type]
    assert backend.calls == []


@pytest.mark.parametrize(
    "backend", [Backend(alive=False), Backend(xml="<domain id='4'/>"), Backend(xml=NoSuchDomain("web01", "u"))]
)
async def test_a_guest_started_since_is_not_thawed(state: State, backend: Backend) -> None:
    frozen = dataclasses.replace(RECORD, frozen=True)
    state.record_job(frozen)
    await thaw_left_over(backend, state, frozen)  # type: ignore[arg-type]
    assert "thaw" not in backend.calls
    assert state.job == RECORD
