# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest

from backupfs.extents import DIRTY, LARGEST, ZERO, Builder, ExtentMap, combine, uniform


def made(*extents: tuple[int, int]) -> ExtentMap:
    builder = Builder(sum(length for length, _ in extents))
    for length, flags in extents:
        builder.append(length, flags)
    return builder.finish()


def test_neighbours_with_the_same_flags_become_one() -> None:
    assert list(made((5, 0), (5, 0), (3, ZERO))) == [(0, 10, 0), (10, 13, ZERO)]
    assert len(made((5, 0), (5, 0), (3, ZERO))) == 2


def test_range_is_clipped_at_both_ends() -> None:
    found = made((10, 0), (10, ZERO), (10, DIRTY))
    assert list(found.iter_range(5, 25)) == [(5, 10, 0), (10, 20, ZERO), (20, 25, DIRTY)]
    assert list(found.iter_range(12, 13)) == [(12, 13, ZERO)]
    assert list(found.iter_range(7, 7)) == []
    assert list(found.iter_range(30, 30)) == []


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 31), (9, 3)])
def test_range_outside_the_map_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="is not in"):
        list(made((30, 0)).iter_range(start, stop))


def test_flags_at_each_side_of_a_border() -> None:
    found = made((10, 0), (10, ZERO))
    assert [found.flags_at(offset) for offset in (0, 9, 10, 19)] == [0, 0, ZERO, ZERO]
    for outside in (-1, 20):
        with pytest.raises(ValueError, match="is not in"):
            found.flags_at(outside)


def test_find_looks_from_the_offset_on() -> None:
    found = made((10, 0), (10, ZERO), (10, 0))
    assert found.find(0, ZERO, True) == 10
    assert found.find(15, ZERO, True) == 15
    assert found.find(12, ZERO, False) == 20
    assert found.find(20, ZERO, True) is None
    assert found.find(99, ZERO, False) is None


def test_total_counts_bytes() -> None:
    assert made((10, 0), (7, ZERO), (3, ZERO | DIRTY)).total(ZERO) == 10


@pytest.mark.parametrize(("length", "flags"), [(0, 0), (-3, 0), (11, 0), (1, 4), (1, -1)])
def test_builder_refuses_what_cannot_be(length: int, flags: int) -> None:
    with pytest.raises(ValueError, match=r"extent|flags"):
        Builder(10).append(length, flags)


def test_builder_refuses_sizes_beyond_the_words() -> None:
    with pytest.raises(ValueError, match="a map of"):
        Builder(LARGEST + 1)


def test_what_is_missing_at_the_end_is_filled() -> None:
    builder = Builder(10)
    builder.append(4, ZERO)
    assert list(builder.finish()) == [(0, 4, ZERO), (4, 10, 0)]
    assert len(builder) == 2


def test_empty_map_has_nothing() -> None:
    assert list(uniform(0)) == []


def test_combine_is_zero_only_where_both_are() -> None:
    both = combine(made((10, ZERO), (10, 0)), made((5, 0), (15, ZERO)), lambda one, other: one & other)
    assert list(both) == [(0, 5, 0), (5, 10, ZERO), (10, 20, 0)]
    with pytest.raises(ValueError, match="maps of"):
        combine(uniform(1), uniform(2), lambda one, other: one)


def test_maps_are_equal_when_they_say_the_same() -> None:
    assert made((10, 0), (5, ZERO)) == made((4, 0), (6, 0), (5, ZERO))
    assert made((10, 0)) != made((10, ZERO))
    assert made((10, 0)) != made((11, 0))
    assert made((10, 0)) != "a map"
    with pytest.raises(TypeError, match="unhashable"):
        hash(uniform(1))
