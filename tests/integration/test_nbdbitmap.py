# SPDX-License-Identifier: GPL-3.0-or-later
"""Dirty bitmaps over NBD: as QEMU tells them, or an error; from nobody an empty one for what was not told."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from backupfs.errors import NbdProtocolError, NbdTimeout, NbdUnavailable
from backupfs.extents import DIRTY
from backupfs.nbdbitmap import read_bitmap

from .conftest import MIB
from .nbdservers import DONE, Liar, extents, open_server

KIB = 2**10


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="bx", dir="/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made)
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("nbd-")]


def make_image(folder: Path, size: int, writes: list[tuple[int, int]], granularity: int = 64 * KIB) -> Path:
    image = folder / "disk.qcow2"
    for words in (
        ["qemu-img", "create", "-q", "-f", "qcow2", image, str(size)],
        ["qemu-img", "bitmap", "--add", "-g", str(granularity), image, "monday"],
        ["qemu-io", "-f", "qcow2", *(f"-cwrite -q {start} {length}" for start, length in writes), image],
    ):
        subprocess.run([str(word) for word in words], check=True, capture_output=True)
    return image


@pytest.mark.parametrize("granularity", [512, 64 * KIB, MIB])
async def test_a_bitmap_is_what_was_written_to_its_granularity(folder: Path, granularity: int) -> None:
    writes = [(0, 1), (3 * MIB + 70 * KIB, 4 * KIB), (9 * MIB - 1, 1), (20 * MIB, 5 * MIB)]
    image = make_image(folder, 64 * MIB + 512, writes, granularity)
    with open_server(folder, "qemu-nbd", "-f", "qcow2", "-B", "monday", str(image)) as server:
        found = await read_bitmap(server.address, "monday", timeout=10)
        with pytest.raises(NbdUnavailable, match="does not tell"):
            await read_bitmap(server.address, "tuesday", timeout=10)
    wanted = set()
    for start, length in writes:
        wanted |= set(range(start // granularity, -(-(start + length) // granularity)))
    dirty = set()
    for start, stop, flags in found:
        if flags & DIRTY:
            assert start % granularity == 0
            dirty |= set(range(start // granularity, -(-stop // granularity)))
    assert dirty == wanted
    assert found.size == 64 * MIB + 512


async def test_one_with_more_extents_than_there_may_be_is_an_error(folder: Path) -> None:
    image = make_image(folder, 64 * MIB, [(number * MIB, 1) for number in range(40)])
    with open_server(folder, "qemu-nbd", "-f", "qcow2", "-B", "monday", str(image)) as server:
        with pytest.raises(NbdUnavailable, match="more than 50 extents"):
            await read_bitmap(server.address, "monday", timeout=10, most=50)


async def test_a_server_that_stops_is_given_up_and_can_be_left_at_once(folder: Path) -> None:
    image = make_image(folder, MIB, [(0, 1)])
    with open_server(folder, "qemu-nbd", "-f", "qcow2", "-B", "monday", str(image)) as server:
        server.signal(signal.SIGSTOP)
        with pytest.raises(NbdTimeout):
            await read_bitmap(server.address, "monday", timeout=0.5)
        with trio.move_on_after(0.2) as scope:
            await read_bitmap(server.address, "monday", timeout=60)
        assert scope.cancelled_caught
    with pytest.raises(NbdUnavailable):
        await read_bitmap(server.address, "monday", timeout=1)


NAME = b"qemu:dirty-bitmap:monday"


@pytest.mark.parametrize(
    "chunks",
    [
        [(DONE, 5, b"\0\0\0\1")],  # nothing told
        extents(0, 0),
        [(0, 5, extents(512, 1)[0][2]), (DONE, 5, extents(512, 0)[0][2])],  # two answers
    ],
)
async def test_lies_are_errors_and_never_no_change(folder: Path, chunks: list[tuple[int, int, bytes]]) -> None:
    with Liar(folder / "nbd.sock", status=lambda _offset, _length: chunks, name=NAME) as liar:
        with pytest.raises((NbdProtocolError, NbdUnavailable)):
            await read_bitmap(liar.address, "monday", timeout=5)


async def test_nothing_is_left_open(folder: Path) -> None:
    gc.collect()  # what other tests left in cycles goes now, not in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(NbdUnavailable):
            await read_bitmap(Liar(folder / "none").address, "monday", timeout=1)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
