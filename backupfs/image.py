# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: files that are presented, described as segments. Pure: only `seek` may wait, for more of the map.

    image    |--literal--|--zeros--|--------span--------|--zeros--|
               bytes in    no I/O     a stretch of an
               hand                   export, over NBD

A format is data: it says for any stretch of its image which segments make it up, and one
function (`export.resolve`) turns segments into bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from backupfs.extents import ZERO, Extents

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Literal:
    """Bytes in hand."""

    data: bytes

    @property
    def length(self) -> int:
        return len(self.data)


@dataclass(frozen=True, slots=True)
class Zeros:
    """A stretch that reads as zeros."""

    length: int


@dataclass(frozen=True, slots=True)
class Span(Generic[S]):
    """A stretch of *source*, which is read when it is wanted."""

    source: S
    offset: int
    length: int


Segment = Literal | Zeros | Span[S]


class Image(Protocol[S]):
    """A file as segments. `size` and `allocated` are bytes."""

    @property
    def size(self) -> int: ...

    @property
    def allocated(self) -> int: ...

    def segments(self, start: int, stop: int) -> Iterator[Segment[S]]:
        """Yield what makes up [start, stop), which lies in the image, in order."""
        ...

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Return the first byte from *offset* on that is data (or is in a hole); None: there is none.

            image    |--data--|--hole--|--data--|
            offset   ^ data   ^ hole            ^ the end is a hole too, though no byte of the file

        Nothing is at the end or beyond it: None. What may be anything but zeros is data.
        """
        ...


@dataclass(frozen=True, slots=True)
class RawImage(Generic[S]):
    """A whole disk, byte for byte."""

    source: S
    extents: Extents
    allocated: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "allocated", self.size - self.extents.total(ZERO))

    @property
    def size(self) -> int:
        return self.extents.size

    def segments(self, start: int, stop: int) -> Iterator[Segment[S]]:
        """Yield zeros where the map says zero, and spans for all else: a hole may hold anything."""
        for begin, end, flags in self.extents.iter_range(start, stop):
            if flags & ZERO:
                yield Zeros(end - begin)
            else:
                yield Span(self.source, begin, end - begin)

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Tell where data or a hole begins: zeros are holes, and only they."""
        if not 0 <= offset < self.size:
            return None
        found = await self.extents.locate(offset, ZERO, not data)
        return self.size if found is None and not data else found
