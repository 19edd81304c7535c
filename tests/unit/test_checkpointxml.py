# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from dataclasses import replace

import pytest

from backupfs.checkpointxml import (
    LONGEST_CHECKPOINT,
    name_checkpoint,
    render_checkpoint,
    render_redefinition,
    why_bad_name,
    why_no_bitmap,
)
from backupfs.domainxml import Disk, parse_checkpoint
from backupfs.errors import BadXml

VDA = Disk("vda", "disk", "virtio", "file", "qcow2", "/vda.qcow2")
VDB = replace(VDA, target="vdb", format="raw")


@pytest.mark.parametrize("name", ["monday", "-x", "_", "a.b", "x" * LONGEST_CHECKPOINT, "2026-11-24"])
def test_what_libvirt_takes_is_a_name(name: str) -> None:
    assert why_bad_name(name) is None


@pytest.mark.parametrize(
    "name", ["", ".x", "..", "a b", "a/b", "ä", "a\n", "x" * (LONGEST_CHECKPOINT + 1), "%s", "a,b"]
)
def test_what_libvirt_refuses_is_none(name: str) -> None:
    assert why_bad_name(name)


def test_names_that_are_taken_get_a_number() -> None:
    assert name_checkpoint("day", 0, []) == "day"
    assert name_checkpoint("day", 0, ["day"]) == "day-2"
    assert name_checkpoint("day", 0, ["day", "day-2", "day-3"]) == "day-4"
    assert name_checkpoint("%Y", 86400 * 30, []) == "1970"


def test_every_disk_is_named_and_only_the_tracked_have_a_bitmap() -> None:
    xml = render_checkpoint("monday", "backupfs <&>", [VDA, VDB], ["vda"])
    parsed = parse_checkpoint(xml)
    assert (parsed.name, parsed.description, parsed.disks) == ("monday", "backupfs <&>", ("vda",))
    assert 'name="vdb" checkpoint="no"' in xml


def test_why_a_disk_can_hold_no_bitmap() -> None:
    assert why_no_bitmap(VDA) is None
    assert why_no_bitmap(VDA, 3) is None
    for disk, version, word in (
        (VDB, None, "raw disk"),
        (replace(VDA, read_only=True), 3, "read-only"),
        (replace(VDA, transient=True), 3, "transient"),
        (VDA, 2, "version 2"),
    ):
        reason = why_no_bitmap(disk, version)
        assert reason is not None
        assert word in reason.text


def test_a_redefinition_has_a_parent_that_libvirt_knows_or_none() -> None:
    inner = "<name>c</name><parent><name>b</name></parent><creationTime>5</creationTime>"
    xml = f"<domaincheckpoint>{inner}</domaincheckpoint>"
    assert render_redefinition(xml, {"b"}, "a") == xml
    assert parse_checkpoint(render_redefinition(xml, {"a"}, "a")).parent == "a"
    orphan = render_redefinition(xml, {"a"}, None)
    assert parse_checkpoint(orphan).parent is None
    assert parse_checkpoint(orphan).creation_time == 5
    with pytest.raises(BadXml):
        render_redefinition("<x", set(), None)
