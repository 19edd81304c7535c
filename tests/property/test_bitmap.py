# SPDX-License-Identifier: GPL-3.0-or-later
"""Bitmaps from servers that answer in any pieces, and from servers that lie."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from backupfs.allocation import Answer, Unbelievable
from backupfs.bitmap import Unfinished, walk_bitmap
from backupfs.extents import DIRTY

CONTEXT = "qemu:dirty-bitmap:b"


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1)), min_size=1, max_size=30), st.data())
def test_any_honest_answers_make_the_same_map(disk: list[tuple[int, int]], data: st.DataObject) -> None:
    truth = b"".join(bytes([flags]) * length for length, flags in disk)

    def ask(offset: int, length: int) -> Sequence[Answer]:
        entries: list[int] = []
        for _ in range(data.draw(st.integers(1, 5))):
            if offset + sum(entries[::2]) == len(truth):
                break
            rest = truth[offset + sum(entries[::2]) :]
            alike = len(rest) - len(rest.lstrip(rest[:1]))
            entries += [data.draw(st.integers(1, alike)), rest[0]]
        return [Answer(CONTEXT, offset, entries)]

    found = walk_bitmap(len(truth), CONTEXT, ask)
    assert b"".join(bytes([flags]) * (stop - start) for start, stop, flags in found) == truth
    assert found.total(DIRTY) == sum(truth)


@given(
    st.integers(0, 2**40),
    st.lists(
        st.lists(
            st.builds(
                Answer,
                st.sampled_from([CONTEXT, CONTEXT, CONTEXT, "other"]),
                st.integers(0, 3) | st.integers(-1, 2**63),
                st.lists(st.integers(-1, 4) | st.integers(0, 2**64), max_size=9),
            ),
            max_size=2,
        ),
        max_size=10,
    ),
    st.booleans(),
)
def test_liar_gets_a_whole_map_or_an_error(size: int, lies: list[list[Answer]], place_right: bool) -> None:
    said = iter(lies)

    def ask(offset: int, length: int) -> Sequence[Answer]:
        assert 0 <= offset < offset + length <= size
        answers = next(said, [])
        return [Answer(one.context, offset, one.entries) for one in answers] if place_right else answers

    try:
        found = walk_bitmap(size, CONTEXT, ask, most=8)
    except (Unbelievable, Unfinished):
        return
    assert sum(stop - start for start, stop, _ in found) == found.size == size
    assert len(found) <= 8
