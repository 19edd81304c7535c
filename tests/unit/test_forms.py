# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import trio

from backupfs.diskmap import DiskMap
from backupfs.extents import ZERO, uniform
from backupfs.forms import FORMS, Forms
from backupfs.image import RawImage

XML = "<domain><devices><disk><driver type='raw'/><target dev='vda'/></disk></devices></domain>"


def forms(size: int = 10**6, known: int | None = None) -> Forms[str]:
    disk_map = DiskMap(uniform(size, ZERO), known, None if known is None else lambda *_: None)
    disks = {"vda": RawImage("export of vda", disk_map)}
    return Forms("web01", "1234", 1000, XML, {"nvram.fd": b"variables"}, disks, {"vda": disk_map})


async def test_each_form_is_complete_by_itself() -> None:
    made = forms()
    for name in FORMS:
        form = await made.get(name)
        assert list(form.files) == ["domain.xml", "nvram.fd"]
        assert f'type="{name}"' in form.files["domain.xml"].decode().replace("'", '"')
        assert [(file, disk.target) for file, disk in form.images.items()] == [(f"vda.{name}", "vda")]
    assert made.left_out == {}
    assert (await made.get("raw")).images["vda.raw"].image is made.disks["vda"]


async def test_a_form_is_made_once_for_all_who_look_at_the_same_time() -> None:
    made = forms()
    found = []

    async def look() -> None:
        found.append(await made.get("qcow2"))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(look)
    assert all(form is found[0] for form in found)


async def test_a_disk_too_large_for_a_form_is_left_out_of_it_with_the_reason() -> None:
    made = forms(2**51 + 512)
    assert list((await made.get("raw")).images) == ["vda.raw"]
    assert made.left_out == {}
    assert list((await made.get("qcow2")).images) == []
    reason = made.left_out["vda.qcow2"]
    assert "2251799813685760 bytes" in reason.text
    assert reason.cure == "copy raw/vda.raw"


async def test_a_disk_whose_map_is_not_known_as_a_whole_is_no_qcow2_file() -> None:
    made = forms(10**6, known=10**5)
    assert list((await made.get("raw")).images) == ["vda.raw"]
    assert list((await made.get("qcow2")).images) == []
    assert "too large to be known" in made.left_out["vda.qcow2"].text
