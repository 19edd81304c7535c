# SPDX-License-Identifier: GPL-3.0-or-later
"""Maps of a disk: which bytes have which property.

    bytes   0          64K        192K                 1M
            |---data---|---zero---|--------data--------|
    flags        0          ZERO           0
    words   [ 0<<2|0,   64K<<2|2,  192K<<2|0 ]  and the size

A map covers [0, size) without gap or overlap. Each extent is one 64-bit word, its start shifted
left by two bits over its flags; it ends where the next one starts. 163,840 extents are 1.3 MB
so, against 21 MB as tuples, and bisect finds one in them without unpacking any.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

ZERO: Final = 2  # reads as zeros: the only property that may be answered without reading
DIRTY: Final = 1
_FLAG_BITS: Final = 2
_FLAG_MASK: Final = 2**_FLAG_BITS - 1
LARGEST: Final = 2 ** (64 - _FLAG_BITS) - 1  # bytes

Extent = tuple[int, int, int]  # start, stop, flags


class Extents(Protocol):
    """What a map tells; what is not known to be zero is data."""

    @property
    def size(self) -> int: ...

    def iter_range(self, start: int, stop: int) -> Iterator[Extent]: ...

    def find(self, offset: int, flag: int, wanted: bool) -> int | None: ...

    async def locate(self, offset: int, flag: int, wanted: bool) -> int | None: ...

    def total(self, flag: int) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class ExtentMap:
    """An immutable map of [0, size). Made by `Builder`, `uniform` or `combine`."""

    size: int
    _words: array[int]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExtentMap) and self.size == other.size and self._words == other._words

    __hash__ = None  # type: ignore[assignment]  # it would have to walk the whole map

    def __len__(self) -> int:
        return len(self._words)

    def __iter__(self) -> Iterator[Extent]:
        return self.iter_range(0, self.size)

    def iter_range(self, start: int, stop: int) -> Iterator[Extent]:
        """Yield the parts of the extents that lie in [start, stop), which must lie in the map.

        map      |---a---|-------b-------|---c---|
        range        [-----------------)
        yields       |-a-|-------b-----|
        """
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"[{start}, {stop}) is not in [0, {self.size})")
        words = self._words
        index = bisect_right(words, start << _FLAG_BITS | _FLAG_MASK) - 1
        last = len(words) - 1
        while start < stop:
            end = words[index + 1] >> _FLAG_BITS if index < last else self.size
            yield start, min(end, stop), words[index] & _FLAG_MASK
            start = end
            index += 1

    def flags_at(self, offset: int) -> int:
        """Return the flags of the byte at *offset*."""
        if not 0 <= offset < self.size:
            raise ValueError(f"{offset} is not in [0, {self.size})")
        return self._words[bisect_right(self._words, offset << _FLAG_BITS | _FLAG_MASK) - 1] & _FLAG_MASK

    def find(self, offset: int, flag: int, wanted: bool) -> int | None:
        """Return the first byte from *offset* on where *flag* is set (or not); None: nowhere."""
        if not 0 <= offset < self.size:
            return None
        words = self._words
        index = bisect_right(words, offset << _FLAG_BITS | _FLAG_MASK) - 1
        if bool(words[index] & flag) is wanted:
            return offset
        for later in range(index + 1, len(words)):
            if bool(words[later] & flag) is wanted:
                return words[later] >> _FLAG_BITS
        return None

    async def locate(self, offset: int, flag: int, wanted: bool) -> int | None:
        """Do as `find`: of this map everything is known."""
        return self.find(offset, flag, wanted)

    def total(self, flag: int) -> int:
        """Return how many bytes have *flag*."""
        found, start, counts = 0, 0, False
        # Word by word: two million extents in a tenth of a second, which blocks all else.
        for word in self._words:
            if counts:
                found += (word >> _FLAG_BITS) - start
            start, counts = word >> _FLAG_BITS, bool(word & flag)
        return found + (self.size - start if counts else 0)


class Builder:
    """Makes a map from extents that come in order; neighbours with the same flags become one."""

    def __init__(self, size: int) -> None:
        if not 0 <= size <= LARGEST:
            raise ValueError(f"a map of {size} bytes")
        self.size = size
        self.position = 0
        self._words = array("Q")

    def __len__(self) -> int:
        return len(self._words)

    def append(self, length: int, flags: int) -> None:
        """Add *length* bytes; raise ValueError if they are none or reach beyond the end."""
        if length <= 0 or length > self.size - self.position:
            raise ValueError(f"an extent of {length} bytes at {self.position} of {self.size}")
        if not 0 <= flags <= _FLAG_MASK:
            raise ValueError(f"flags {flags}")
        if not self._words or self._words[-1] & _FLAG_MASK != flags:
            self._words.append(self.position << _FLAG_BITS | flags)
        self.position += length

    def extend(self, words: Sequence[int], mask: int, most: int) -> None:
        """Add extents, told as lengths and flags in turn; of the flags only those in *mask* count.

        The last one is cut at the end of the map, and nothing is added once there are *most*.
        Raises ValueError for an empty extent and for one that begins at the end.
        """
        # In one loop: two million extents take half a second so, and two with a call for each.
        size, position, added = self.size, self.position, self._words
        last = added[-1] & _FLAG_MASK if added else -1
        pairs = iter(words)
        try:
            for length, flags in zip(pairs, pairs, strict=True):
                if length <= 0:
                    raise ValueError(f"an empty extent at byte {position}")
                if position >= size:
                    raise ValueError(f"an extent beyond {size} bytes")
                flags &= mask
                if flags != last:
                    if len(added) >= most:
                        break
                    added.append(position << _FLAG_BITS | flags)
                    last = flags
                position += length
        finally:
            self.position = min(position, size)

    def finish(self, flags: int = 0) -> ExtentMap:
        """Return the map; what is missing at its end gets *flags*."""
        if self.position < self.size:
            self.append(self.size - self.position, flags)
        return ExtentMap(self.size, self._words)


def uniform(size: int, flags: int = 0) -> ExtentMap:
    """Return a map of one extent."""
    return Builder(size).finish(flags)


def seek_dense(size: int, offset: int, *, data: bool) -> int | None:
    """Answer `image.Image.seek` for a file of *size* bytes without holes."""
    if not 0 <= offset < size:
        return None
    return offset if data else size


def combine(one: ExtentMap, other: ExtentMap, function: Callable[[int, int], int]) -> ExtentMap:
    """Return the map whose flags are *function* of both maps' flags; their sizes must agree.

    one      |--a--|----b----|
    other    |----c----|--d--|
    result   |a,c--|b,c|b,d--|
    """
    if one.size != other.size:
        raise ValueError(f"maps of {one.size} and {other.size} bytes")
    builder = Builder(one.size)
    theirs = iter(other)
    stop, flags = 0, 0
    for start, end, ours in one:
        while start < end:
            if start >= stop:
                _, stop, flags = next(theirs)
            upto = min(end, stop)
            builder.append(upto - start, function(ours, flags))
            start = upto
    return builder.finish()


def is_zero(extents: Extents, start: int, stop: int) -> bool:
    """Whether all of [start, stop) is known to be zero."""
    found = extents.find(start, ZERO, wanted=False)
    return found is None or found >= stop
