# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of blocks against Python's sets, and labels against a list of them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backupfs.changes import BLOCK, Changes, count_blocks, difference, from_bounds, from_extents, union
from backupfs.extents import DIRTY, ZERO, Builder
from backupfs.labels import from_runs, uniform

MOST = 40
sizes = st.integers(0, MOST * BLOCK)
members = st.sets(st.integers(0, MOST - 1))


def made(size: int, wanted: set[int]) -> Changes:
    builder = Builder(size)
    while builder.position < size:
        length = min(BLOCK, size - builder.position)
        builder.append(length, DIRTY if builder.position // BLOCK in wanted else 0)
    return from_extents(builder.finish())


def plain(changes: Changes) -> set[int]:
    return {block for start, stop in changes for block in range(start // BLOCK, count_blocks(stop))}


@given(sizes, members, members)
def test_operations_are_those_of_sets(size: int, first: set[int], second: set[int]) -> None:
    blocks = set(range(count_blocks(size)))
    first, second = first & blocks, second & blocks
    one, other = made(size, first), made(size, second)
    assert plain(one) == first
    assert plain(union(one, other)) == first | second
    assert plain(difference(one, other)) == first - second
    assert one.covers(other) is (first >= second)
    assert (one == other) is (first == second)
    assert union(one, other) == made(size, first | second)
    assert difference(one, other) == made(size, first - second)
    assert from_bounds(size, one.bounds) == one
    assert from_extents(one.to_extents()) == one
    assert one.total() == sum(min(BLOCK, size - block * BLOCK) for block in first)


@given(st.lists(st.tuples(st.integers(1, 3 * BLOCK), st.integers(0, 3)), max_size=30))
def test_any_dirty_byte_makes_its_block_dirty(extents: list[tuple[int, int]]) -> None:
    builder = Builder(sum(length for length, _ in extents))
    expected: set[int] = set()
    for length, flags in extents:
        if flags & DIRTY:
            start = builder.position
            expected |= set(range(start // BLOCK, count_blocks(start + length)))
        builder.append(length, flags & (DIRTY | ZERO))
    changes = from_extents(builder.finish())
    assert plain(changes) == expected
    bounds = list(changes.bounds)
    assert bounds == sorted(set(bounds))  # in order, and none touches the next


@given(sizes, st.lists(members, max_size=8), st.integers(1, 50), st.data())
def test_labels_are_those_of_a_list(size: int, points: list[set[int]], most: int, data: st.DataObject) -> None:
    count = count_blocks(size)
    labels, expected, exact = uniform(size, 1), [1] * count, True
    for instant, written in enumerate(points, 2):
        labels = labels.relabel(made(size, written), instant, most=most)
        expected = [instant if block in written else old for block, old in enumerate(expected)]
        runs = sum(1 for block in range(count) if block == 0 or expected[block] != expected[block - 1])
        exact = exact and runs <= most
        assert len(labels) <= most
        found = [labels.newest_in(block * BLOCK, min(size, block * BLOCK + 1)) for block in range(count)]
        assert all(one >= other for one, other in zip(found, expected, strict=True))
        if exact:
            assert found == expected
        expected = found
        assert len(labels) == max(1, sum(1 for block in range(count) if block == 0 or found[block] != found[block - 1]))
        assert from_runs(size, labels.starts, labels.values) == labels
        assert plain(labels.changed_since(instant - 1)) == {b for b, label in enumerate(found) if label == instant}
    since = data.draw(st.integers(0, len(points) + 2))
    assert plain(labels.changed_since(since)) == {block for block, label in enumerate(expected) if label > since}
    if size:
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        assert labels.newest_in(start, stop) == max(expected[start // BLOCK : count_blocks(stop)])
        assert labels.newest == max(expected)
