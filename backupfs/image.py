# SPDX-License-Identifier: GPL-3.0-or-later
"""Images: files that are presented, described as segments. Pure: nothing here waits.

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
