# SPDX-License-Identifier: GPL-3.0-or-later
"""Disks as qcow2 files that nobody has written: each stretch is made up when it is asked for.

    map of the disk  |--data--|--------zero--------|--data--|zero|
    clusters         |  0  |  1  |  2  |  3  |  4  |  5  |  6  |
                        x     x                       x     x        in the file: 0 1 5 6
    increment, dirty          |-----------------------|
                              x                       x              in the file: 1 5
                                    0     0     0                    explicit zero clusters

A cluster is taken whole. In a whole disk one that is zero everywhere is not there. In an
increment a cluster that is dirty anywhere is there: as data, or, if it is zero everywhere, as an
entry that says so (a hole would let the backing file's old data through); all others are the
backing file's.

Law: what a file is follows from the map alone, so it is the same, byte for byte, however often
and in whatever pieces it is read. Finding a stretch takes O(log n), and no table is ever held.

A name in square brackets is a section of QEMU's docs/interop/qcow2.txt, which is quoted.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from backupfs.extents import DIRTY, ZERO, ExtentMap, seek_dense
from backupfs.image import Literal, Segment, Span, Zeros
from backupfs.origin import Origin
from backupfs.qcow2layout import CLUSTER_BITS, ENTRY, REFCOUNT, Layout, lay_out
from backupfs.runs import Run, Runs, iter_coarser, iter_touched, iter_union, split

S = TypeVar("S")

MAGIC: Final = 0x514649FB  # [Header] "QCOW magic string ("QFI\xfb")"
VERSION: Final = 3  # [L2 table entry] zero clusters: "With version 2 [...] this is always 0"
REFCOUNT_ORDER: Final = 4  # [Header] "refcount_bits = 1 << refcount_order"
HEADER: Final = struct.Struct(">IIQIIQIIQQIIQQQQII")
BACKING_FORMAT: Final = 0xE2792ACA  # [Header extensions] "Backing file format name string"
ORIGIN: Final = 0x626B7066  # "bkpf": ours. [Header extensions] "other: Unknown header extension, can be safely ignored"
END: Final = bytes(8)  # [Header extensions] "0x00000000 - End of the header extension area"
LONGEST_BACKING: Final = 1023  # [Header] "Must not be longer than 1023 bytes"

# [L1 table entry], [L2 table entry] "1 if its refcount is exactly one": all that we write has one user.
COPIED: Final = 1 << 63
READS_AS_ZERO: Final = 1  # [Standard Cluster Descriptor] "If set to 1, the cluster reads as all zeros"
ONE: Final = (1).to_bytes(REFCOUNT, "big")  # [Refcount block entry] "Reference count of the cluster"


@dataclass(frozen=True, slots=True)
class Backing:
    """The file that an increment lies over. QEMU would have to guess a format that is not told."""

    name: str
    format: str = "qcow2"

    @property
    def encoded(self) -> bytes:
        """The name as it stands in the header; raises ValueError if it cannot."""
        name = self.name.encode("utf-8", "surrogateescape")
        if not 0 < len(name) <= LONGEST_BACKING:
            raise ValueError(f"a backing file's name has 1 to {LONGEST_BACKING} bytes, not {len(name)}")
        return name


@dataclass(frozen=True, slots=True, eq=False)
class Qcow2Image(Generic[S]):
    """A qcow2 file; got with `whole` or `increment`."""

    source: S
    source_size: int
    layout: Layout
    header: bytes
    _tables: Runs  # the L1 entries that have an L2 table
    _data: Runs  # the guest's clusters that have data in the file
    _zeros: Runs  # those that are explicitly zero

    @property
    def size(self) -> int:
        return self.layout.clusters << self.layout.bits

    @property
    def allocated(self) -> int:
        """All of it: what the guest has not allocated is not in the file at all."""
        return self.size

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Say that all is data."""
        return seek_dense(self.size, offset, data=data)

    def segments(self, start: int, stop: int) -> Iterator[Segment[S]]:
        """Yield literals, a cluster each at most, of the metadata, then a span for each run of data."""
        layout = self.layout
        bits = layout.bits
        data = layout.first_data << bits
        while start < min(stop, data):
            number = start >> bits
            end = min(stop, (number + 1) << bits)
            yield Literal(self._metadata(number, start - (number << bits), end - (number << bits)))
            start = end
        if start < stop:
            yield from self._spans(start - data, stop - data)

    # --- data --------------------------------------------------------------------------------

    def _spans(self, start: int, stop: int) -> Iterator[Segment[S]]:
        """Yield [start, stop) of the data clusters, which lie in the file in the guest's order."""
        bits = self.layout.bits
        skip = start & ((1 << bits) - 1)
        for first, last in self._data.iter_ranks(start >> bits, ((stop - 1) >> bits) + 1):
            begin = (first << bits) + skip
            end = min(last << bits, begin + stop - start)
            skip = 0
            # The disk may end within its last cluster.
            there = max(0, min(end, self.source_size) - begin)
            if there:
                yield Span(self.source, begin, there)
            if there < end - begin:
                yield Zeros(end - begin - there)
            start += end - begin

    # --- metadata ----------------------------------------------------------------------------

    def _metadata(self, number: int, low: int, high: int) -> bytes:
        """Return bytes [low, high) of the cluster *number*."""
        layout = self.layout
        if number == 0:
            return self.header[low:high].ljust(high - low, b"\0")
        if layout.first_block <= number < layout.first_l1:
            return self._refcounts(number - layout.first_block, low, high)
        first, last = low // ENTRY, -(-high // ENTRY)
        entries = 1 << layout.bits >> 3
        if number < layout.first_block:
            words = self._refcount_table((number - 1) * entries, first, last)
        elif number < layout.first_l2:
            words = self._l1_table((number - layout.first_l1) * entries, first, last)
        else:
            words = self._l2_table(number - layout.first_l2, first, last)
        return words[low - first * ENTRY : high - first * ENTRY]

    def _refcounts(self, block: int, low: int, high: int) -> bytes:
        """[Host cluster management] Count one for each cluster of the file: none has two users."""
        first, last = low // REFCOUNT, -(-high // REFCOUNT)
        counted = self.layout.clusters - (block << self.layout.bits) // REFCOUNT
        ones = max(0, min(last, counted) - first)
        found = (ONE * ones).ljust((last - first) * REFCOUNT, b"\0")
        return found[low - first * REFCOUNT : high - first * REFCOUNT]

    def _refcount_table(self, at: int, first: int, last: int) -> bytes:
        """[Refcount table entry] Tell "the offset into the image file at which the refcount block starts"."""
        layout = self.layout
        stop = min(last, layout.refcount_blocks - at)
        return _words(first, last, [(first, stop, layout.first_block + at + first)] if first < stop else [], layout, 0)

    def _l1_table(self, at: int, first: int, last: int) -> bytes:
        """[L1 table entry] Tell "the offset into the image file at which the L2 table starts"."""
        runs = self._tables.iter_range(at + first, at + last)
        places = ((start - at, stop - at, self.layout.first_l2 + rank) for start, stop, rank in runs)
        return _words(first, last, places, self.layout, COPIED)

    def _l2_table(self, table: int, first: int, last: int) -> bytes:
        """[Standard Cluster Descriptor] Tell the "host cluster offset", or that "the cluster reads as all zeros"."""
        ((index, _),) = self._tables.iter_ranks(table, table + 1)
        at = index << self.layout.bits >> 3
        runs = self._data.iter_range(at + first, at + last)
        places = ((start - at, stop - at, self.layout.first_data + rank) for start, stop, rank in runs)
        zeros = ((start - at, stop - at) for start, stop, _ in self._zeros.iter_range(at + first, at + last))
        return _words(first, last, places, self.layout, COPIED, zeros)


def _words(
    first: int,
    last: int,
    places: Iterable[tuple[int, int, int]],
    layout: Layout,
    flags: int,
    zeros: Iterable[Run] = (),
) -> bytes:
    """Return entries [first, last) of a table; [General] "All numbers in qcow2 are stored in Big Endian byte order".

    *places* are runs of entries, and the number of the cluster that the first entry of each points
    to; the next ones point to those that follow. *zeros* are entries of zero clusters. All others are 0.
    """
    cluster = 1 << layout.bits
    words = array("Q", bytes((last - first) * ENTRY))
    for start, stop, number in places:
        offset = number * cluster | flags
        words[start - first : stop - first] = array("Q", range(offset, offset + (stop - start) * cluster, cluster))
    for start, stop in zeros:
        words[start - first : stop - first] = array("Q", [READS_AS_ZERO]) * (stop - start)
    return struct.pack(f">{len(words)}Q", *words)


# --- the header ----------------------------------------------------------------------------------


def render_header(layout: Layout, origin: Origin, backing: Backing | None = None) -> bytes:
    """Write the header, its extensions, and the backing file's name; raise ValueError if it cannot be."""
    extensions = _extension(ORIGIN, json.dumps(origin.facts(), separators=(",", ":")).encode())
    name = b""
    if backing is not None:
        name = backing.encoded
        extensions = _extension(BACKING_FORMAT, backing.format.encode()) + extensions
    # [Header extensions] The name is "stored in the remaining space between the end of the header
    # extension area and the end of the first cluster".
    extensions += END
    name_offset = HEADER.size + len(extensions) if name else 0
    header = HEADER.pack(
        MAGIC,
        VERSION,
        name_offset,
        len(name),
        layout.bits,
        layout.disk_size,
        0,  # crypt_method
        layout.l1_entries,
        layout.first_l1 << layout.bits,
        1 << layout.bits,  # refcount_table_offset
        layout.refcount_tables,
        0,  # nb_snapshots
        0,  # snapshots_offset
        0,  # incompatible_features
        0,  # compatible_features
        0,  # autoclear_features
        REFCOUNT_ORDER,
        HEADER.size,
    )
    found = header + extensions + name
    if len(found) > 1 << layout.bits:
        raise ValueError(f"a header of {len(found)} bytes does not fit into a cluster")
    return found


def _extension(kind: int, data: bytes) -> bytes:
    """[Header extensions] Type, length, data, and "Padding to round up [...] to the next multiple of 8"."""
    return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)


# --- making them ---------------------------------------------------------------------------------


def whole(source: S, extents: ExtentMap, origin: Origin, *, bits: int = CLUSTER_BITS) -> Qcow2Image[S]:
    """Return *source*, whose zeros *extents* tells, as a qcow2 file; raise TooLarge.

    Walks the map, which takes 0.6 s for a million extents.
    """
    data = Runs(_iter_data(extents, 1 << bits))
    return _image(source, extents.size, data, Runs(), origin, None, bits)


def increment(
    source: S,
    extents: ExtentMap,
    dirty: ExtentMap,
    origin: Origin,
    backing: Backing,
    *,
    from_size: int | None = None,
    bits: int = CLUSTER_BITS,
) -> Qcow2Image[S]:
    """Return what of *source* is DIRTY in the map *dirty*, as a qcow2 file over *backing*; raise TooLarge, ValueError.

    *from_size* is the disk's size at the instant that changes are counted from, if it was another.
    What a disk has grown by is in no backing file: it counts as dirty unless it is zero (there
    [Cluster mapping] "they shall read zeros for all parts that are not covered by the backing file").
    """
    if dirty.size != extents.size:
        raise ValueError(f"a dirty map of {dirty.size} bytes for a disk of {extents.size}")
    unit = 1 << bits
    changed = iter_touched(dirty, DIRTY, wanted=True, unit=unit)
    if from_size is not None and from_size < extents.size:
        old = from_size // unit
        grown = ((max(start, old), stop) for start, stop in _iter_data(extents, unit) if stop > old)
        changed = iter_union(changed, grown)
    data, zeros = split(changed, _iter_data(extents, unit))
    return _image(source, extents.size, data, zeros, origin, backing, bits)


def _iter_data(extents: ExtentMap, unit: int) -> Iterator[Run]:
    return iter_touched(extents, ZERO, wanted=False, unit=unit)


def _image(
    source: S, size: int, data: Runs, zeros: Runs, origin: Origin, backing: Backing | None, bits: int
) -> Qcow2Image[S]:
    tables = Runs(iter_coarser(iter_union(data, zeros), (1 << bits) // ENTRY))
    layout = lay_out(size, l2=tables.count, data=data.count, bits=bits)
    return Qcow2Image(source, size, layout, render_header(layout, origin, backing), tables, data, zeros)
