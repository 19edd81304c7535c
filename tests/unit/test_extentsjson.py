# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json

import pytest

from backupfs.extents import DIRTY, ZERO, Builder, uniform
from backupfs.extentsjson import LITERAL, ExtentsJson, render_extents
from backupfs.image import Literal
from backupfs.origin import Origin

LATER = Origin("web01", "1234", "vda", 2000, 1000, "monday")


def text(found: ExtentsJson, start: int, stop: int) -> bytes:
    parts = []
    for segment in found.segments(start, stop):
        assert isinstance(segment, Literal)
        assert 0 < segment.length <= LITERAL * 100
        parts.append(segment.data)
    return b"".join(parts)


def test_the_file_is_the_documented_one() -> None:
    extents = Builder(100000)
    extents.append(70000, 0)
    dirty = Builder(100000)
    dirty.append(65536, 0)
    dirty.append(20000, DIRTY)
    found = render_extents(extents.finish(ZERO), dirty.finish(), LATER)
    assert text(found, 0, found.size).decode() == (
        '{"format": "backupfs extents", "version": 1, "domain": "web01", "uuid": "1234", "disk": "vda", '
        '"checkpoint": "monday", "from": 1000, "to": 2000, "size": 100000, "count": 2, "extents": [\n'
        '{"start":  65536, "length":   4464, "zero": false},\n'
        '{"start":  70000, "length":  15536, "zero": true } \n'
        "]}\n"
    )
    assert found.allocated == found.size


async def test_all_of_it_is_data() -> None:
    found = render_extents(uniform(512), uniform(512), LATER)
    assert await found.seek(7, data=True) == 7
    assert await found.seek(7, data=False) == found.size


def test_nothing_changed_is_an_empty_list() -> None:
    found = render_extents(uniform(512), uniform(512), LATER)
    assert json.loads(text(found, 0, found.size))["extents"] == []


def test_a_long_list_is_made_in_pieces_of_bounded_size() -> None:
    count = 3 * LITERAL + 5
    dirty = Builder(count * 2)
    for _ in range(count):
        dirty.append(1, 0)
        dirty.append(1, DIRTY)
    found = render_extents(uniform(count * 2), dirty.finish(), LATER)
    whole = text(found, 0, found.size)
    assert [extent["start"] for extent in json.loads(whole)["extents"]] == list(range(1, count * 2, 2))
    for start in range(0, found.size, 9973):
        assert text(found, start, min(start + 4096, found.size)) == whole[start : start + 4096]
    assert list(found.segments(7, 7)) == list(found.segments(found.size, found.size)) == []


def test_maps_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="1024 bytes for a disk of 512"):
        render_extents(uniform(512), uniform(1024), LATER)
