# SPDX-License-Identifier: GPL-3.0-or-later
"""Names from libvirt may hold anything: none leaves the tree, forges a line, or breaks what is written.

A domain's, a checkpoint's or a disk's name comes from a host that a guest may have taken over.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console

from backupfs import checkpoints as checkpoints_module
from backupfs import domainxml, errors
from backupfs.checkpointtree import Checkpoints
from backupfs.errors import NoSuchFile
from backupfs.extents import uniform
from backupfs.forms import Forms
from backupfs.image import RawImage
from backupfs.inodes import Inodes
from backupfs.logs import LONGEST_LINE, RingLog
from backupfs.mount import _fuse_options
from backupfs.mounted import Mounted
from backupfs.options import Options
from backupfs.pointtree import PointFolder
from backupfs.status import render_json, render_metrics, render_table
from backupfs.tree import Inner, Root
from tests.unit.test_status import DISK, SNAPSHOT, parse_metrics

NASTY = ["..", ".", "", "/", "a/b", "../../etc/passwd", "a\nb", "\x1b[2J", "\0", "ä" * 200, "x" * 256, "\udcff",
         "a b", "'", '"', "\\", "$(x)", "\u202e", "\u2028", "-rf", "a,b", "…"]  # fmt: skip
names = st.sampled_from(NASTY) | st.text(st.characters(codec=None), max_size=300)


def tree_of(checkpoints: dict[str, str]) -> Mounted:
    async def listed() -> dict[str, str]:
        return checkpoints

    domain: Any = SimpleNamespace(name="d", uuid="u", uri="x", checkpoints=listed)
    store: Any = SimpleNamespace(checkpoints={})
    images: dict[str, Any] = {}
    point = SimpleNamespace(
        generation=1, domain="d", instant=7, lost=None, over=False, job_id="j",
        images=images, newest={"vda": 7}, exports={}, forms=Forms("d", "u", 7, "<domain/>", {}, images, {}),
    )  # fmt: skip

    async def look() -> Any:
        return point

    lease = SimpleNamespace(check=lambda: None, release=lambda: None)
    job: Any = SimpleNamespace(
        domain=domain, point=point, generation=1, state=SimpleNamespace(value="running"), look=look,
        lease=lambda *_a, **_k: lease, touch_if_lost=lambda: None, record=SimpleNamespace(last_instant=7),
        checkpoints=checkpoints_module.Checkpoints(domain, store),
    )  # fmt: skip
    return Mounted(job, {"log": lambda: b""}, started=1)


@given(st.lists(names, max_size=8, unique=True))
@example(NASTY)
async def test_no_checkpoint_s_name_leaves_its_folder(told: list[str]) -> None:
    xml = "<domaincheckpoint><creationTime>5</creationTime></domaincheckpoint>"
    folder = Checkpoints(tree_of(dict.fromkeys(told, xml)))
    entries = (await folder.open(0)).entries
    for name, node in entries:
        encoded = os.fsencode(name)
        assert 0 < len(encoded) <= 255
        assert b"/" not in encoded
        assert name not in (".", "..")
        assert all(character >= " " for character in name)
        assert node.path == f"/checkpoints/{name}"
        assert name in told
        assert (await folder.child(os.fsdecode(encoded))).path == node.path
    # What can't be a file's name is not there, and can't be had by asking for it.
    shown = [name for name, _ in entries]
    for name in told:
        if name not in shown:
            with pytest.raises(NoSuchFile):
                await folder.child(name)
    numbers = Inodes(folder)
    assert len({numbers.number(node) for _, node in entries}) == len(entries)


@given(names)
async def test_whatever_is_looked_up_is_in_the_tree_or_not_there(name: str) -> None:
    tree = tree_of({})
    export: Any = SimpleNamespace()
    tree.job.point.images["vda"] = RawImage(export, uniform(0))
    for folder in (Root(tree), PointFolder(tree, "raw", 1), Checkpoints(tree), Inner(tree)):
        try:
            found = await folder.child(name)
        except NoSuchFile:
            continue
        assert found.path == os.path.join(folder.path, name)
        assert os.path.normpath(found.path) == found.path


@given(names, st.sampled_from([errors.PointLost, errors.ForeignJob, errors.LibvirtUnavailable]))
def test_no_name_forges_a_line_of_the_log(name: str, kind: Any) -> None:
    ring = RingLog()
    record = logging.LogRecord("backupfs", logging.WARNING, "x", 1, "%s: %s", (name, kind(name, name)), None)
    ring.emit(record)
    text = ring.render().decode()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    assert text[:-1].isprintable()
    assert len(text) < LONGEST_LINE * 10 + 100


@given(names, names, names)
def test_no_name_breaks_what_programs_and_people_read(domain: str, disk: str, why: str) -> None:
    odd = replace(SNAPSHOT, domain=domain, source=domain, mount_point=why, disks={disk: DISK}, why={disk: why})
    told = json.loads(render_json(odd))
    assert (told["domain"], list(told["disks"]), told["why"]) == (domain, [disk], {disk: why})
    metrics = parse_metrics(render_metrics(odd))
    assert len(metrics) == len(parse_metrics(render_metrics(SNAPSHOT)))
    out = io.StringIO()
    render_table(told, Console(file=out, width=200))
    assert all(line.isprintable() for line in out.getvalue().split("\n"))


@given(names, st.booleans())
@example("a,allow_other", False)
@example("a\\,allow_other", False)
@example("a\\", False)
def test_no_source_s_name_becomes_an_option_of_the_mount(name: str, allow: bool) -> None:
    words = ",".join(sorted(_fuse_options(name, Options(allow_other=allow))))
    # libfuse's own way of splitting: at commas that no backslash precedes.
    split = [
        re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL) for word in re.findall(r"(?:\\.|[^,\\])+", words, re.DOTALL)
    ]
    wanted = {"default_permissions", "subtype=backupfs"} | ({"allow_other"} if allow else set())
    assert set(split) - {f"fsname={name}"} == wanted


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
ATTACKS = {
    "billion laughs": f'<!DOCTYPE d [<!ENTITY l0 "lol">{LAUGHS}]><domain><name>&l9;</name></domain>',
    "quadratic": f'<!DOCTYPE d [<!ENTITY a "{"a" * 50_000}">]><domain><name>{"&a;" * 50_000}</name></domain>',
    "external file": '<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/passwd">]><domain><name>&a;</name></domain>',
    "external over the net": '<!DOCTYPE d SYSTEM "http://127.0.0.1:1/x.dtd"><domain/>',
    "parameter entity": '<!DOCTYPE d [<!ENTITY % a SYSTEM "file:///etc/passwd">%a;]><domain/>',
    "cut short": "<domain><devices><disk",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_xml_that_attacks_its_reader_is_refused_at_once(attack: str) -> None:
    begun = time.monotonic()
    for parse in (domainxml.parse_domain, domainxml.parse_disks, domainxml.parse_backup, domainxml.parse_checkpoint,
                  domainxml.strip_secrets, domainxml.parse_host_uuid):  # fmt: skip
        with pytest.raises(errors.BadXml) as caught:
            parse(ATTACKS[attack])
        assert "root:" not in str(caught.value)
        assert len(str(caught.value)) < 300
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("shape", ["deep", "wide", "one long name", "many attributes"])
def test_huge_xml_is_read_in_time_that_grows_with_it(shape: str) -> None:
    xml = {
        "deep": f"<domain>{'<a>' * 200_000}{'</a>' * 200_000}</domain>",
        "wide": "<domain><devices>" + "<disk><target dev='x'/></disk>" * 100_000 + "</devices></domain>",
        "one long name": f"<domain><name>{'n' * 8_000_000}</name></domain>",
        "many attributes": "<domain " + " ".join(f"a{i}='1'" for i in range(50_000)) + "/>",
    }[shape]
    begun = time.monotonic()
    domainxml.parse_domain(xml)
    domainxml.parse_disks(xml)
    domainxml.strip_secrets(xml)
    assert time.monotonic() - begun < 20
