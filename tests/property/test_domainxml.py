# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever stands in a domain's XML: a disk is taken, left out with a reason, or refused, and no
name leads out of its folder."""

from __future__ import annotations

import contextlib
import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from xml.sax.saxutils import quoteattr

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from backupfs import domainxml
from backupfs.domainxml import Disk
from backupfs.errors import BackupfsError, BadXml, DiskUnusable, UsageError

anything = st.text(st.characters(codec=None), max_size=120)
# What XML 1.0 can hold, less what its reader normalises.
legal = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"))
targets = st.sampled_from(["vda", "vdb", "sda", "../x", "a/b", "a\nb", "v" * 300, "."]) | anything
sources = st.none() | st.sampled_from(["/i/a", "/i/b", "/dev/sdx", "rbd://m/p/i", "x" * 300, "/" + "ä" * 200])

disks = st.builds(
    Disk,
    target=targets,
    device=st.sampled_from(["disk", "disk", "cdrom", "floppy", "lun"]),
    bus=st.just("virtio"),
    source_type=st.sampled_from(["file", "file", "block", "network", "volume", "vhostuser", "nvme"]),
    format=st.sampled_from(["raw", "qcow2"]),
    source=sources,
    encrypted=st.booleans(),
    secret=st.none() | st.just(("uuid", "u")),
)


@given(anything)
@example("..")
@example("a/../../etc")
@example("\udcff")
def test_no_name_escapes_its_folder(name: str) -> None:
    found = domainxml.file_name(name)
    if found is None:
        return
    assert found == name
    encoded = os.fsencode(name)
    assert encoded.decode() == name, "what is listed is what was told"
    assert 0 < len(encoded) <= 255
    assert b"/" not in encoded
    assert os.path.normpath(os.path.join("/mnt/checkpoints", name)) == f"/mnt/checkpoints/{name}"
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in name)


@given(st.lists(disks, max_size=6, unique_by=lambda disk: disk.target), st.none() | st.just("/scratch"), st.data())
def test_no_disk_is_missed_in_silence(having: list[Disk], scratch: str | None, data: st.DataObject) -> None:
    names = st.lists(st.sampled_from([disk.target for disk in having] or ["x"]), unique=True, max_size=3)
    only, exclude = data.draw(st.none() | names), data.draw(names)
    refused: BackupfsError | None = None
    try:
        found = domainxml.select_disks(tuple(having), domain="d", only=only, exclude=exclude, scratch=scratch)
    except (DiskUnusable, UsageError) as error:
        refused = error
    if refused is not None:
        assert having or isinstance(refused, UsageError)
        assert isinstance(refused, UsageError) or refused.cure
        return
    taken = [disk.target for disk in found.taking]
    assert sorted(taken + list(found.left_out)) == sorted(disk.target for disk in having)
    assert all(reason.text and reason.cure for reason in found.left_out.values())
    assert not set(taken) & set(exclude)
    assert only is None or not set(taken) - set(only)

    paths = [domainxml.scratch_path(disk, "0123456789abcdef", scratch, "d/../d") for disk in found.taking]
    assert len(set(paths)) == len(paths), "scratch files are apart"
    for disk, path in zip(found.taking, paths, strict=True):
        assert domainxml.file_name(disk.target) is not None
        assert len(os.fsencode(os.path.basename(path))) <= 255
        assert path.endswith(".backupfs-0123456789abcdef")
        assert os.path.dirname(path) == (scratch or os.path.dirname(disk.source or ""))
        assert not path.startswith("/dev/")

    xml = domainxml.render_backup(
        tuple(having), found.taking, socket="/s", scratches=dict(zip(taken, paths, strict=True))
    )
    # What an XML reader hands back; a name with characters that XML cannot hold is never taken.
    if all(disk.target.isprintable() for disk in having):
        job = domainxml.parse_backup(xml)
        assert (job.mode, job.socket) == ("pull", "/s")
        assert job.scratches == dict(zip(taken, paths, strict=True))
        assert job.exports == {target: target for target in taken}
        assert xml.count("<encryption") == sum(disk.encrypted for disk in found.taking)


@given(legal, legal, legal)
def test_what_is_written_reads_back(socket: str, scratch: str, target: str) -> None:
    disk = Disk(target, "disk", "virtio", "file", "raw", "/i")
    off = replace(disk, target="off")
    xml = domainxml.render_backup((disk, off), (disk,), socket=f"/{socket}", scratches={target: f"/{scratch}"})
    job = domainxml.parse_backup(xml)
    assert job.socket == f"/{socket}"
    assert job.scratches == {target: f"/{scratch}"}


def element(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    names = st.sampled_from([
        "domain", "name", "os", "nvram", "devices", "disk", "source", "target", "driver", "server", "disks", "scratch",
        "seclabel", "label", "graphics", "cookies", "cookie", "encryption", "secret", "creationTime", "parent", "host",
    ])  # fmt: skip
    attributes = st.dictionaries(
        st.sampled_from(["id", "type", "file", "dev", "name", "passwd", "model", "index", "uuid", "protocol", "port"]),
        legal.map(quoteattr),
        max_size=3,
    )
    return st.builds(
        lambda name, words, inner: (
            f"<{name}{''.join(f' {key}={value}' for key, value in words.items())}>{''.join(inner)}</{name}>"
        ),
        names,
        attributes,
        st.lists(children, max_size=4),
    )


documents = element(st.recursive(st.sampled_from(["", "7", " 1 ", "-9", "9" * 30, "x"]), element, max_leaves=12))


@given(documents | anything)
def test_any_document_is_a_value_or_bad(xml: str) -> None:
    for parse in (
        domainxml.parse_disks, domainxml.parse_domain, domainxml.parse_backup, domainxml.parse_checkpoint,
        domainxml.parse_host_uuid, domainxml.strip_secrets,
    ):  # fmt: skip
        with contextlib.suppress(BadXml):
            parse(xml)


@given(documents)
def test_no_secret_is_left_and_nothing_else_is_lost(xml: str) -> None:
    root = ET.fromstring(xml)
    shown = ET.fromstring(domainxml.strip_secrets(xml))
    assert not any("passwd" in found.attrib for found in shown.iter("graphics"))
    assert shown.findall(".//source/cookies") == []
    for found in root.iter("graphics"):
        found.attrib.pop("passwd", None)
    for found in list(root.iter("source")):
        for cookies in found.findall("cookies"):
            found.remove(cookies)
    assert ET.tostring(shown) == ET.tostring(root)
    once = domainxml.strip_secrets(xml)
    assert domainxml.strip_secrets(once) == once


@given(st.lists(disks, min_size=1, max_size=3), st.text(min_size=1, max_size=5))
def test_an_unknown_name_is_told_with_those_that_there_are(having: list[Disk], name: str) -> None:
    if name in [disk.target for disk in having]:
        return
    with pytest.raises(BackupfsError) as caught:
        domainxml.select_disks(tuple(having), domain="d", only=None, exclude=[name], scratch="/s")
    assert name in str(caught.value)
    assert having[0].target in str(caught.value)
