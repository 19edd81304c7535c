# SPDX-License-Identifier: GPL-3.0-or-later
"""What is asked of libvirt and QEMU while a point begins; what follows from it is `increments`' business."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from backupfs import tracking as tracking_module
from backupfs.changes import BLOCK, Changes, everything, nothing
from backupfs.checkpoints import Checkpoints
from backupfs.domainxml import Disk, DomainFacts, Reason, Selection
from backupfs.errors import CheckpointUnusable
from backupfs.increments import Job
from backupfs.launch import Survey
from backupfs.shortjob import BROKEN_CURE
from backupfs.store import open_store
from backupfs.tracking import Tracking, track

SIZE = 8 * BLOCK
DISKS = tuple(Disk(name, "disk", "virtio", "file", "qcow2", f"/nowhere/{name}") for name in ("vda", "vdb"))
SEEN = Survey(DomainFacts("web01", "1234", 1), DISKS, Selection(DISKS))
BROKEN = Reason("missing or broken bitmap", BROKEN_CURE)


class World:
    """Libvirt's list of checkpoints, and what short jobs and bitmaps bring."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.listed: dict[str, str] = {}
        self.short: list[Job] = []
        self.broken: set[tuple[str, str]] = set()
        self.found: Changes = nothing(SIZE)
        domain: Any = SimpleNamespace(name="web01", is_local=True, checkpoints=self.checkpoints)
        self.launcher: Any = SimpleNamespace(domain=domain, options=SimpleNamespace(timeout=5.0))
        self.checkpoints_of = Checkpoints(domain, open_store(folder, "host", "1234"))
        monkeypatch.setattr(tracking_module, "read_base", self.read_base)
        monkeypatch.setattr(tracking_module, "read_bitmaps", self.read_bitmaps)

    def make(self, name: str, *disks: str, parent: str = "", age: float = 100.0) -> None:
        bitmaps = "".join(f"<disk name='{disk}' checkpoint='bitmap'/>" for disk in disks or ("vda", "vdb"))
        more = f"<parent><name>{parent}</name></parent>" if parent else ""
        self.listed[name] = (
            f"<domaincheckpoint><name>{name}</name><creationTime>{int(time.time() - age)}</creationTime>{more}"
            f"<disks>{bitmaps}</disks></domaincheckpoint>"
        )

    async def checkpoints(self) -> dict[str, str]:
        return dict(self.listed)

    async def read_base(self, launcher: Any, seen: Any, job: Job) -> dict[tuple[str, str], Changes | Reason]:
        self.short.append(job)
        pairs = [(job.checkpoint, disk) for disk in job.disks]
        return {pair: BROKEN if pair in self.broken else self.found for pair in pairs}

    async def read_bitmaps(self, backup: Any, bases: dict[str, str], timeout: float) -> dict[tuple[str, str], Changes]:
        return {(name, disk): self.found for disk, name in bases.items()}

    async def track(self) -> Tracking:
        self.short.clear()
        return await track(self.launcher, self.checkpoints_of, SEEN)

    async def point(self, instant: int) -> dict[str, set[str]]:
        """Begin a point; return the checkpoints that each disk has an increment of."""
        tracking = await self.track()
        concluded = await tracking.conclude(None, {"vda": SIZE, "vdb": SIZE}, instant, None)  # type: ignore[arg-type]
        return {disk: set(one.increments) for disk, one in concluded.disks.items()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    return World(monkeypatch, tmp_path)


async def test_older_ones_take_a_short_job_once(world: World) -> None:
    world.make("a")
    world.make("b", parent="a")
    world.make("c", parent="b")
    assert await world.point(1000) == {"vda": {"a", "b", "c"}, "vdb": {"a", "b", "c"}}
    assert [job.checkpoint for job in world.short] == ["a", "b"]
    assert await world.point(1001) == {"vda": {"a", "b", "c"}, "vdb": {"a", "b", "c"}}
    assert world.short == []


async def test_one_that_was_made_just_now_is_waited_for(world: World, autojump_clock: Any) -> None:
    world.make("a", age=0.0)
    begun = trio.current_time()
    assert (await world.point(1000))["vda"] == {"a"}
    assert trio.current_time() - begun >= 2.0
    begun = trio.current_time()
    await world.point(1001)
    assert trio.current_time() == begun, "once settled, settled for good"


async def test_a_broken_one_is_tried_no_more(world: World) -> None:
    world.make("a")
    world.make("b", parent="a")
    world.broken = {("a", "vda")}
    assert await world.point(1000) == {"vda": {"b"}, "vdb": {"a", "b"}}
    assert await world.point(1001) == {"vda": {"b"}, "vdb": {"a", "b"}}
    assert world.short == []


async def test_a_base_that_libvirt_refuses_is_left_out_on_the_disk_that_it_names(world: World) -> None:
    world.make("a")
    world.make("b", parent="a")
    tracking = await world.track()
    assert tracking.bases == {"vda": "b", "vdb": "b"}
    error = CheckpointUnusable("web01", "begin", "checkpoint inconsistent: missing or broken bitmap 'b' for disk 'vdb'")
    await tracking.refuse_bases(error)
    assert tracking.bases == {"vda": "b", "vdb": "a"}
    # One whose sentence names nothing: all of them.
    await tracking.refuse_bases(CheckpointUnusable("web01", "begin", "something else"))
    assert tracking.bases == {"vda": "a"}
    await tracking.refuse_bases(error)
    assert tracking.bases == {}
    with pytest.raises(CheckpointUnusable):
        await tracking.refuse_bases(error)
    assert (await world.track()).bases == {}


async def test_what_is_in_doubt_counts_as_changed_and_is_told(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "backupfs")
    world.make("a")
    world.found = everything(SIZE)
    await world.point(1000)
    world.found = nothing(SIZE)  # what it had is gone: an older image
    assert await world.point(1001) == {"vda": set(), "vdb": set()}
    assert "all of vda counts as changed" in caplog.text
