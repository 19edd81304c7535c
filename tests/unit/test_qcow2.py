# SPDX-License-Identifier: GPL-3.0-or-later
"""What qemu-img cannot be asked; the rest is in tests/property."""

from __future__ import annotations

import json
import struct

import pytest

from backupfs.extents import DIRTY, ZERO, Builder, ExtentMap, uniform
from backupfs.image import Literal, Span, Zeros
from backupfs.origin import Origin
from backupfs.qcow2 import COPIED, ORIGIN, READS_AS_ZERO, Backing, Qcow2Image, increment, whole

CLUSTER = 65536
WHOLE = Origin("web01", "1234", "vda", 2000)
LATER = Origin("web01", "1234", "vda", 2000, 1000, "monday")


def build(*pieces: tuple[int, int]) -> ExtentMap:
    builder = Builder(sum(length for length, _ in pieces))
    for length, flags in pieces:
        builder.append(length, flags)
    return builder.finish()


def cluster(image: Qcow2Image[str], number: int) -> bytes:
    (segment,) = image.segments(number * CLUSTER, (number + 1) * CLUSTER)
    assert isinstance(segment, Literal)
    return segment.data


def entries(image: Qcow2Image[str], number: int, count: int) -> list[int]:
    return list(struct.unpack(f">{count}Q", cluster(image, number)[: 8 * count]))


def extensions(image: Qcow2Image[str]) -> dict[int, bytes]:
    """Return the header extensions, read as the specification says."""
    data = cluster(image, 0)
    (position,) = struct.unpack_from(">I", data, 100)
    found = {}
    while (kind := struct.unpack_from(">I", data, position)[0]) != 0:
        (length,) = struct.unpack_from(">I", data, position + 4)
        found[kind] = data[position + 8 : position + 8 + length]
        position += 8 + -(-length // 8) * 8
    return found


def test_data_lie_in_the_guests_order_a_span_for_each_run() -> None:
    extents = build((CLUSTER, 0), (CLUSTER, ZERO), (2 * CLUSTER, 0), (CLUSTER + 1000, ZERO), (24, 0))
    image = whole("vda", extents, WHOLE)
    first = image.layout.first_data
    assert (first, image.layout.clusters) == (5, 9)
    assert entries(image, 4, 7) == [COPIED | n * CLUSTER for n in (5,)] + [0] + [
        COPIED | 6 * CLUSTER,
        COPIED | 7 * CLUSTER,
        0,
        COPIED | 8 * CLUSTER,
        0,
    ]
    assert list(image.segments(first * CLUSTER, image.size)) == [
        Span("vda", 0, CLUSTER),
        Span("vda", 2 * CLUSTER, 2 * CLUSTER),
        Span("vda", 5 * CLUSTER, 1024),
        Zeros(CLUSTER - 1024),
    ]
    # From within one run to within another; and behind the disk's end.
    start = first * CLUSTER + CLUSTER - 10
    assert list(image.segments(start, start + 30)) == [Span("vda", CLUSTER - 10, 10), Span("vda", 2 * CLUSTER, 20)]
    assert list(image.segments(image.size - 7, image.size)) == [Zeros(7)]
    assert list(image.segments(image.size, image.size)) == []


def test_each_part_tells_where_the_next_one_lies() -> None:
    builder = Builder(3 * 512 * 2**20)
    builder.append(2 * 512 * 2**20, ZERO)
    builder.append(3 * CLUSTER, 0)
    image = whole("vda", builder.finish(ZERO), WHOLE)
    assert image.size == image.allocated == 8 * CLUSTER
    assert cluster(image, 1) == (2 * CLUSTER).to_bytes(8, "big") + bytes(CLUSTER - 8)  # refcount table
    assert cluster(image, 2) == b"\0\1" * 8 + bytes(CLUSTER - 16)  # refcounts
    assert entries(image, 3, 8192) == [0, 0, COPIED | 4 * CLUSTER] + [0] * 8189  # L1 table
    assert entries(image, 4, 3) == [COPIED | n * CLUSTER for n in (5, 6, 7)]  # L2 table
    # Asked for in odd pieces, each table gives the same.
    for number in range(5):
        for low, high in ((0, 3), (3, 29), (13, 17), (65530, 65536)):
            (segment,) = image.segments(number * CLUSTER + low, number * CLUSTER + high)
            assert segment == Literal(cluster(image, number)[low:high])
    # Beyond the only block, the table is empty.
    assert entries(image, 1, 8192)[1:] == [0] * 8191


async def test_all_of_it_is_data() -> None:
    image = whole("vda", uniform(CLUSTER, ZERO), WHOLE)
    assert await image.seek(7, data=True) == 7
    assert await image.seek(7, data=False) == image.size
    assert await image.seek(image.size, data=True) is None


def test_an_increment_takes_dirty_clusters_whole_and_says_which_are_zero() -> None:
    extents = build((CLUSTER, 0), (2 * CLUSTER, ZERO), (100, ZERO), (3 * CLUSTER - 100, 0))
    dirty = build((CLUSTER, 0), (CLUSTER, DIRTY), (CLUSTER + 99, 0), (1, DIRTY), (3 * CLUSTER - 100, 0))
    image = increment("vda", extents, dirty, LATER, Backing("vda.monday.qcow2"))
    assert entries(image, 4, 6) == [0, READS_AS_ZERO, 0, COPIED | 5 * CLUSTER, 0, 0]
    assert list(image.segments(5 * CLUSTER, image.size)) == [Span("vda", 3 * CLUSTER, CLUSTER)]


def test_what_a_disk_has_grown_by_is_dirty_unless_it_is_zero() -> None:
    extents = build((3 * CLUSTER, 0), (CLUSTER, ZERO), (CLUSTER, 0))
    clean = uniform(extents.size)
    backing = Backing("vda.monday.qcow2")
    grown = increment("vda", extents, clean, LATER, backing, from_size=CLUSTER + 512)
    assert entries(grown, 4, 5) == [0, COPIED | 5 * CLUSTER, COPIED | 6 * CLUSTER, 0, COPIED | 7 * CLUSTER]
    for size in (None, extents.size, 2 * extents.size):
        assert increment("vda", extents, clean, LATER, backing, from_size=size).layout.data == 0


def test_the_header_tells_what_the_image_is_of() -> None:
    plain = whole("vda", uniform(CLUSTER), WHOLE)
    assert json.loads(extensions(plain)[ORIGIN]) == {
        "domain": "web01",
        "uuid": "1234",
        "disk": "vda",
        "checkpoint": None,
        "from": None,
        "to": 2000,
    }
    assert cluster(plain, 0)[8:20] == bytes(12)  # no backing file
    backing = Backing("x" * 1023, "raw")
    image = increment("vda", uniform(CLUSTER), uniform(CLUSTER), LATER, backing)
    found = extensions(image)
    assert list(found) == [0xE2792ACA, ORIGIN]
    assert found[0xE2792ACA] == b"raw"
    assert json.loads(found[ORIGIN])["from"] == 1000
    offset, length = struct.unpack_from(">QI", cluster(image, 0), 8)
    assert cluster(image, 0)[offset : offset + length] == b"x" * 1023


def test_a_name_that_does_not_fit_is_refused() -> None:
    for name in ("", "x" * 1024):
        with pytest.raises(ValueError, match="1 to 1023 bytes"):
            increment("vda", uniform(512), uniform(512), LATER, Backing(name))
    with pytest.raises(ValueError, match="does not fit into a cluster"):
        increment("vda", uniform(512), uniform(512), LATER, Backing("x" * 512), bits=9)


def test_maps_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="1024 bytes for a disk of 512"):
        increment("vda", uniform(512), uniform(1024), LATER, Backing("vda.monday.qcow2"))
