# SPDX-License-Identifier: GPL-3.0-or-later
"""Which increments a point has; their bytes are the business of qcow2 and extentsjson."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backupfs.bases import FORGOTTEN, NOT_IN_IT, YOUNGER, Bases
from backupfs.changes import BLOCK, Changes, everything, from_extents, nothing
from backupfs.checkpoints import Base
from backupfs.diskmap import DiskMap
from backupfs.domainxml import Checkpoint, Reason
from backupfs.errors import BaseForgotten
from backupfs.extents import DIRTY, Builder, uniform
from backupfs.history import Record
from backupfs.image import RawImage
from backupfs.increments import Conclusion
from backupfs.labels import uniform as uniform_labels
from backupfs.lineage import Mark, render_mark
from backupfs.options import BackingName
from backupfs.tracking import Concluded

SIZE = 8 * BLOCK
MONDAY = Mark(1000, "0" * 32)
BROKEN = Reason("broken", "mend it")
RAW = Reason("raw", "convert")


def base(name: str = "monday", mark: Mark | None = MONDAY, *, pruned: bool = False, time: int = 999) -> Base:
    description = "" if mark is None else render_mark(mark)
    return Base(Checkpoint(name, time, None, description, ("vda",)), "<x/>", pruned)


def changed(block: int) -> Changes:
    builder = Builder(SIZE)
    builder.append(block * BLOCK, 0)
    builder.append(BLOCK, DIRTY)
    return from_extents(builder.finish())


def bases(
    increments: dict[str, Changes], left_out: dict[str, Reason], *live: Base, size: int = SIZE, **record: Any
) -> Bases[str]:
    labels = uniform_labels(size, 1000).relabel(changed(5), 2000) if size == SIZE else uniform_labels(size, 1000)
    made = Record("vda", "/vda", None, size, 2000, 1000, labels, (), 0, 1000)
    conclusion = Conclusion(increments, left_out, None, replace(made, **record))
    disk_map = DiskMap(uniform(size))
    disks = {"vda": RawImage("nbd", disk_map)}
    concluded = Concluded({"vda": conclusion}, {one.name: one for one in live})
    return Bases("web01", "1234", 2000, BackingName(), disks, {"vda": disk_map}, {}, concluded)


async def test_a_live_checkpoint_has_what_was_read() -> None:
    monday = base()
    found = await bases({"monday": changed(3)}, {}, monday).get(monday)
    assert sorted(found.images) == ["vda.extents.json", "vda.inc.qcow2"]
    assert found.left_out == {}
    assert found.images["vda.inc.qcow2"].image.size < 8 * BLOCK
    whole = await bases({"monday": everything(SIZE)}, {}, monday).get(monday)
    assert whole.images["vda.inc.qcow2"].image.size > 8 * BLOCK


async def test_why_one_has_none_is_told() -> None:
    monday = base()
    made = bases({}, {"monday": BROKEN}, monday)
    assert (await made.get(monday)).images == {}
    assert made.left_out == {"checkpoints/monday/vda": BROKEN}


async def test_a_younger_one_has_none_also_where_it_bears_an_old_name() -> None:
    made = bases({"monday": nothing(SIZE)}, {}, base())
    assert (await made.get(base("tuesday"))).left_out == {"vda": YOUNGER}
    assert (await made.get(base(time=1001))).left_out == {"vda": YOUNGER}
    assert (await made.get(base())).left_out == {}
    assert made.left_out == {"checkpoints/tuesday/vda": YOUNGER}


async def test_a_disk_that_is_not_in_it_has_none() -> None:
    other = replace(base().checkpoint, disks=())
    made = bases({}, {})
    assert (await made.get(Base(other, "<x/>"))).left_out == {"vda": NOT_IN_IT}
    told = replace(made, why_not={"vda": RAW}, _made={})
    assert (await told.get(Base(other, "<x/>"))).left_out == {"vda": RAW}


async def test_a_pruned_one_has_what_was_read_or_else_what_the_labels_tell() -> None:
    monday, pruned = base(), base(pruned=True)
    read = await bases({"monday": everything(SIZE)}, {}, monday).get(pruned)
    labels = await bases({}, {}).get(pruned)
    doubtful = await bases({}, {"monday": BROKEN}, monday).get(pruned)
    sizes = [found.images["vda.inc.qcow2"].image.size for found in (read, labels, doubtful)]
    assert sizes[0] - sizes[1] == 7 * BLOCK
    assert sizes[1] == sizes[2]


async def test_a_pruned_one_from_before_the_history_is_an_error() -> None:
    made = bases({}, {}, since=1500)
    for _ in range(2):
        with pytest.raises(BaseForgotten, match="rmdir"):
            await made.get(base(pruned=True))
    assert made.left_out == {"checkpoints/monday/vda": FORGOTTEN}


async def test_a_disk_too_large_for_qcow2_still_has_its_list() -> None:
    size = 2**51 + 512
    monday = base()
    found = await bases({"monday": nothing(size)}, {}, monday, size=size).get(monday)
    assert list(found.images) == ["vda.extents.json"]
    assert list(found.left_out) == ["vda.inc.qcow2"]


def test_another_s_checkpoint_counts_from_libvirtd_s_clock() -> None:
    assert base().instant == 1000
    assert base(mark=None).instant == 999
