# SPDX-License-Identifier: GPL-3.0-or-later
"""What a killed process of ours has left, cleared away; libvirt and the agent are stand-ins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backupfs.errors import AgentUnavailable, LibvirtTimeout, NotThawed
from backupfs.leftover import clear_left_over
from backupfs.state import JobRecord, State, open_state

RECORD = JobRecord("j1", "/s-j1", (), 3, 1.5)
FROZEN = dataclasses.replace(RECORD, frozen=True)
GONE = AgentUnavailable("web01", "reach the guest agent", "not connected")


@dataclass(eq=False)
class Backend:
    running: bool = True
    ends: bool = True
    answers: bool = True
    calls: list[str] = field(default_factory=list)
    name: str = "web01"
    is_local: bool = False

    async def is_alive(self) -> bool:
        return True

    async def live_xml(self) -> str:
        return "<domain id='3'/>"

    async def set_agent_timeout(self, _seconds: int | None) -> None: ...

    async def thaw(self) -> int:
        if not self.answers:
            raise GONE
        self.calls.append("thawed")
        return 1

    async def backup_xml(self) -> str | None:
        return "<domainbackup mode='pull'><server socket='/s-j1'/></domainbackup>" if self.running else None

    async def abort_backup(self, socket: str) -> bool:
        assert socket == RECORD.socket
        self.calls.append("aborted")
        self.running = not self.ends
        return True


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[State]:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    with open_state("host", "uuid", domain="web01", holder="/mnt") as opened:
        opened.record_job(FROZEN)
        yield opened


async def clear(backend: Backend, state: State) -> None:
    await clear_left_over(backend, state)  # type: ignore[arg-type]


async def test_a_guest_left_frozen_is_thawed_before_the_job_is_ended(state: State) -> None:
    backend = Backend()
    await clear(backend, state)
    assert backend.calls == ["thawed", "aborted"]
    assert state.job is None


@pytest.mark.expects_warning
async def test_a_guest_that_stays_frozen_stays_recorded_until_it_is_thawed(state: State, autojump_clock: Any) -> None:
    backend = Backend(answers=False)
    for _ in range(2):
        with pytest.raises(NotThawed, match="not connected"):
            await clear(backend, state)
        assert backend.calls == ["aborted"], "the job is ended all the same, once"
        assert state.job == FROZEN
    backend.answers = True
    backend.calls.clear()
    await clear(backend, state)
    assert backend.calls[0] == "thawed"
    assert state.job is None


@pytest.mark.expects_warning
async def test_a_job_that_does_not_end_stays_recorded(state: State, autojump_clock: Any) -> None:
    with pytest.raises(LibvirtTimeout, match="does not end"):
        await clear(Backend(ends=False), state)
    assert state.job == RECORD
