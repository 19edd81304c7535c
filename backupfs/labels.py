# SPDX-License-Identifier: GPL-3.0-or-later
"""When each 64 KiB of a disk last changed, told by labels: the instants of our own points in time.

    blocks   |----------|---|------|-------------|
    labels   |  monday  |sun|  tue |   monday    |       starts [0, 10, 13, 19], values [mon, sun, tue, mon]

Law: a block with label L is the same at L and at every later point of the map. The other way round
it need not be so: a label may be younger than the change, whoever goes by it then copies too
much. Never older: he would miss a change. So in doubt a block gets the newest label, and no
block's label ever goes back.

From this follows what changed since any point of ours whose instant is I, checkpoint or none:
the blocks whose label is greater than I.

    label > I     changed between I and now, or it is not known that it did not
    label ≤ I     the same at the label, at I, and now
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import islice
from operator import lt
from typing import Final

from backupfs.changes import BLOCK, Changes, count_blocks, nothing, numbers

MOST_RUNS: Final = 2**21
LARGEST_LABEL: Final = 2**63 - 1


def instants(newest: int) -> array[int]:
    """Return an empty array for labels up to *newest*: four bytes each, until the year 2106."""
    return array("I" if newest < 2**32 else "Q")


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """The labels of a disk of *size* bytes. Immutable; made by `uniform`, `relabel` or `from_runs`."""

    size: int
    starts: array[int]
    values: array[int]
    newest: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "newest", max(self.values))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Labels)
            and self.size == other.size
            and self.starts == other.starts
            and self.values == other.values
        )

    __hash__ = None  # type: ignore[assignment]  # it would have to walk the whole map

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.starts)

    def newest_in(self, start: int, stop: int) -> int:
        """Return the newest label of the bytes [start, stop), which must be some of the disk's.

        Takes the logarithm of the number of runs, and the runs that lie there.
        """
        if not 0 <= start < stop <= self.size:
            raise ValueError(f"[{start}, {stop}) are no bytes of [0, {self.size})")
        first = bisect_right(self.starts, start // BLOCK) - 1
        last = bisect_left(self.starts, count_blocks(stop))
        return max(self.values[first:last])

    def changed_since(self, instant: int) -> Changes:
        """Return all that changed since our point *instant*: the blocks whose label is greater."""
        changes = nothing(self.size)
        if not self.size:
            return changes
        bounds = changes.bounds
        inside = False
        for start, value in zip(self.starts, self.values, strict=True):
            if (value > instant) is not inside:
                bounds.append(start)
                inside = not inside
        if inside:
            bounds.append(count_blocks(self.size))
        return changes

    def relabel(self, changes: Changes, instant: int, *, most: int = MOST_RUNS) -> Labels:
        """Return the map of the next point, *instant*: that label in *changes*, else what it was.

            labels   |  a  | b |    c    |
            changes     |xxxx|     |xx|
            result   |a |instnt|c  |in|c |

        Where there would be more than *most* runs, neighbours get the newer label of the two.
        """
        if changes.size != self.size or instant <= self.newest:
            raise ValueError(f"label {instant} of {changes.size} bytes after {self.newest} of {self.size}")
        starts, values = numbers(self.size), instants(instant)
        ours = self.values if self.values.typecode == values.typecode else array(values.typecode, self.values)

        def append(start: int, value: int) -> None:
            starts.append(start)
            values.append(value)

        blocks, runs = count_blocks(self.size), len(self.starts)
        index, position = 0, 0  # the run of ours that holds position
        bounds = iter(changes.bounds)
        for start in bounds:
            stop = next(bounds)
            while position < start:
                append(position, ours[index])
                end = self.starts[index + 1] if index + 1 < runs else blocks
                position = min(end, start)
                if position == end:
                    index += 1
            append(start, instant)
            position = stop
            index = bisect_right(self.starts, stop, index) - 1
        if position < blocks or not values:  # an empty disk has one run of no blocks
            append(position, ours[index])
            starts.extend(self.starts[index + 1 :])
            values.extend(ours[index + 1 :])
        while len(starts) > most:
            starts, values = _coarser(starts, values)
        return Labels(self.size, starts, values)


def _coarser(starts: array[int], values: array[int]) -> tuple[array[int], array[int]]:
    """Join each two neighbours; the newer label is the safe one."""
    fewer, newer = array(starts.typecode), array(values.typecode)
    for index in range(0, len(starts), 2):
        value = max(values[index : index + 2])
        if not newer or newer[-1] != value:
            fewer.append(starts[index])
            newer.append(value)
    return fewer, newer


def uniform(size: int, instant: int) -> Labels:
    """Return the map of a disk of which nothing is known: all of it may have changed until *instant*."""
    if not 0 <= instant <= LARGEST_LABEL:
        raise ValueError(f"a label of {instant}")
    starts, values = numbers(size), instants(instant)
    starts.append(0)
    values.append(instant)
    return Labels(size, starts, values)


def from_runs(size: int, starts: array[int], values: array[int]) -> Labels:
    """Return the map of these runs; raise ValueError unless they are one's."""
    if starts.typecode != numbers(size).typecode or values.typecode not in "IQ":
        raise ValueError("runs in another form")
    if not starts or len(starts) != len(values):
        raise ValueError("no runs, or half a run")
    if starts[0] != 0 or starts[-1] > max(0, count_blocks(size) - 1):
        raise ValueError(f"runs that are not of {size} bytes")
    if not all(map(lt, starts, islice(starts, 1, None))):
        raise ValueError("runs that are not in order")
    labels = Labels(size, starts, values)
    if labels.newest > LARGEST_LABEL:
        raise ValueError(f"a label of {labels.newest}")
    return labels
