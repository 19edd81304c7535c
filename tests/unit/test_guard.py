# SPDX-License-Identifier: GPL-3.0-or-later
"""The guard's decisions in every order that events may come in; libvirt and the file system are stand-ins."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from backupfs import guard as guard_module
from backupfs.domain import JobStatistics
from backupfs.errors import LibvirtUnavailable, NoSuchDomain
from backupfs.guard import Guard
from backupfs.link import Happening, Kind
from backupfs.scratch import GIB, MIB, Reserve, Room
from backupfs.state import JobRecord

RECORD = JobRecord("j", "/s-j", ("/scratch/a-j", "/scratch/b-j"), 1, 0.0)
XML = (
    "<domainbackup mode='pull'><server socket='/s-j'/><disks><disk name='vda' index='2'><scratch file='/scratch/a-j'/>"
    "</disk><disk name='vdb' index='3'><scratch file='/scratch/b-j'/></disk></disks></domainbackup>"
)


@dataclass(eq=False)
class Lab:
    """Stands for libvirt, the scratch file system, and the mount that is told."""

    free: int | None = 50 * GIB
    name: str = "web01"
    xml: str | None = XML
    paused: bool = False
    abort_fails: int = 0
    gone: bool = False
    resumes: int = 0
    aborts: list[str] = field(default_factory=list)
    thresholds: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def measure(self, folder: str) -> Room:
        assert folder == "/scratch"
        if self.free is None:
            raise OSError(5, "Input/output error")
        return Room(1, 100 * GIB, self.free)

    async def is_paused_by_error(self) -> bool:
        return self.paused

    async def job_statistics(self) -> JobStatistics | None:
        return JobStatistics("backup", 3 * MIB, GIB) if self.xml else None

    async def backup_xml(self) -> str | None:
        if self.gone:
            raise NoSuchDomain("web01", "")
        return self.xml

    async def set_threshold(self, node: str, size: int) -> None:
        self.thresholds[node] = size

    async def abort_backup(self, socket: str) -> bool:
        if self.abort_fails:
            self.abort_fails -= 1
            raise LibvirtUnavailable("", "away")
        self.aborts.append(socket)
        self.xml = None
        return True

    async def resume_after_error(self) -> bool:
        if not self.paused:
            return False
        self.paused = False
        self.resumes += 1
        return True


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    made = Lab()
    monkeypatch.setattr(guard_module, "measure", made.measure)
    monkeypatch.setattr(guard_module, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(guard_module, "STATISTICS_SECONDS", 0.05)
    return made


def make_guard(lab: Lab, reserve: int = GIB) -> Guard:
    domain: Any = lab
    guard = Guard(
        domain,
        RECORD,
        Reserve(size=reserve),
        say=lambda level, text: lab.said.append(f"{logging.getLevelName(level)} {text}"),
        lose=lambda job_id, reason: lab.lost.append(f"{job_id}: {reason}"),
    )
    guard.job_runs()
    return guard


async def until(true: Any) -> None:
    with trio.fail_after(5):
        while not true():
            await trio.sleep(0.005)


async def test_room_that_runs_short_ends_the_job_and_says_why(lab: Lab) -> None:
    guard = make_guard(lab)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await until(lambda: lab.thresholds)
        assert not lab.aborts
        lab.free = GIB - 1
        guard.hear(Happening(Kind.SCRATCH_GREW, "vda[2]"))  # or else it would look a second later
        await until(lambda: lab.aborts)
        assert guard.is_ending
    assert lab.aborts == ["/s-j"]
    assert len(lab.lost) == 1
    assert "less than the reserve" in lab.lost[0]
    assert "3.0 MiB were saved" in lab.lost[0]
    assert lab.resumes == 0
    assert lab.said == []


async def test_events_are_asked_for_half_way_for_each_disk(lab: Lab) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_guard(lab).watch)
        await until(lambda: len(lab.thresholds) == 2)
        nursery.cancel_scope.cancel()
    assert lab.thresholds == {"vda[2]": 49 * GIB // 4, "vdb[3]": 49 * GIB // 4}


async def test_libvirt_is_not_asked_for_figures_before_the_job_runs(lab: Lab) -> None:
    guard = make_guard(lab)
    guard._begun = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await trio.sleep(0.2)
        assert not lab.thresholds
        guard.job_runs()
        await until(lambda: lab.thresholds)
        nursery.cancel_scope.cancel()


async def test_pause_while_the_job_is_being_ended_is_undone(lab: Lab) -> None:
    guard = make_guard(lab)
    lab.free = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await until(lambda: lab.aborts)
        lab.paused = True  # what QEMU told before the end reaches us after it
        guard.hear(Happening(Kind.IO_ERROR, "enospc"))
        guard.hear(Happening(Kind.PAUSED_BY_ERROR))
    assert lab.resumes == 1
    assert "WARNING web01: the guest was paused for want of scratch space, and was resumed" in lab.said[0]


@pytest.mark.parametrize("told", [Kind.IO_ERROR, Kind.PAUSED_BY_ERROR, Kind.RECONNECTED])
async def test_full_scratch_is_the_reason_though_no_reserve_was_asked_for(lab: Lab, told: Kind) -> None:
    guard = make_guard(lab, reserve=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await until(lambda: lab.thresholds)
        lab.free, lab.paused = 4096, True
        guard.hear(Happening(told))
    assert lab.aborts == ["/s-j"]
    assert "no room left" in lab.lost[0] or "fills by" in lab.lost[0]
    assert lab.resumes == 1


async def test_guest_paused_for_a_full_disk_of_its_own_stays_so_whatever_happens_later(lab: Lab) -> None:
    guard = make_guard(lab)
    lab.paused = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await until(lambda: guard._paused_by_other)
        assert not lab.aborts
        lab.free = 0
        guard.hear(Happening(Kind.SCRATCH_GREW))
    assert lab.aborts == ["/s-j"]
    assert lab.resumes == 0


async def test_guest_that_was_resumed_may_be_paused_anew_for_want_of_room(lab: Lab) -> None:
    guard = make_guard(lab)
    lab.paused = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(guard.watch)
        await until(lambda: guard._paused_by_other)
        guard.hear(Happening(Kind.RESUMED))
        guard.hear(Happening(Kind.PAUSED_BY_ERROR))
        lab.free = 0
    assert lab.resumes == 1


async def test_abort_that_fails_is_tried_until_it_works_and_told_once(lab: Lab) -> None:
    lab.free, lab.abort_fails, lab.paused = 0, 3, True
    await make_guard(lab).watch()
    assert lab.aborts == ["/s-j"]
    assert len([line for line in lab.said if "cannot end the job yet" in line]) == 1
    assert lab.resumes == 1


async def test_room_that_cannot_be_measured_ends_nothing(lab: Lab) -> None:
    lab.free = None
    guard = make_guard(lab)
    with trio.move_on_after(0.2):
        await guard.watch()
    assert not lab.aborts
    assert not guard.is_ending


async def test_job_that_somebody_else_ended_while_the_guest_was_paused(lab: Lab) -> None:
    guard = make_guard(lab)
    await guard.rescue()
    assert lab.resumes == 0, "nothing had happened"
    guard.hear(Happening(Kind.PAUSED_BY_ERROR))
    lab.paused, lab.xml = True, None
    await guard.rescue()
    assert lab.resumes == 1


async def test_domain_that_is_gone_is_not_waited_for(lab: Lab) -> None:
    lab.free, lab.gone = 0, True
    with trio.fail_after(5):
        await make_guard(lab).watch()
