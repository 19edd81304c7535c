# SPDX-License-Identifier: GPL-3.0-or-later
"""Which blocks of a disk changed between two instants: a set of 64 KiB blocks, as runs.

    bytes    0        64K       128K      192K      256K      320K
             |---------|--dirty--|-dirty---|---------|---d-----|
    bounds   [ 1, 3,  4, 5 ]                blocks [1, 3) and [4, 5)

A dirty bitmap may be finer or coarser than a block. A block of which any byte is dirty is in the
set as a whole: rounding outward may copy too much, never too little.

A set is a flat array of bounds, ascending, two for each run, and no two runs touch. So equal sets
are equal arrays, a million runs (two million extents) are 8 MB, and every operation is one
merge. Sets are immutable.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import lt
from typing import Final

from backupfs.extents import DIRTY, LARGEST, Builder, ExtentMap

BLOCK: Final = 64 * 1024  # bytes
MOST_RUNS: Final = 2**20


def count_blocks(size: int) -> int:
    """Return how many blocks *size* bytes have; the last may be a part of one."""
    return -(-size // BLOCK)


def numbers(size: int) -> array[int]:
    """Return an empty array for block numbers of a disk of *size* bytes: four bytes each, up to 256 TiB."""
    return array("I" if count_blocks(size) < 2**32 else "Q")


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The changed blocks of a disk of *size* bytes. Made by the functions below."""

    size: int
    bounds: array[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Changes) and self.size == other.size and self.bounds == other.bounds

    __hash__ = None  # type: ignore[assignment]  # it would have to walk the whole set

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.bounds) // 2

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield the runs in bytes, [start, stop)."""
        bounds = iter(self.bounds)
        for start, stop in zip(bounds, bounds, strict=True):
            yield start * BLOCK, min(stop * BLOCK, self.size)

    def total(self) -> int:
        """Return how many bytes changed."""
        return sum(stop - start for start, stop in self)

    def to_extents(self) -> ExtentMap:
        """Return the map that is DIRTY where the disk changed; `extents.combine` joins it with zeros."""
        builder = Builder(self.size)
        for start, stop in self:
            if start > builder.position:
                builder.append(start - builder.position, 0)
            builder.append(stop - start, DIRTY)
        return builder.finish()

    def covers(self, other: Changes) -> bool:
        """Whether every block of *other* is in this set too."""
        _check_sizes(self, other)
        # No two runs of a set touch, so each run of theirs lies within one of ours.
        ours, start, stop = iter(self.bounds), 0, 0
        theirs = iter(other.bounds)
        for first, last in zip(theirs, theirs, strict=True):
            while stop < last:
                start = next(ours, -1)
                if start < 0:
                    return False
                stop = next(ours)
            if first < start:
                return False
        return True


def nothing(size: int) -> Changes:
    """Return the empty set."""
    if not 0 <= size <= LARGEST:
        raise ValueError(f"a set of changes of {size} bytes")
    return Changes(size, numbers(size))


def everything(size: int) -> Changes:
    """Return the set of all blocks."""
    changes = nothing(size)
    if size:
        changes.bounds.extend((0, count_blocks(size)))
    return changes


def from_extents(extents: ExtentMap) -> Changes:
    """Return the blocks that are DIRTY anywhere.

    extents  |----|-d-|----|d|------|    dirty bytes
    blocks   |----d----|----d----|-------
    """
    changes = nothing(extents.size)
    bounds = changes.bounds
    for start, stop, flags in extents:
        if flags & DIRTY:
            _append(bounds, start // BLOCK, count_blocks(stop))
    return changes


def from_bounds(size: int, bounds: array[int]) -> Changes:
    """Return the set with these *bounds*; raise ValueError unless they are one's."""
    changes = nothing(size)
    if bounds.typecode != changes.bounds.typecode or len(bounds) % 2:
        raise ValueError("half a run")
    if bounds and bounds[-1] > count_blocks(size):
        raise ValueError(f"a run beyond {size} bytes")
    if not all(map(lt, bounds, islice(bounds, 1, None))):
        raise ValueError("runs that are not in order")
    return Changes(size, bounds)


def _append(bounds: array[int], start: int, stop: int) -> None:
    """Add a run that begins not before the last one; what touches becomes one."""
    if bounds and start <= bounds[-1]:
        bounds[-1] = max(bounds[-1], stop)
    else:
        bounds.append(start)
        bounds.append(stop)


def union(one: Changes, other: Changes) -> Changes:
    """Return the blocks that are in either.

    one      |--aa---|---bb|
    other    |---cc--|ddd--|
    result   |--===--|=====|
    """
    _check_sizes(one, other)
    result = nothing(one.size)
    bounds = result.bounds
    for start, stop in _in_order(one.bounds, other.bounds):
        _append(bounds, start, stop)
    return result


def _in_order(one: array[int], other: array[int]) -> Iterator[tuple[int, int]]:
    """Yield the runs of both by their start."""
    i = j = 0
    while i < len(one) and j < len(other):
        if one[i] <= other[j]:
            yield one[i], one[i + 1]
            i += 2
        else:
            yield other[j], other[j + 1]
            j += 2
    for rest, k in ((one, i), (other, j)):
        for index in range(k, len(rest), 2):
            yield rest[index], rest[index + 1]


def difference(one: Changes, other: Changes) -> Changes:
    """Return the blocks of *one* that are not in *other*.

    one      |--aaaaa|aa---|
    other    |---cc--|-----|
    result   |--=--==|==---|
    """
    _check_sizes(one, other)
    result = nothing(one.size)
    bounds, theirs = result.bounds, other.bounds
    j = 0
    ours = iter(one.bounds)
    for start, stop in zip(ours, ours, strict=True):
        while start < stop:
            while j < len(theirs) and theirs[j + 1] <= start:
                j += 2
            if j == len(theirs) or theirs[j] >= stop:
                _append(bounds, start, stop)
                break
            if theirs[j] > start:
                _append(bounds, start, theirs[j])
            start = theirs[j + 1]
    return result


def _check_sizes(one: Changes, other: Changes) -> None:
    if one.size != other.size:
        raise ValueError(f"changes of {one.size} and {other.size} bytes")
