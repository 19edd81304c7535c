# SPDX-License-Identifier: GPL-3.0-or-later
"""What we make up, judged by qemu-img, which we did not write."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backupfs.extents import DIRTY, ZERO, Builder, ExtentMap, combine, uniform
from backupfs.extentsjson import render_extents
from backupfs.image import Image, Literal, Span, Zeros
from backupfs.origin import Origin
from backupfs.qcow2 import Backing, Qcow2Image, increment, whole

MIB = 2**20
TIB = 2**40
WHOLE = Origin("web01", "1234", "vda", 1000)
LATER = Origin("web01", "1234", "vda", 2000, 1000, "monday")
SLOW = settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def flat(image: Image[bytes], start: int = 0, stop: int | None = None) -> bytes:
    """Return the image's bytes; its source is the disk's."""
    stop = image.size if stop is None else stop
    parts = []
    for segment in image.segments(start, stop):
        match segment:
            case Literal(data=data):
                parts.append(data)
            case Zeros(length=length):
                parts.append(bytes(length))
            case Span(source=source, offset=offset, length=length):
                parts.append(source[offset : offset + length])
    found = b"".join(parts)
    assert len(found) == stop - start
    return found


def write(image: Image[bytes], path: Path) -> Path:
    path.write_bytes(flat(image))
    return path


def qemu_img(*words: str | Path) -> str:
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def check(path: Path) -> dict[str, Any]:
    """Check the file: no error, no leak, nothing to repair."""
    found = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path))
    assert found["check-errors"] == 0
    assert found.get("corruptions", 0) == found.get("leaks", 0) == 0
    return found


def mapped(path: Path, size: int, unit: int) -> str:
    """Return a letter for each cluster of *unit* bytes, as `qemu-img map` sees the chain of files.

    D, Z: data, zeros of the file itself; d, z: of what it lies over, or of nothing.
    """
    kinds = bytearray(b"?" * (-(-size // unit)))
    for found in json.loads(qemu_img("map", "--output=json", "-f", "qcow2", path)):
        kind = "D" if found["data"] else "Z"
        if found["depth"] or not found["present"]:
            kind = kind.lower()
        first, last = found["start"] // unit, -(-(found["start"] + found["length"]) // unit)
        kinds[first:last] = kind.encode() * (last - first)
    return kinds.decode()


def build(pieces: Iterable[tuple[int, int]]) -> ExtentMap:
    pieces = list(pieces)
    builder = Builder(sum(length for length, _ in pieces))
    for length, flags in pieces:
        builder.append(length, flags)
    return builder.finish()


def touched(found: ExtentMap, flag: int, unit: int) -> list[bool]:
    """Whether *flag* is set anywhere in each cluster: byte by byte, so to say."""
    return [
        any(flags & flag for _, _, flags in found.iter_range(low, min(low + unit, found.size)))
        for low in range(0, found.size, unit)
    ]


KINDS = ("same", "data", "data", "zero", "hole")  # of a stretch; a hole is one of whose zeros the map does not know


@dataclass(frozen=True)
class History:
    """A disk at two instants. More may be dirty than was changed, and the disk may have grown."""

    bits: int
    before: bytes = field(repr=False)
    zero_before: ExtentMap
    after: bytes = field(repr=False)
    zero: ExtentMap
    dirty: ExtentMap


@st.composite
def histories(draw: st.DrawFn) -> History:
    bits = draw(st.integers(9, 16))
    unit = draw(st.sampled_from([512, 4096, 1 << bits]))
    pick = random.Random(draw(st.integers(0, 2**32)))
    before, after = bytearray(), bytearray()
    maps: tuple[list[tuple[int, int]], ...] = ([], [], [])
    pieces = draw(
        st.lists(
            st.tuples(st.integers(1, 40), st.sampled_from(KINDS[1:]), st.sampled_from(KINDS), st.booleans()),
            min_size=1,
            max_size=20,
        )
    )
    for units, was, became, suspected in pieces:
        length = units * unit
        old = pick.randbytes(length) if was == "data" else bytes(length)
        new = old if became == "same" else pick.randbytes(length) if became == "data" else bytes(length)
        before += old
        after += new
        maps[0].append((length, ZERO if was == "zero" else 0))
        maps[1].append((length, ZERO if "zero" in (became, was if became == "same" else "") else 0))
        maps[2].append((length, DIRTY if became != "same" or suspected else 0))
    for units, became in draw(st.lists(st.tuples(st.integers(1, 40), st.sampled_from(KINDS[1:])), max_size=3)):
        length = units * unit
        after += pick.randbytes(length) if became == "data" else bytes(length)
        maps[1].append((length, ZERO if became == "zero" else 0))
        maps[2].append((length, 0))  # QEMU's bitmaps grow clean
    return History(bits, bytes(before), build(maps[0]), bytes(after), build(maps[1]), build(maps[2]))


@SLOW
@given(histories())
def test_any_disk_passes_check_compare_and_map(tmp_path: Path, history: History) -> None:
    bits, plain, extents = history.bits, history.after, history.zero
    path = write(whole(plain, extents, WHOLE, bits=bits), tmp_path / "vda.qcow2")
    raw = tmp_path / "vda.raw"
    raw.write_bytes(plain)
    check(path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["virtual-size"], info["cluster-size"]) == (len(plain), 1 << bits)
    # A cluster is there if, and only if, the map does not say that it is zero everywhere.
    data = build((stop - start, not flags & ZERO) for start, stop, flags in extents)
    expected = "".join("D" if there else "z" for there in touched(data, 1, 1 << bits))
    assert mapped(path, len(plain), 1 << bits) == expected


@SLOW
@given(histories())
def test_an_increment_over_the_disk_before_is_the_disk_after(tmp_path: Path, history: History) -> None:
    bits, before, after, extents = history.bits, history.before, history.after, history.zero
    unit = 1 << bits
    write(whole(before, history.zero_before, WHOLE, bits=bits), tmp_path / "vda.monday.qcow2")
    image = increment(
        after, extents, history.dirty, LATER, Backing("vda.monday.qcow2"), from_size=len(before), bits=bits
    )
    path = write(image, tmp_path / "vda.inc.qcow2")
    raw = tmp_path / "vda.raw"
    raw.write_bytes(after)
    check(path)
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("vda.monday.qcow2", "qcow2")
    # No more is taken than what is dirty, in whole clusters, and what the disk has grown by.
    data = build((stop - start, not flags & ZERO) for start, stop, flags in extents)
    wanted = [
        (dirt or (there and (number + 1) * unit > len(before) < len(after)), there)
        for number, (dirt, there) in enumerate(
            zip(touched(history.dirty, DIRTY, unit), touched(data, 1, unit), strict=True)
        )
    ]
    found = mapped(path, len(after), unit)
    assert "?" not in found
    for kind, (taken, there) in zip(found, wanted, strict=True):
        assert kind == ("D" if there else "Z") if taken else kind in "dz"


@settings(SLOW, max_examples=15)
@given(st.integers(0, 2**32), st.integers(1, 5))
def test_a_chain_is_the_disk_at_each_of_its_instants(tmp_path: Path, seed: int, length: int) -> None:
    """Write, zero, discard and grow; what a map of 64 KiB bits tracks since the last instant is an increment."""
    pick = random.Random(seed)
    disk = bytearray(pick.randbytes(20 * 65536) + bytes(20 * 65536))
    name = "vda.0.qcow2"
    write(whole(bytes(disk), zeros_of(disk, 4096), WHOLE), tmp_path / name)
    for number in range(1, length + 1):
        size = len(disk)
        disk += bytes(pick.choice([0, 0, 512, 65536, 99 * 512]))
        bits = [0] * (-(-len(disk) // 65536))
        for _ in range(pick.randrange(8)):
            start = pick.randrange(len(disk))
            stop = min(len(disk), start + pick.choice([1, 512, 5000, 65536, 300_000]))
            disk[start:stop] = pick.randbytes(stop - start) if pick.randrange(2) else bytes(stop - start)
            bits[start >> 16 : (stop - 1 >> 16) + 1] = [DIRTY] * ((stop - 1 >> 16) + 1 - (start >> 16))
        dirty = build((min(65536, len(disk) - (at << 16)), flag) for at, flag in enumerate(bits))
        image = increment(bytes(disk), zeros_of(disk, 4096), dirty, LATER, Backing(name), from_size=size)
        name = f"vda.{number}.qcow2"
        check(write(image, tmp_path / name))
        (tmp_path / "vda.raw").write_bytes(disk)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / name, tmp_path / "vda.raw")
        # Nothing is in it but what has changed, and the tables.
        assert (
            image.layout.data + image.layout.first_data <= sum(map(bool, bits)) + len(disk) // 65536 - size // 65536 + 6
        )
    chain = json.loads(qemu_img("info", "--output=json", "--backing-chain", tmp_path / name))
    assert len(chain) == length + 1


def zeros_of(disk: bytes | bytearray, unit: int) -> ExtentMap:
    return build(
        (min(unit, len(disk) - at), 0 if any(disk[at : at + unit]) else ZERO) for at in range(0, len(disk), unit)
    )


@given(histories(), st.data())
@settings(deadline=None)
def test_any_stretch_of_any_image_is_that_of_the_whole(history: History, data: st.DataObject) -> None:
    bits, plain, extents, dirty = history.bits, history.after, history.zero, history.dirty
    made = [
        whole(plain, extents, WHOLE, bits=bits),
        increment(plain, extents, dirty, LATER, Backing("vda.monday.qcow2"), bits=bits),
        render_extents(extents, dirty, LATER),
    ]
    again = whole(plain, extents, WHOLE, bits=bits)
    assert flat(again) == flat(made[0])
    for image in made:
        everything = flat(image)
        assert len(everything) == image.size == image.allocated
        for _ in range(20):
            start = data.draw(st.integers(0, image.size))
            stop = data.draw(st.integers(start, image.size))
            assert flat(image, start, stop) == everything[start:stop]


@given(histories())
def test_the_list_of_extents_is_json_and_tells_each_byte(history: History) -> None:
    plain, extents, dirty = history.after, history.zero, history.dirty
    found = json.loads(flat(render_extents(extents, dirty, LATER)))
    assert (found["size"], found["count"]) == (len(plain), len(found["extents"]))
    assert [found[name] for name in ("domain", "disk", "checkpoint", "from", "to")] == [
        "web01", "vda", "monday", 1000, 2000
    ]  # fmt: skip
    both = combine(dirty, extents, lambda dirt, kind: (dirt & DIRTY) and DIRTY | (kind & ZERO))
    expected = [
        {"start": start, "length": stop - start, "zero": bool(flags & ZERO)} for start, stop, flags in both if flags
    ]
    assert found["extents"] == expected


# --- sizes -----------------------------------------------------------------------------------------


def write_thin(image: Qcow2Image[bytes], path: Path) -> Path:
    """Write the file without its zeros, and with a mark in each MiB of the data."""
    with open(path, "wb") as file:
        position = 0
        for segment in image.segments(0, image.size):
            if isinstance(segment, Literal) and segment.data.strip(b"\0"):
                file.seek(position)
                file.write(segment.data)
            elif isinstance(segment, Span):
                file.seek(position)
                file.write(b"data at %d" % segment.offset)
            position += segment.length
        file.truncate(image.size)
    return path


@pytest.mark.parametrize("size", [512, 65536 - 512, 512 * MIB, 512 * MIB + 512, 4 * TIB, 4 * TIB + 512, 16 * TIB])
def test_a_thin_disk_of_any_size_is_small_and_sound(tmp_path: Path, size: int) -> None:
    places = sorted({0, size // 3 // 65536 * 65536, (size - 1) // 65536 * 65536})
    builder = Builder(size)
    for place in places:
        if place > builder.position:
            builder.append(place - builder.position, ZERO)
        builder.append(min(65536, size - place), 0)
    image = whole(b"", builder.finish(ZERO), WHOLE)
    assert image.size <= 65536 * (3 + 4 + 2 * len(places))
    path = write_thin(image, tmp_path / "vda.qcow2")
    check(path)
    assert json.loads(qemu_img("info", "--output=json", path))["virtual-size"] == size
    # Its own map goes by what the file system has of the file, too.
    found = {e["start"] // 65536 * 65536 for e in json.loads(qemu_img("map", "--output=json", path)) if e["data"]}
    assert sorted(found) == places
    for place in places:
        text = b"data at %d" % place
        io = ["qemu-io", "-r", "-f", "qcow2", "-c", f"read -v {place} 512", str(path)]
        seen = subprocess.run(io, capture_output=True, text=True, check=True).stdout
        shown = bytes.fromhex("".join(line.partition(":")[2][:50] for line in seen.splitlines()[:2]))
        assert shown.startswith(text)


@pytest.mark.parametrize("flags", [0, ZERO])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 65535, 65536, 65537, 10**6, 3 * MIB, 9 * MIB])
@pytest.mark.parametrize("bits", [9, 16])
def test_full_and_empty_disks_of_odd_sizes(tmp_path: Path, size: int, flags: int, bits: int) -> None:
    plain = bytes(size) if flags else random.Random(size).randbytes(size)
    image = whole(plain, uniform(size, flags), WHOLE, bits=bits)
    if bits == 9 and size == 9 * MIB:
        assert image.layout.l1 > 1
        assert flags or image.layout.refcount_tables > 1
    path = write(image, tmp_path / "vda.qcow2")
    raw = tmp_path / "vda.raw"
    raw.write_bytes(plain)
    check(path)
    # QEMU reads an odd raw image as if it ended with a whole sector of zeros.
    qemu_img("compare", "-f", "qcow2", "-F", "raw", path, raw)


def test_a_whole_disk_of_sixteen_tebibytes_is_laid_out_at_once() -> None:
    size = 16 * TIB
    image = whole(b"", uniform(size), WHOLE)
    layout = image.layout
    assert (layout.l1, layout.l2, layout.refcount_tables) == (4, 32768, 2)
    assert layout.clusters == layout.first_data + size // 65536
    start = layout.first_data << 16
    assert list(image.segments(start, image.size)) == [Span(b"", 0, size)]
    # The last L2 table's last entry, and the last cluster's refcount, and nothing behind it.
    last = int.from_bytes(flat(image, start - 8, start), "big")
    assert last == 1 << 63 | (layout.clusters - 1) << 16
    counts = flat(image, (layout.first_l1 - 1) << 16, layout.first_l1 << 16)
    assert counts == (b"\0\1" * (layout.clusters % 32768)).ljust(65536, b"\0")


def test_what_qemu_writes_into_a_copy_leaves_it_sound(tmp_path: Path) -> None:
    """The copy is an image like any other: a guest allocates in it, snapshots and resizes it."""
    plain = random.Random(1).randbytes(3 * MIB)
    builder = Builder(8 * MIB)
    builder.append(MIB, 0)
    builder.append(MIB, ZERO)
    builder.append(MIB, 0)
    path = write(whole(plain, builder.finish(ZERO), WHOLE), tmp_path / "vda.qcow2")
    qemu_img("snapshot", "-c", "one", path)
    commands = ["-c", "write -P 7 512k 4M", "-c", "write -z 0 64k", "-c", "discard 2M 512k"]
    subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(path)], check=True, capture_output=True)
    qemu_img("resize", "-f", "qcow2", path, "700M")
    check(path)
    qemu_img("snapshot", "-a", "one", path)
    check(path)
    # A header extension that it does not know, QEMU keeps.
    qemu_img("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
    assert b'"domain":"web01"' in path.read_bytes()[:65536]
