# SPDX-License-Identifier: GPL-3.0-or-later
"""Whose checkpoint is deleted, redefined, pruned or forgotten; libvirt is a stand-in that has bitmaps of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backupfs.checkpoints import Checkpoints, new_checkpoint
from backupfs.domainxml import Disk, Reason, parse_checkpoint
from backupfs.errors import BadCheckpointName, CheckpointExists, CheckpointUnusable, LibvirtRefused, NoSuchFile
from backupfs.store import open_store

VDA = Disk("vda", "disk", "virtio", "file", "qcow2", "/vda")
VDB = Disk("vdb", "disk", "virtio", "file", "raw", "/vdb")


@dataclass(eq=False)
class Libvirt:
    """What stands for libvirt and QEMU: metadata, and bitmaps."""

    listed: dict[str, str] = field(default_factory=dict)
    bitmaps: set[str] = field(default_factory=set)
    broken: bool = False
    name: str = "web01"
    uuid: str = "1234"

    def make(self, name: str, xml: str, parent: str | None = None) -> None:
        more = "<creationTime>5</creationTime>"
        if parent is not None:
            more += f"<parent><name>{parent}</name></parent>"
        self.listed[name] = xml.replace("</domaincheckpoint>", f"{more}</domaincheckpoint>")
        self.bitmaps.add(name)

    async def checkpoints(self) -> dict[str, str]:
        return dict(self.listed)

    async def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> None:
        if self.broken:
            raise LibvirtRefused(self.name, "delete", "no")
        if name not in self.listed:
            raise CheckpointUnusable(self.name, "delete", "gone")
        if not metadata_only and name not in self.bitmaps:
            raise LibvirtRefused(self.name, "delete", f"bitmap {name} not found in backing chain")
        del self.listed[name]
        if not metadata_only:
            self.bitmaps.discard(name)

    async def redefine_checkpoint(self, xml: str) -> None:
        if self.broken:
            raise LibvirtRefused(self.name, "redefine", "no")
        told = parse_checkpoint(xml)
        if told.parent is not None and told.parent not in self.listed:
            raise LibvirtRefused(self.name, "redefine", "parent not found")
        if told.name not in self.bitmaps:
            raise CheckpointUnusable(self.name, "redefine", "missing bitmap")
        self.listed[told.name] = xml


@pytest.fixture
def libvirt() -> Libvirt:
    return Libvirt()


@pytest.fixture
def checkpoints(libvirt: Libvirt, tmp_path: Path) -> Checkpoints:
    domain: Any = libvirt
    return Checkpoints(domain, open_store(tmp_path, "host", "1234"))


async def own(checkpoints: Checkpoints, libvirt: Libvirt, *names: str) -> None:
    """Make checkpoints of ours, each the parent of the next."""
    parent = None
    for instant, name in enumerate(names, 1000 + len(libvirt.listed)):
        _mark, xml = new_checkpoint(name, instant, [VDA, VDB], {"vdb": Reason("raw", "convert")})
        libvirt.make(name, xml, parent)
        checkpoints.note_made((await checkpoints.live())[name])
        parent = name


async def test_one_that_is_made_names_every_disk_and_is_known_as_ours(
    checkpoints: Checkpoints, libvirt: Libvirt
) -> None:
    await own(checkpoints, libvirt, "monday")
    live = (await checkpoints.live())["monday"]
    assert live.checkpoint.disks == ("vda",)
    assert live.instant == 1000
    assert checkpoints.trusted() == {live.identity}
    await checkpoints.check_name("tuesday")
    with pytest.raises(CheckpointExists):
        await checkpoints.check_name("monday")
    with pytest.raises(BadCheckpointName):
        await checkpoints.check_name(".x")
    assert await checkpoints.name("monday") == "monday-2"


async def test_pruning_leaves_others_alone_and_keeps_the_folder(checkpoints: Checkpoints, libvirt: Libvirt) -> None:
    libvirt.make("foreign", "<domaincheckpoint><name>foreign</name></domaincheckpoint>")
    await own(checkpoints, libvirt, "a", "b", "c")
    await checkpoints.prune(1)
    assert set(libvirt.listed) == {"foreign", "c"}
    found = await checkpoints.all()
    assert {name: base.pruned for name, base in found.items()} == {"foreign": False, "c": False, "a": True, "b": True}
    # A pruned name is taken until it is forgotten; one that libvirt has again is live.
    with pytest.raises(CheckpointExists):
        await checkpoints.check_name("a")
    await checkpoints.remove("a")
    libvirt.make("b", "<domaincheckpoint><name>b</name></domaincheckpoint>")
    assert {name: base.pruned for name, base in (await checkpoints.all()).items()} == dict.fromkeys(
        ["foreign", "b", "c"], False
    )


async def test_one_of_ours_that_the_store_does_not_know_is_pruned_with_a_folder_too(
    checkpoints: Checkpoints, libvirt: Libvirt
) -> None:
    await own(checkpoints, libvirt, "a", "b")
    checkpoints.store.drop("a")  # killed between begin and note
    await checkpoints.prune(1)
    assert (await checkpoints.all())["a"].pruned


@pytest.mark.expects_warning
async def test_one_that_cannot_be_pruned_stays_live(
    checkpoints: Checkpoints, libvirt: Libvirt, logged_warnings: list[str]
) -> None:
    await own(checkpoints, libvirt, "a", "b")
    libvirt.broken = True
    await checkpoints.prune(1)
    assert "cannot prune checkpoint a" in logged_warnings[0]
    assert not (await checkpoints.all())["a"].pruned
    libvirt.broken = False
    await checkpoints.prune(1)
    assert (await checkpoints.all())["a"].pruned


async def test_rmdir_deletes_anybody_s_also_where_the_bitmap_is_gone(
    checkpoints: Checkpoints, libvirt: Libvirt
) -> None:
    libvirt.make("foreign", "<domaincheckpoint><name>foreign</name></domaincheckpoint>")
    await own(checkpoints, libvirt, "a", "b")
    libvirt.bitmaps.remove("a")
    for name in ("a", "b", "foreign"):
        await checkpoints.remove(name)
    assert libvirt.listed == {}
    assert checkpoints.store.checkpoints == {}
    with pytest.raises(NoSuchFile):
        await checkpoints.remove("a")


async def test_rmdir_that_libvirt_refuses_forgets_nothing(checkpoints: Checkpoints, libvirt: Libvirt) -> None:
    await own(checkpoints, libvirt, "a")
    libvirt.broken = True
    with pytest.raises(LibvirtRefused):
        await checkpoints.remove("a")
    assert set(checkpoints.store.checkpoints) == {"a"}


async def test_what_libvirt_lost_is_defined_again_if_its_bitmap_is_there(
    checkpoints: Checkpoints, libvirt: Libvirt
) -> None:
    await own(checkpoints, libvirt, "a", "b", "c", "d")
    del libvirt.listed["a"], libvirt.listed["b"], libvirt.listed["d"]
    libvirt.bitmaps.remove("a")  # deleted by somebody, who then lost the rest of the metadata
    await checkpoints.redefine_lost()
    assert set(libvirt.listed) == {"b", "c", "d"}
    assert set(checkpoints.store.checkpoints) == {"b", "c", "d"}
    assert parse_checkpoint(libvirt.listed["b"]).parent is None
    assert parse_checkpoint(libvirt.listed["d"]).parent == "c"
    assert (await checkpoints.live())["d"].identity in checkpoints.trusted()


@pytest.mark.expects_warning
async def test_what_cannot_be_defined_again_now_is_not_forgotten(checkpoints: Checkpoints, libvirt: Libvirt) -> None:
    await own(checkpoints, libvirt, "a")
    libvirt.listed.clear()
    libvirt.broken = True
    await checkpoints.redefine_lost()
    assert set(checkpoints.store.checkpoints) == {"a"}


async def test_a_point_that_failed_takes_its_checkpoint_with_it_and_no_other(
    checkpoints: Checkpoints, libvirt: Libvirt
) -> None:
    await own(checkpoints, libvirt, "a")
    mark, xml = new_checkpoint("a", 1000, [VDA], {})
    await checkpoints.discard(mark)  # libvirt refused it, for there was an `a`
    assert set(libvirt.listed) == {"a"}
    libvirt.make("b", xml.replace(">a<", ">b<"))
    checkpoints.note_made((await checkpoints.live())["b"])
    await checkpoints.discard(mark)
    assert set(libvirt.listed) == {"a"}
    assert set(checkpoints.store.checkpoints) == {"a"}
    libvirt.make("c", xml.replace(">a<", ">c<"))
    await checkpoints.discard(mark)
    assert set(libvirt.listed) == {"a"}


@pytest.mark.expects_warning
async def test_a_checkpoint_that_may_be_left_over_is_told_of(
    checkpoints: Checkpoints, libvirt: Libvirt, logged_warnings: list[str]
) -> None:
    mark, xml = new_checkpoint("a", 1000, [VDA], {})
    libvirt.make("a", xml)
    libvirt.broken = True
    await checkpoints.discard(mark)
    assert "left over" in logged_warnings[0]
