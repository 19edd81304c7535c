# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest

from backupfs.extents import DIRTY, ZERO, Builder
from backupfs.runs import Runs, iter_coarser, iter_touched, iter_union, split

DRAWN = Runs([(1, 4), (7, 9)])  # the drawing of the module


def test_runs_that_touch_or_overlap_are_one() -> None:
    found = Runs([(0, 2), (2, 3), (5, 9), (6, 7), (8, 11)])
    assert list(found) == [(0, 3), (5, 11)]
    assert (len(found), found.count) == (2, 9)


def test_nothing_is_in_an_empty_set() -> None:
    empty = Runs(())
    assert (len(empty), empty.count, list(empty)) == (0, 0, [])
    assert list(empty.iter_range(0, 100)) == list(empty.iter_ranks(0, 100)) == []


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((2, 8), [(2, 4, 1), (7, 8, 3)]),
        ((0, 10), [(1, 4, 0), (7, 9, 3)]),
        ((4, 7), []),
        ((0, 1), []),
        ((9, 10), []),
        ((8, 20), [(8, 9, 4)]),
    ],
)
def test_a_range_tells_the_rank_of_each_of_its_runs(window: tuple[int, int], expected: list[object]) -> None:
    assert list(DRAWN.iter_range(*window)) == expected


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [((0, 5), [(1, 4), (7, 9)]), ((2, 4), [(3, 4), (7, 8)]), ((3, 4), [(7, 8)]), ((2, 2), []), ((5, 9), [])],
)
def test_ranks_lead_back_to_the_numbers(ranks: tuple[int, int], expected: list[object]) -> None:
    assert list(DRAWN.iter_ranks(*ranks)) == expected


def test_a_unit_is_touched_where_any_byte_of_it_is() -> None:
    builder = Builder(40)
    for length, flags in ((5, ZERO), (1, 0), (14, ZERO), (10, DIRTY), (10, ZERO | DIRTY)):
        builder.append(length, flags)
    extents = builder.finish()
    assert list(Runs(iter_touched(extents, ZERO, wanted=False, unit=10))) == [(0, 1), (2, 3)]
    assert list(Runs(iter_touched(extents, ZERO, wanted=True, unit=10))) == [(0, 2), (3, 4)]
    assert list(Runs(iter_touched(extents, DIRTY, wanted=True, unit=7))) == [(2, 6)]


def test_coarser_runs_are_of_units_that_hold_any() -> None:
    assert list(Runs(iter_coarser([(0, 1), (9, 11), (35, 40)], 10))) == [(0, 2), (3, 4)]


def test_a_set_is_split_by_another() -> None:
    both, rest = split(Runs([(0, 8), (14, 22), (30, 31)]), Runs([(4, 16), (18, 19), (40, 50)]))
    assert list(both) == [(4, 8), (14, 16), (18, 19)]
    assert list(rest) == [(0, 4), (16, 18), (19, 22), (30, 31)]
    both, rest = split(DRAWN, DRAWN)
    assert (list(both), rest.count) == (list(DRAWN), 0)
    # What comes twice, as runs that were rounded to units do, is there once.
    both, rest = split([(0, 5), (4, 9), (4, 6), (8, 9)], [(1, 3), (2, 5), (8, 20)])
    assert (list(both), list(rest)) == ([(1, 5), (8, 9)], [(0, 1), (5, 8)])


def test_a_union_is_what_is_in_either() -> None:
    assert list(Runs(iter_union(DRAWN, [(3, 8)]))) == [(1, 9)]
