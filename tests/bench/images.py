# SPDX-License-Identifier: GPL-3.0-or-later
"""The disks' images: dense, thin with scattered pieces, and one that is nothing but extents.

dense     |############################|   random bytes, nothing to be made up
thin      |#·····#·····#·····#·····#···|   pieces of 1 MiB, equally far apart
striped   |#·#·#·#·#·#·#·#·#·#·#·#·#·#·|   every other 512 bytes: two extents a KiB
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MIB: Final = 2**20
GIB: Final = 2**30
TIB: Final = 2**40
SECTOR: Final = 512


def size_text(size: int) -> str:
    """Write a size as a label shows it: in the biggest unit of which it is a whole number."""
    for unit, name in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} bytes"


def make_dense(path: Path, size: int) -> Path:
    """Make a qcow2 image of *size* random bytes."""
    return _made(path, [(0, size)], size)


def make_thin(path: Path, size: int, pieces: int) -> Path:
    """Make a qcow2 image of *size* with *pieces* of 1 MiB random bytes; keep it as PATH.raw too, as the truth."""
    return _made(path, list(iter_pieces(size, pieces)), size, keep=True)


def iter_pieces(size: int, pieces: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of the pieces of a thin image."""
    step = size // pieces // MIB * MIB
    for number in range(pieces):
        yield number * step, number * step + MIB


def raw_of(path: Path) -> Path:
    """Return where the raw form of a thin image is kept."""
    return path.with_suffix(".raw")


def _made(path: Path, extents: list[tuple[int, int]], size: int, *, keep: bool = False) -> Path:
    raw = raw_of(path)
    with open(raw, "wb", buffering=0) as file:
        file.truncate(size)
        for start, stop in extents:
            for position in range(start, stop, MIB):
                file.seek(position)
                file.write(os.urandom(min(MIB, stop - position)))
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    if not keep:
        raw.unlink()
    return settle(path)


def make_striped(path: Path, extents: int) -> Path:
    """Make a qcow2 image of *extents* extents, data and zero in turn, each of 512 bytes.

    Written by hand: clusters of 512 bytes, the least there are, make the whole thing as small as
    it can be, and qemu-img would need minutes. `qemu-img check` finds nothing to say against it.
    """
    per_table = SECTOR // 8
    tables = -(-extents // per_table)
    l1_clusters = -(-tables * 8 // SECTOR)
    data = (extents + 1) // 2
    # header │ refcount table │ refcount blocks │ L1 │ L2 tables │ data
    others = 1 + l1_clusters + tables + data
    blocks = table_clusters = 0
    while True:  # the refcounts count themselves too
        clusters = others + blocks + table_clusters
        need = -(-clusters // (SECTOR // 2))
        if (need, -(-need * 8 // SECTOR)) == (blocks, table_clusters):
            break
        blocks, table_clusters = need, -(-need * 8 // SECTOR)
    first_block = 1 + table_clusters
    l1 = first_block + blocks
    l2 = l1 + l1_clusters
    first_data = l2 + tables
    flag = 1 << 63  # its refcount is one
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 9, extents * SECTOR, 0, tables,
        l1 * SECTOR, SECTOR, table_clusters, 0, 0,
    )  # fmt: skip
    entries = array("Q", bytes(8 * tables * per_table))
    entries[0:extents:2] = array("Q", range(flag | first_data * SECTOR, flag | (first_data + data) * SECTOR, SECTOR))
    with open(path, "wb") as file:
        file.write(header.ljust(SECTOR, b"\0"))
        file.write(_padded(array("Q", range(first_block * SECTOR, l1 * SECTOR, SECTOR))))
        file.write(array("H", [0x0100]) * clusters + array("H", [0]) * (blocks * SECTOR // 2 - clusters))
        file.write(_padded(array("Q", range(flag | l2 * SECTOR, flag | first_data * SECTOR, SECTOR))))
        file.write(_padded(entries))
        for position in range(0, data * SECTOR, MIB):
            file.write(os.urandom(min(MIB, data * SECTOR - position)))
    return settle(path)


def _padded(words: array[int]) -> bytes:
    """Return the words, big-endian, filled up to whole clusters."""
    swapped = array("Q", words)
    if sys.byteorder == "little":
        swapped.byteswap()
    raw = swapped.tobytes()
    return raw + bytes(-len(raw) % SECTOR)


def settle(path: Path) -> Path:
    """Give it to the guests' user, and have it written, lest that go on while something is measured."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    shutil.chown(path, "nobody", "nogroup")
    return path


def make_tools_disk(path: Path, programs: list[str]) -> Path:
    """Make a qcow2 image of an ext4 with *programs* of the host and their libraries, for guests that have none."""
    root = path.with_suffix(".tree")
    for program in programs:
        found = shutil.which(program)
        if found is None:
            raise FileNotFoundError(f"{program} is missing: run contrib/setup --dev")
        listed = subprocess.run(["ldd", found], check=True, capture_output=True, text=True).stdout
        libraries = [word for word in listed.split() if word.startswith("/")]
        for file in (found, *libraries):
            target = root / Path(file).name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                shutil.copy(Path(file).resolve(), target)
    content = sum(file.stat().st_size for file in root.iterdir())
    raw = raw_of(path)
    with open(raw, "wb") as image:
        image.truncate((content * 5 // 4 // MIB + 16) * MIB)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-d", root, raw], check=True, capture_output=True)
    shutil.rmtree(root)
    _qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    return settle(path)


def _qemu_img(*words: str | Path) -> None:
    subprocess.run(["qemu-img", *words], check=True, capture_output=True)
