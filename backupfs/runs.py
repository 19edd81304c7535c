# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of numbers that come in runs, and which place each has among them.

    numbers   0  1  2  3  4  5  6  7  8  9
    in it        x  x  x           x  x
    rank         0  1  2           3  4
    starts    [ 1, 7 ]       before  [ 0, 3 ]       and their count, 5

Two flat arrays hold it, whatever the numbers are: a million runs take 16 MB. A run ends where
`before` says that the next one begins to count. Runs never touch: those that do become one.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final

from backupfs.extents import ExtentMap

Run = tuple[int, int]  # start, stop

_END: Final = (2**64, 2**64)


class Runs:
    """An immutable set of numbers, made from runs that are sorted by their start; they may overlap."""

    __slots__ = ("_before", "_starts", "_stop", "count")

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self._starts = array("Q")
        self._before = array("Q")
        self._stop = -1
        self.count = 0
        for start, stop in runs:
            self._add(start, stop)

    def _add(self, start: int, stop: int) -> None:
        """Add a run that starts no earlier than the last one; only while the set is being made."""
        if start > self._stop:
            self._starts.append(start)
            self._before.append(self.count)
            self.count += stop - start
            self._stop = stop
        elif stop > self._stop:
            self.count += stop - self._stop
            self._stop = stop

    def __len__(self) -> int:
        """Return how many runs there are."""
        return len(self._starts)

    def __iter__(self) -> Iterator[Run]:
        return ((start, stop) for start, stop, _ in self._from(0))

    def iter_range(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield what of the runs lies in [start, stop), each with the rank of its first number.

        numbers     0  1  2  3  4  5  6  7  8  9
        in it          x  x  x           x  x
        range             [················)
        yields            |2, 4, 1|      |7, 8, 3|
        """
        for begin, end, rank in self._from(max(0, bisect_right(self._starts, start) - 1)):
            if begin >= stop:
                return
            if end > start:
                low = max(begin, start)
                yield low, min(end, stop), rank + low - begin

    def iter_ranks(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs of those numbers whose ranks are in [start, stop)."""
        for begin, end, rank in self._from(max(0, bisect_right(self._before, start) - 1)):
            if rank >= stop:
                return
            low, high = begin + max(0, start - rank), min(end, begin + stop - rank)
            if low < high:
                yield low, high

    def _from(self, first: int) -> Iterator[tuple[int, int, int]]:
        starts, before = self._starts, self._before
        last = len(starts) - 1
        for index in range(first, last + 1):
            rank = before[index]
            yield starts[index], starts[index] + (before[index + 1] if index < last else self.count) - rank, rank


def iter_touched(extents: ExtentMap, flag: int, *, wanted: bool, unit: int) -> Iterator[Run]:
    """Yield the runs of units of *unit* bytes in which *flag* is set (or not) anywhere; sorted, they may overlap."""
    for start, stop, flags in extents:
        if bool(flags & flag) is wanted:
            yield start // unit, -(-stop // unit)


def iter_coarser(runs: Iterable[Run], unit: int) -> Iterator[Run]:
    """Yield the runs of units of *unit* numbers of which any is in *runs*; sorted, they may overlap."""
    for start, stop in runs:
        yield start // unit, -(-stop // unit)


def iter_union(one: Iterable[Run], other: Iterable[Run]) -> Iterator[Run]:
    """Yield the runs of both, each of which is sorted; so are they then, and may overlap."""
    return heapq.merge(one, other)


def split(wanted: Iterable[Run], other: Iterable[Run]) -> tuple[Runs, Runs]:
    """Return what of *wanted* is in *other*, and what is not; both come sorted by their starts.

    wanted   |-------|     |-------|
    other        |-----------|
    both         |---|     |-|
    rest     |---|           |-----|
    """
    both, rest = Runs(), Runs()
    others = iter(other)
    low = high = done = 0
    for start, stop in wanted:
        start = max(start, done)
        while start < stop:
            while high <= start:
                low, high = next(others, _END)
            if low <= start:
                done = min(stop, high)
                both._add(start, done)
            else:
                done = min(stop, low)
                rest._add(start, done)
            start = done
    return both, rest
