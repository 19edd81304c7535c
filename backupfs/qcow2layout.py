# SPDX-License-Identifier: GPL-3.0-or-later
"""Where what lies in a qcow2 file that we make up: arithmetic alone.

    clusters   1        n                n                 n          n           n
             | header | refcount table | refcount blocks | L1 table | L2 tables | guest data, in its order |

All metadata come first, for two reasons. From one point to the next they change everywhere, as
one cluster more moves all that follow it; so a deduplicating tool finds the change in one place
and all data as it knows them, not a changed table after every 512 MiB. And the data of a full
disk are one run, as in a raw file, at an offset that stays the same.

A name in square brackets is a section of QEMU's docs/interop/qcow2.txt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

CLUSTER_BITS: Final = 16  # 64 KiB, QEMU's own choice, and that of its bitmaps
SECTOR: Final = 512
ENTRY: Final = 8  # bytes of an entry of an L1, an L2 or a refcount table
REFCOUNT: Final = 2  # bytes of a refcount
LARGEST_L1: Final = 2**25  # [Header] "implementation limit of 32 MB as the maximum L1 table size"
LARGEST_TABLE: Final = 2**23  # [Host cluster management] "implementation limit of 8 MB as the maximum refcount table"


class TooLarge(ValueError):
    """The disk, or its map, is too large for a qcow2 file that QEMU opens and we can make up."""


def cut(count: int, unit: int) -> int:
    """Return how many units it takes to hold *count*."""
    return -(-count // unit)


@dataclass(frozen=True, slots=True)
class Layout:
    """How many clusters each part has, and so where it begins. Made by `lay_out`."""

    bits: int  # a cluster is 2^bits bytes
    disk_size: int  # bytes, as the header tells it
    l1_entries: int
    refcount_tables: int
    refcount_blocks: int
    l1: int
    l2: int
    data: int

    @property
    def first_block(self) -> int:
        """The number of the cluster that is the first refcount block."""
        return 1 + self.refcount_tables

    @property
    def first_l1(self) -> int:
        """The number of the cluster in which the L1 table begins."""
        return self.first_block + self.refcount_blocks

    @property
    def first_l2(self) -> int:
        """The number of the cluster that is the first L2 table."""
        return self.first_l1 + self.l1

    @property
    def first_data(self) -> int:
        """The number of the first cluster of guest data."""
        return self.first_l2 + self.l2

    @property
    def clusters(self) -> int:
        """How many clusters the file has."""
        return self.first_data + self.data


def lay_out(disk_size: int, *, l2: int, data: int, bits: int = CLUSTER_BITS) -> Layout:
    """Lay the file of a disk out that has *l2* L2 tables and *data* clusters of data; raise TooLarge."""
    cluster = 1 << bits
    entries = cluster // ENTRY
    # QEMU knows whole sectors only, and reads an odd raw image rounded up, with zeros behind.
    disk_size = cut(disk_size, SECTOR) * SECTOR
    l1_entries = cut(disk_size, cluster * entries)
    l1 = cut(l1_entries, entries)
    tables, blocks = 1, 1
    # They count themselves too. Neither ever becomes less, and each round adds less than the last.
    while True:
        clusters = 1 + tables + blocks + l1 + l2 + data
        needed = cut(clusters, cluster // REFCOUNT)
        if needed == blocks and cut(needed, entries) == tables:
            break
        tables, blocks = cut(needed, entries), needed
    if l1_entries * ENTRY > LARGEST_L1 or tables * cluster > LARGEST_TABLE:
        raise TooLarge(f"QEMU opens no qcow2 file of a disk of {disk_size} bytes with clusters of {cluster}")
    return Layout(bits, disk_size, l1_entries, tables, blocks, l1, l2, data)
