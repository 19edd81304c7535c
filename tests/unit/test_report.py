# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from types import SimpleNamespace

from backupfs.diskmap import DiskMap
from backupfs.domainxml import Reason
from backupfs.extents import ZERO, uniform
from backupfs.forms import Forms
from backupfs.image import RawImage
from backupfs.quiesce import Quiesced
from backupfs.report import Reporter


async def test_what_a_form_had_to_leave_out_is_told_with_the_rest() -> None:
    disk_map = DiskMap(uniform(2**51 + 512, ZERO))
    disks = {"vda": RawImage("vda", disk_map)}
    forms = Forms("web01", "1234", 1000, "<domain/>", {}, disks, {"vda": disk_map})
    job = SimpleNamespace(left_out={"sda": Reason("a cdrom", "copy it")}, lost=None, last_loss=None, refusal=None)
    reporter = Reporter(job, "/mnt", "/control", "syslog")  # type: ignore[arg-type]  # has what is asked of it
    point = SimpleNamespace(forms=forms, bases=SimpleNamespace(left_out={}), quiesced=Quiesced())
    assert reporter._why(point) == {"sda": "a cdrom; copy it"}  # type: ignore[arg-type]
    await forms.get("qcow2")
    why = reporter._why(point)  # type: ignore[arg-type]
    assert list(why) == ["sda", "vda.qcow2"]
    assert why["vda.qcow2"].endswith("; copy raw/vda.raw")
    point.bases.left_out["checkpoints/monday/vda"] = Reason("it is younger", "begin another")
    assert reporter._why(point)["checkpoints/monday/vda"] == "it is younger; begin another"  # type: ignore[arg-type]
