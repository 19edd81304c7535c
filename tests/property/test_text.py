# SPDX-License-Identifier: GPL-3.0-or-later
"""No text from outside does anything but parse or be refused."""

from __future__ import annotations

import contextlib
import os

from hypothesis import given
from hypothesis import strategies as st

from backupfs import domainxml
from backupfs.errors import BadXml, UsageError
from backupfs.mountpoint import parse_mountinfo
from backupfs.options import OPTIONS, parse_options

anything = st.text(st.characters(codec=None), max_size=300)
words = st.sampled_from([word.name for word in OPTIONS] + ["ro", "nofail", "x-y"])


@given(st.lists(st.one_of(anything, st.builds(lambda a, b: f"{a}={b}", words, anything)), max_size=5))
def test_options_parse_or_are_refused(texts: list[str]) -> None:
    with contextlib.suppress(UsageError):
        parse_options(texts)


@given(anything)
def test_names_that_pass_are_one_component(name: str) -> None:
    if domainxml.file_name(name) is not None:
        assert os.path.basename(os.path.join("/raw", name)) == name
        assert os.path.normpath(os.path.join("/raw", name)) == f"/raw/{name}"
        assert len(name.encode()) <= 255
        assert "\n" not in name


@given(anything)
def test_any_xml_is_a_value_or_bad(text: str) -> None:
    for parse in (
        domainxml.parse_disks, domainxml.parse_domain, domainxml.parse_backup, domainxml.parse_checkpoint,
        domainxml.strip_secrets, domainxml.parse_host_uuid,
    ):  # fmt: skip
        for xml in (text, f"<domain><name>{text}</name></domain>", f"<a id='{text}'/>"):
            with contextlib.suppress(BadXml):
                parse(xml)


@given(anything)
def test_any_mountinfo_parses(text: str) -> None:
    parse_mountinfo(text)
    parse_mountinfo(f"1 2 0:3 / {text} rw - fuse.x {text} rw")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50))
def test_names_survive_the_backup_xml(name: str) -> None:
    disk = domainxml.Disk(name, "disk", "virtio", "file", "raw", "/i")
    xml = domainxml.render_backup((disk,), (disk,), socket="/s", scratches={name: f"/i/{name}"})
    try:
        assert domainxml.parse_backup(xml).scratches == {name: f"/i/{name}"}
    except BadXml:
        assert not name.isprintable()  # XML 1.0 has no such characters
