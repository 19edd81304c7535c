# SPDX-License-Identifier: GPL-3.0-or-later
"""What changed in a disk, as JSON: a file of lines of one length, made up when they are asked for.

    {"format": "backupfs extents", "version": 1, …, "count": 2, "extents": [
    {"start":     65536, "length":    131072, "zero": false},
    {"start":   1048576, "length":     65536, "zero": true }
    ]}

Numbers are padded with spaces, which JSON allows; so line n lies at a known place, and the size is
known before a line is written. The lines themselves are made from the maps: of each 256th only
its place in the disk is kept, from where the walk to the others is short.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from backupfs.extents import DIRTY, ZERO, Extent, ExtentMap, seek_dense
from backupfs.image import Literal, Segment
from backupfs.origin import Origin

FORMAT: Final = "backupfs extents"
VERSION: Final = 1
MARK: Final = 256  # lines from one place that is kept to the next
LITERAL: Final = 1024  # lines in a literal, at most
_TAIL: Final = b"]}\n"


@dataclass(frozen=True, slots=True, eq=False)
class ExtentsJson:
    """The file; got with `render_extents`. Reads nothing of the disk."""

    _extents: ExtentMap
    _dirty: ExtentMap
    _head: bytes
    _count: int
    _marks: array[int]

    @property
    def size(self) -> int:
        return len(self._head) + self._count * self._line + len(_TAIL)

    @property
    def allocated(self) -> int:
        return self.size

    @property
    def _digits(self) -> int:
        return len(str(self._extents.size))

    @property
    def _line(self) -> int:
        """Bytes of a line."""
        return len(_render(0, 0, 0, self._digits, b","))

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Say that all is data."""
        return seek_dense(self.size, offset, data=data)

    def segments(self, start: int, stop: int) -> Iterator[Segment[Any]]:
        """Yield literals: the head, so many lines at a time, the tail."""
        if start < min(stop, len(self._head)):
            yield Literal(self._head[start:stop])
            start = min(stop, len(self._head))
        tail, line = self.size - len(_TAIL), self._line
        while start < min(stop, tail):
            first, skip = divmod(start - len(self._head), line)
            last = min(first + LITERAL, -(-(min(stop, tail) - len(self._head)) // line))
            data = b"".join(self._lines(first, last))[skip : skip + stop - start]
            yield Literal(data)
            start += len(data)
        if start < stop:
            yield Literal(_TAIL[start - tail : stop - tail])

    def _lines(self, first: int, last: int) -> Iterator[bytes]:
        found = _iter_changes(self._extents, self._dirty, self._marks[first // MARK])
        skipped = first // MARK * MARK
        for number, (start, stop, flags) in enumerate(itertools.islice(found, first - skipped, last - skipped), first):
            yield _render(start, stop - start, flags, self._digits, b"," if number + 1 < self._count else b" ")


def _render(start: int, length: int, flags: int, digits: int, comma: bytes) -> bytes:
    zero = b"true " if flags & ZERO else b"false"
    return b'{"start": %*d, "length": %*d, "zero": %s}%s\n' % (digits, start, digits, length, zero, comma)


def _iter_changes(extents: ExtentMap, dirty: ExtentMap, start: int) -> Iterator[Extent]:
    """Yield what is dirty from *start* on, in pieces that are either zero or not."""
    for begin, end, flags in dirty.iter_range(start, dirty.size):
        if flags & DIRTY:
            yield from extents.iter_range(begin, end)


def render_extents(extents: ExtentMap, dirty: ExtentMap, origin: Origin) -> ExtentsJson:
    """List what is DIRTY in the map *dirty*, and what of it is ZERO in *extents*, byte for byte.

    Raises ValueError if the maps are of two sizes.
    """
    if dirty.size != extents.size:
        raise ValueError(f"a dirty map of {dirty.size} bytes for a disk of {extents.size}")
    marks = array("Q")
    count = 0
    for start, _, _ in _iter_changes(extents, dirty, 0):
        if count % MARK == 0:
            marks.append(start)
        count += 1
    facts = {"format": FORMAT, "version": VERSION, **origin.facts(), "size": extents.size, "count": count}
    head = json.dumps(facts).removesuffix("}") + ', "extents": [\n'
    return ExtentsJson(extents, dirty, head.encode(), count, marks)
