# SPDX-License-Identifier: GPL-3.0-or-later
"""The map of a disk as far as it is known: all of it, but for a disk with a huge map.

    disk     0                                                            size
    known    |========= first =========|      |==window==|window|
    asked                                            when it is needed
    reads as      as the server said     data   as said    as said   data

What the begin of a point could fetch within its bounds, of time and of extents, stays. Beyond
that the disk is mapped in windows, each as long as one question reaches or WINDOW_EXTENTS fill,
when somebody reads or seeks there; the MOST_WINDOWS used last are kept, so the memory has a
bound whatever the disk's size. What is unknown is data: it is read, and that is always right.

A map shall cost less than it saves. A read that adjoins no other is not worth one, so a stretch
is asked for with the second read close to another, or with the one that goes on where a window
ends. And who reads waits for PATIENCE at most since it was asked for, which is less than
reading a window's bytes would take; then he goes on without, and the next one has it.

Law: a stretch that was told to be zero is zero for as long as the point lives. Windows come and
go at any await, and all that may change is that zeros turn into data or back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import trio

from backupfs.allocation import STATUS_LENGTH, Told
from backupfs.extents import Extent, ExtentMap

WINDOW_EXTENTS: Final = 2**16  # 512 KiB of memory
MOST_WINDOWS: Final = 32
GRAIN: Final = 2**26  # bytes: windows begin at a multiple, so that who reads backwards makes no tiny ones
NEAR: Final = 2**25  # bytes: so close to another, a read goes on with it; the kernel's come out of order
READS: Final = 16  # are remembered
PATIENCE: Final = 0.1  # seconds
SEEK_SECONDS: Final = 5.0
MOST_QUESTIONS: Final = 8  # waiting at a time

Ask = Callable[[int, int, int, Callable[[Told], None]], None]


@dataclass(frozen=True, slots=True)
class _Window:
    """[start, stop) of the disk; its map counts from *start*."""

    start: int
    stop: int
    extents: ExtentMap

    def iter_range(self, start: int, stop: int) -> Iterator[Extent]:
        for begin, end, flags in self.extents.iter_range(start - self.start, stop - self.start):
            yield begin + self.start, end + self.start, flags

    def find(self, start: int, stop: int, flag: int, wanted: bool) -> int | None:
        found = self.extents.find(start - self.start, flag, wanted)
        return None if found is None or found + self.start >= stop else found + self.start


@dataclass(eq=False)
class _Walk:
    """A question under way."""

    start: int
    stop: int
    over: trio.Event
    begun: float


class DiskMap:
    """A map that grows where it is used.

    *first* is the whole disk's size long and known up to *known*; it never changes, so what
    lays a file out by the map must lay it out by that. *ask* (start, stop, most extents, callback)
    asks the server for more; None: there is no more to be had, which *why* says.
    """

    def __init__(
        self,
        first: ExtentMap,
        known: int | None = None,
        ask: Ask | None = None,
        *,
        why: str | None = None,
        window_extents: int = WINDOW_EXTENTS,
        most_windows: int = MOST_WINDOWS,
        grain: int = GRAIN,
    ) -> None:
        self.first = first
        self.size = first.size
        self.why = why
        self._known = first.size if ask is None or known is None else known
        self._ask = ask
        self._window_extents = window_extents
        self._most_windows = most_windows
        self._grain = grain
        self._starts: list[int] = []  # of the windows, in order
        self._windows: OrderedDict[int, _Window] = OrderedDict()  # by start; longest unused first
        self._walks: dict[int, _Walk] = {}
        self._reads: deque[int] = deque(maxlen=READS)  # where the last ones began that met the unknown

    # --- what is known -----------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.first) + sum(len(window.extents) for window in self._windows.values())

    def __iter__(self) -> Iterator[Extent]:
        return self.iter_range(0, self.size)

    @property
    def is_whole(self) -> bool:
        """Whether `first` is all that there is to be known."""
        return self._known == self.size

    @property
    def mapped(self) -> int:
        """How many bytes are known."""
        return self._known + sum(window.stop - window.start for window in self._windows.values())

    def knows(self, start: int, stop: int) -> bool:
        """Whether [start, stop) is known."""
        return stop <= self._known or all(window is not None for _, _, window in self._pieces(start, stop))

    def iter_range(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield the extents of [start, stop), as `ExtentMap.iter_range` does."""
        if stop <= self._known or not 0 <= start <= stop <= self.size:
            return self.first.iter_range(start, stop)
        return _joined(
            extent
            for begin, end, window in self._pieces(start, stop)
            for extent in ([(begin, end, 0)] if window is None else window.iter_range(begin, end))
        )

    def find(self, offset: int, flag: int, wanted: bool) -> int | None:
        """Return the first byte from *offset* on where *flag* is set (or not); None: nowhere."""
        if self._known == self.size or offset < 0:
            return self.first.find(offset, flag, wanted)
        for begin, end, window in self._pieces(offset, self.size):
            found = window.find(begin, end, flag, wanted) if window is not None else None if wanted else begin
            if found is not None:
                return found
        return None

    def total(self, flag: int) -> int:
        """Return how many bytes have *flag*; of what the begin did not map, as many as of what it did.

        Somewhat less than all where not all is known: a file that is told to have no holes is not
        searched for any.
        """
        unknown = self.size - self._known
        if not unknown:
            return self.first.total(flag)
        of_known = self.first.total(flag)
        guess = of_known * unknown // self._known if self._known else 0
        return max(of_known + guess, min(4096, self.size))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, _Window | None]]:
        """Yield what makes up [start, stop): windows, and None for what is unknown."""
        if start < min(self._known, stop):
            yield start, min(self._known, stop), _Window(0, self._known, self.first)
            start = self._known
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            window = self._windows[self._starts[index]] if index < len(self._starts) else None
            if window is not None and window.stop <= start:
                index += 1
                continue
            if window is None or start < window.start:
                end = stop if window is None else min(stop, window.start)
                yield start, end, None
            else:
                self._windows.move_to_end(window.start)
                end = min(stop, window.stop)
                yield start, end, window
            start = end

    # --- making more known -------------------------------------------------------------------

    async def cover(self, start: int, stop: int) -> None:
        """Have [start, stop) mapped for a read, if that is worth while and does not take long."""
        if (gap := self._gap(start, stop)) is None or not self._goes_on(start, stop, gap):
            return
        walk = self._begin(gap)
        if walk is not None:
            with trio.move_on_at(walk.begun + PATIENCE):
                await walk.over.wait()

    async def locate(self, offset: int, flag: int, wanted: bool) -> int | None:
        """Do as `find`, but map what lies on the way; after SEEK_SECONDS the rest counts as data."""
        position = offset
        with trio.move_on_after(SEEK_SECONDS):
            while self._known < self.size and 0 <= position < self.size:
                begin, end, window = next(self._pieces(position, self.size))
                if window is None:
                    if (walk := self._begin(begin)) is None:
                        break
                    await walk.over.wait()
                elif (found := window.find(begin, end, flag, wanted)) is not None:
                    return found
                else:
                    position = end
        return self.find(position, flag, wanted)

    def _gap(self, start: int, stop: int) -> int | None:
        """Return the first unknown byte of [start, stop)."""
        return next((begin for begin, _, window in self._pieces(start, stop) if window is None), None)

    def _goes_on(self, start: int, stop: int, gap: int) -> bool:
        """Whether the read of [start, stop) goes on with another, or where a window ends; note it."""
        near = any(abs(start - other) <= NEAR for other in self._reads)
        self._reads.append(start)
        return near or start < gap or gap - self._end_before(gap) <= NEAR

    def _end_before(self, offset: int) -> int:
        """Return where what is known before the unknown byte at *offset* ends; 0 is no such end."""
        index = bisect_right(self._starts, offset) - 1
        end = self._windows[self._starts[index]].stop if index >= 0 else self._known
        return end or -NEAR - 1

    def _begin(self, gap: int) -> _Walk | None:
        """Ask for the stretch around the unknown byte at *gap*; None: it cannot be asked for now."""
        for walk in self._walks.values():
            if walk.start <= gap < walk.stop:
                return walk
        if self._ask is None or len(self._walks) >= MOST_QUESTIONS:
            return None
        index = bisect_right(self._starts, gap)
        start = max(gap - gap % self._grain, self._windows[self._starts[index - 1]].stop if index else self._known)
        stop = min(start + STATUS_LENGTH, self._starts[index] if index < len(self._starts) else self.size)
        # Another one's stretch may lie on either side.
        for other in self._walks.values():
            if other.stop <= gap:
                start = max(start, other.stop)
            if other.start > gap:
                stop = min(stop, other.start)
        walk = self._walks[start] = _Walk(start, stop, trio.Event(), trio.current_time())
        self._ask(start, stop, self._window_extents, lambda told: self._arrive(walk, told))
        return walk

    def _arrive(self, walk: _Walk, told: Told) -> None:
        """Keep what was told, in the place of the window that was used least lately."""
        del self._walks[walk.start]
        # Where it failed, it would again: what is missing is data for as long as that is remembered.
        stop = walk.start + told.stop if told.is_full else walk.stop
        if not told.is_full and told.why is not None:
            self.why = told.why
        if len(self._windows) >= self._most_windows:
            gone, _ = self._windows.popitem(last=False)
            self._starts.remove(gone)
        self._starts.insert(bisect_right(self._starts, walk.start), walk.start)
        self._windows[walk.start] = _Window(walk.start, stop, told.extents)
        walk.over.set()


def _joined(extents: Iterator[Extent]) -> Iterator[Extent]:
    """Yield the extents with neighbours of the same flags made one."""
    pending: Extent | None = None
    for start, stop, flags in extents:
        if pending is not None and pending[2] == flags:
            pending = pending[0], stop, flags
        else:
            if pending is not None:
                yield pending
            pending = start, stop, flags
    if pending is not None:
        yield pending
