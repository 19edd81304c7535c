# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from array import array

import pytest

from backupfs.changes import BLOCK, Changes, difference, everything, from_bounds, from_extents, nothing, union
from backupfs.extents import DIRTY, ZERO, Builder

TIB = 2**40


def dirty(*extents: tuple[int, int]) -> Changes:
    builder = Builder(sum(length for length, _ in extents))
    for length, flags in extents:
        builder.append(length, flags)
    return from_extents(builder.finish())


def test_block_with_one_dirty_byte_is_dirty() -> None:
    found = dirty((BLOCK - 1, 0), (2, DIRTY), (2 * BLOCK, ZERO), (BLOCK, 0), (1, DIRTY | ZERO))
    assert list(found) == [(0, 2 * BLOCK), (4 * BLOCK, 4 * BLOCK + 2)]
    assert found.size == 4 * BLOCK + 2
    assert found.total() == 2 * BLOCK + 2


def test_finer_runs_within_a_block_or_side_by_side_become_one() -> None:
    found = dirty((1, 0), (1, DIRTY), (1, 0), (1, DIRTY), (BLOCK - 4, 0), (1, DIRTY), (5 * BLOCK, 0))
    assert list(found.bounds) == [0, 2]


def test_extents_are_of_the_disk_as_it_is() -> None:
    found = dirty((BLOCK, 0), (1, DIRTY), (BLOCK, 0), (7, DIRTY))
    assert list(found.to_extents()) == [(0, BLOCK, 0), (BLOCK, 2 * BLOCK + 8, DIRTY)]
    assert list(nothing(0).to_extents()) == []
    assert list(everything(5).to_extents()) == [(0, 5, DIRTY)]
    assert list(dirty((1, DIRTY), (3 * BLOCK, 0)).to_extents()) == [(0, BLOCK, DIRTY), (BLOCK, 3 * BLOCK + 1, 0)]


def test_empty_disk_has_no_blocks() -> None:
    assert everything(0) == nothing(0)
    assert len(everything(0)) == 0


def test_sixteen_tebibytes_with_few_runs_are_small_and_a_pebibyte_is_possible() -> None:
    found = everything(16 * TIB)
    assert found.bounds.typecode == "I"
    assert list(found) == [(0, 16 * TIB)]
    huge = everything(1024 * TIB)
    assert list(huge) == [(0, 1024 * TIB)]
    assert union(huge, nothing(1024 * TIB)) == huge


def test_sets_of_different_disks_do_not_mix() -> None:
    for function in (union, difference, Changes.covers):
        with pytest.raises(ValueError, match="changes of 1 and 2 bytes"):
            function(nothing(1), nothing(2))
    assert nothing(1) != nothing(2)
    assert nothing(1) != "nothing"


@pytest.mark.parametrize(
    "bounds",
    [array("I", [1]), array("I", [3, 1]), array("I", [1, 2, 2, 3]), array("I", [0, 5]), array("Q", [0, 1])],
    ids=str,
)
def test_bounds_that_are_no_sets_are_refused(bounds: array[int]) -> None:
    with pytest.raises(ValueError, match="run"):
        from_bounds(4 * BLOCK, bounds)


def test_bounds_of_a_set_are_taken() -> None:
    assert from_bounds(4 * BLOCK, array("I", [0, 1, 3, 4])) == dirty((1, DIRTY), (3 * BLOCK, 0), (BLOCK - 1, DIRTY))
    assert from_bounds(0, array("I")) == nothing(0)
    for size in (-1, 2**62):
        with pytest.raises(ValueError, match="a set of changes of"):
            nothing(size)


def test_difference_cuts_runs_and_leaves_what_is_between() -> None:
    one = from_bounds(20 * BLOCK, array("I", [0, 5, 6, 10, 12, 13, 15, 20]))
    other = from_bounds(20 * BLOCK, array("I", [1, 2, 4, 7, 8, 9, 12, 14, 19, 20]))
    assert list(difference(one, other).bounds) == [0, 1, 2, 4, 7, 8, 9, 10, 15, 19]
    assert difference(one, nothing(20 * BLOCK)) == one
    assert difference(one, everything(20 * BLOCK)) == nothing(20 * BLOCK)
