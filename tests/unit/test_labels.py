# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from array import array

import pytest

from backupfs.changes import BLOCK, everything, from_bounds, nothing
from backupfs.labels import Labels, from_runs, uniform

SIZE = 10 * BLOCK - 5


def two_points() -> Labels:
    return uniform(SIZE, 100).relabel(from_bounds(SIZE, array("I", [2, 4, 9, 10])), 200)


def test_label_is_the_newest_of_the_blocks_touched() -> None:
    labels = two_points()
    assert labels.newest == 200
    assert labels.newest_in(0, 2 * BLOCK) == 100
    assert labels.newest_in(0, 2 * BLOCK + 1) == 200
    assert labels.newest_in(4 * BLOCK - 1, 4 * BLOCK) == 200
    assert labels.newest_in(4 * BLOCK, 9 * BLOCK) == 100
    assert labels.newest_in(SIZE - 1, SIZE) == 200
    assert len(labels) == 4


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 1), (2, 1), (0, SIZE + 1)])
def test_label_of_no_bytes_is_an_error(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="are no bytes of"):
        two_points().newest_in(start, stop)


def test_changed_since_a_point_is_what_has_a_newer_label() -> None:
    labels = two_points()
    assert labels.changed_since(99) == everything(SIZE)
    assert labels.changed_since(100) == from_bounds(SIZE, array("I", [2, 4, 9, 10]))
    assert labels.changed_since(200) == nothing(SIZE)
    assert labels.relabel(everything(SIZE), 300).changed_since(200) == everything(SIZE)


def test_nothing_changed_leaves_all_as_it_was() -> None:
    labels = two_points()
    assert labels.relabel(nothing(SIZE), 300) == labels
    assert labels != uniform(SIZE, 100)
    assert labels != "labels"


@pytest.mark.parametrize("instant", [100, 200])
def test_labels_never_go_back(instant: int) -> None:
    with pytest.raises(ValueError, match=f"label {instant} of"):
        two_points().relabel(nothing(SIZE), instant)


def test_changes_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="label 300 of 1 bytes"):
        two_points().relabel(nothing(1), 300)


def test_too_many_runs_are_joined_by_the_newer_label() -> None:
    labels = uniform(SIZE, 100)
    labels = labels.relabel(from_bounds(SIZE, array("I", [1, 2, 5, 6, 8, 9])), 200, most=4)
    # 100 200 | 100 200 | 100 200 | 100
    assert list(labels.starts) == [0, 9]
    assert list(labels.values) == [200, 100]
    labels = labels.relabel(from_bounds(SIZE, array("I", [4, 5])), 300, most=1)
    assert list(labels.values) == [300]


def test_labels_beyond_the_year_2106_are_possible() -> None:
    late = two_points().relabel(from_bounds(SIZE, array("I", [3, 4])), 2**33)
    assert (late.newest, late.newest_in(0, BLOCK), late.newest_in(2 * BLOCK, 3 * BLOCK)) == (2**33, 100, 200)
    assert late.relabel(everything(SIZE), 2**33 + 1) == uniform(SIZE, 2**33 + 1)


def test_empty_disk_has_a_label_too() -> None:
    labels = uniform(0, 5)
    assert labels.newest == 5
    assert labels.relabel(nothing(0), 6).newest == 5
    assert labels.changed_since(4) == nothing(0)


@pytest.mark.parametrize(
    ("starts", "values"),
    [
        (array("I"), array("I")),
        (array("I", [0]), array("I")),
        (array("Q", [0]), array("I", [1])),
        (array("I", [0]), array("d", [1])),
        (array("I", [1]), array("I", [1])),
        (array("I", [0, 10]), array("I", [1, 2])),
        (array("I", [0, 5, 5]), array("I", [1, 2, 3])),
        (array("I", [0]), array("Q", [2**63])),
    ],
    ids=str,
)
def test_runs_that_are_no_map_are_refused(starts: array[int], values: array[int]) -> None:
    with pytest.raises(ValueError, match=r"run|label"):
        from_runs(SIZE, starts, values)


def test_runs_of_a_map_are_taken() -> None:
    assert from_runs(SIZE, array("I", [0, 2, 4, 9]), array("I", [100, 200, 100, 200])) == two_points()
    assert from_runs(0, array("I", [0]), array("I", [7])) == uniform(0, 7)
    with pytest.raises(ValueError, match="a label of -1"):
        uniform(1, -1)
