# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading over NBD from real servers; the truth is the file that they serve."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

from backupfs import diskmap, nbdmap, window
from backupfs.allocation import MOST_EXTENTS
from backupfs.errors import BackupfsError, NbdProtocolError, NbdReadFailed, NbdTimeout, NbdUnavailable
from backupfs.export import Export, open_export, resolve
from backupfs.extents import ZERO
from backupfs.image import RawImage
from backupfs.nbdclient import Address, Connection, Request

from .conftest import MIB
from .nbdservers import Chunk, Liar, Server, extents, open_server

KIB = 2**10


async def allow() -> bool:
    return True


def opened(
    address: Address, *, connections: int = 2, timeout: float = 20.0, most_extents: int = MOST_EXTENTS
) -> contextlib.AbstractAsyncContextManager[Export]:
    return open_export(
        address, connections=connections, timeout=timeout, allow_reconnect=allow, most_extents=most_extents
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder whose name is short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="bx", dir="/tmp"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


def nbd_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nbd-")]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, no descriptor and no buffer is left, whatever the test did."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert nbd_threads() == []
    # pytest-trio's own are gone by now; the listing's own is not.
    after = {name for name in set(os.listdir("/proc/self/fd")) - before if os.path.exists(f"/proc/self/fd/{name}")}
    assert after == set()
    pool = window.POOL_OF_ALL
    pool.collect()
    assert len(pool._free) == pool.made <= pool.most


@pytest.fixture(scope="session")
def disk() -> Iterator[bytes]:
    """24 MiB and a bit: data, zeros in clusters and in less than that, an odd end."""
    chance = random.Random(5)
    data = bytearray(chance.randbytes(24 * MIB + 1234))
    for start, length in [(3 * MIB, 5 * MIB), (9 * MIB + 64 * KIB, 64 * KIB), (12 * MIB - 777, 3 * MIB), (0, 64 * KIB)]:
        data[start : start + length] = bytes(length)
    return bytes(data)


@pytest.fixture(params=["qemu-nbd raw", "qemu-nbd qcow2", "nbdkit file", "nbdkit 4096"])
def served(request: pytest.FixtureRequest, folder: Path, disk: bytes) -> Iterator[Server]:
    """The disk, as different servers serve it."""
    raw = folder / "disk.raw"
    raw.write_bytes(disk)
    subprocess.run(["fallocate", "--dig-holes", raw], check=True)
    match request.param:
        case "qemu-nbd raw":
            words = ["qemu-nbd", "-f", "raw", str(raw)]
        case "qemu-nbd qcow2":
            qcow2 = str(folder / "disk.qcow2")
            # One that is rounded up to sectors, as QEMU does.
            subprocess.run(["qemu-img", "convert", "-O", "qcow2", raw, qcow2], check=True)
            words = ["qemu-nbd", "-f", "qcow2", qcow2]
        case "nbdkit file":
            words = ["nbdkit", "file", str(raw)]
        case _:
            # Takes whole blocks of 4096 only, and refuses all else.
            os.truncate(raw, 24 * MIB + 4096)
            policy = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=32M"]
            words = ["nbdkit", "--filter=blocksize-policy", "file", str(raw), *policy, "blocksize-error-policy=error"]
    with open_server(folder, *words) as server:
        yield server


def padded(disk: bytes, size: int) -> bytes:
    return disk + bytes(size - len(disk))


@contextlib.contextmanager
def pattern(folder: Path, *words: str, size: str = "64M") -> Iterator[Server]:
    """Serve 8-byte words that tell their own place."""
    with open_server(folder, "nbdkit", *[word for word in words if word.startswith("--")], "pattern", size,
                     *[word for word in words if not word.startswith("--")]) as server:  # fmt: skip
        yield server


@contextlib.contextmanager
def steady(folder: Path) -> Iterator[Server]:
    """Serve the same by qemu-nbd: nbdkit 1.32 aborts (raw_send_socket) over a connection that is cut."""
    raw = folder / "pattern.raw"
    raw.write_bytes(patterned(0, 64 * MIB))
    with open_server(folder, "qemu-nbd", "-f", "raw", str(raw)) as server:
        yield server


@functools.cache
def _pattern() -> bytes:
    words = array("Q", range(0, 64 * MIB, 8))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def patterned(offset: int, length: int) -> bytes:
    """What nbdkit's plugin of that name serves: words that tell their own place."""
    return _pattern()[offset : offset + length]


async def check(export: Export, offset: int, length: int) -> None:
    got = await export.read(offset, length)
    assert len(got) == length
    assert bytes(got) == patterned(offset, length)


# --- the bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [MIB, 128 * KIB, MIB + 4096, 10_007])
async def test_whole_disk_in_order_is_the_file(served: Server, disk: bytes, step: int) -> None:
    async with opened(served.address) as export:
        image = RawImage(export, export.extents)
        truth = padded(disk, image.size)
        for offset in range(0, image.size, step):
            assert bytes(await resolve(image, offset, step)) == truth[offset : offset + step]
        assert await resolve(image, image.size, step) == b""


async def test_bytes_anywhere_are_the_files(served: Server, disk: bytes) -> None:
    chance = random.Random(1)
    async with opened(served.address) as export:
        truth = padded(disk, export.size)
        for length in [1] * 200 + [4096] * 200 + [MIB] * 20 + [5 * MIB + 3]:
            offset = chance.randrange(export.size - length)
            assert bytes(await export.read(offset, length)) == truth[offset : offset + length]
        assert bytes(await export.read(export.size - 1, 1)) == truth[-1:]


async def test_readers_at_the_same_time_get_their_own_bytes(served: Server, disk: bytes) -> None:
    async with opened(served.address, connections=3) as export:
        image = RawImage(export, export.extents)
        truth = padded(disk, image.size)

        async def read(start: int, stop: int, step: int) -> None:
            for offset in range(start, stop, step):
                assert bytes(await resolve(image, offset, step)) == truth[offset : offset + step]

        async def jump() -> None:
            chance = random.Random(2)
            for _ in range(300):
                offset = chance.randrange(image.size)
                assert bytes(await resolve(image, offset, 4096)) == truth[offset : offset + 4096]

        async with trio.open_nursery() as nursery:
            for start in range(4):
                nursery.start_soon(read, start * 6 * MIB, image.size, (start + 1) * 128 * KIB)
            nursery.start_soon(jump)


async def test_map_is_what_qemu_img_sees(served: Server) -> None:
    async with opened(served.address) as export:
        assert export.why_no_extents is None
        told = subprocess.run(["qemu-img", "map", "--output=json", "-f", "raw", served.uri],
                              check=True, capture_output=True).stdout  # fmt: skip
        zero = [(one["start"], one["start"] + one["length"]) for one in json.loads(told) if one["zero"]]
        ours = [(start, stop) for start, stop, flags in export.extents if flags & ZERO]
        # qemu-img rounds to what the server takes; what we call zero is zero, and nearly all of it is found.
        for start, stop in ours:
            assert any(begin <= start and stop <= end for begin, end in _joined(zero))
        assert sum(b - a for a, b in ours) > sum(b - a for a, b in zero) - 2 * 4096 > 7 * MIB


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            start = out.pop()[0]
        out.append((start, stop))
    return out


async def test_copy_equals_nbdcopys(served: Server, folder: Path) -> None:
    subprocess.run(["nbdcopy", served.uri, folder / "theirs"], check=True)
    async with opened(served.address) as export:
        image = RawImage(export, export.extents)
        with open(folder / "ours", "wb") as file:
            for offset in range(0, image.size, MIB):
                file.write(await resolve(image, offset, MIB))
    subprocess.run(["cmp", folder / "ours", folder / "theirs"], check=True)


# --- no more than needed -------------------------------------------------------------------------


async def test_zeros_cost_no_request_and_reading_on_fetches_data_only(folder: Path) -> None:
    raw = folder / "thin.raw"
    with open(raw, "wb") as file:
        for number in range(20):
            file.seek(number * 50 * MIB + 17 * 4096)
            file.write(random.Random(number).randbytes(64 * KIB))
        file.truncate(1000 * MIB)
    with open_server(folder, "qemu-nbd", "-f", "raw", str(raw)) as server:
        async with opened(server.address) as export:
            image = RawImage(export, export.extents)
            assert image.allocated == 20 * 64 * KIB
            with open(raw, "rb") as file:
                for offset in range(0, image.size, 256 * KIB):
                    assert bytes(await resolve(image, offset, 256 * KIB)) == file.read(256 * KIB)
            # Data that lies astride two blocks takes two requests.
            assert export.bytes_read == image.allocated
            assert export.requests <= 40


async def test_random_reads_fetch_what_was_asked_for(folder: Path) -> None:
    with pattern(folder) as server:
        async with opened(server.address) as export:
            chance = random.Random(3)
            for _ in range(200):
                await check(export, chance.randrange(0, export.size, 8192), 4096)
            assert (export.requests, export.bytes_read) == (200, 200 * 4096)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
async def test_every_connection_carries_its_share(folder: Path, count: int) -> None:
    with pattern(folder) as server:
        async with opened(server.address, connections=count) as export:
            for offset in range(0, export.size, MIB):
                await check(export, offset, MIB)
            assert len(export.traffic) == count
            assert sum(size for _, size in export.traffic) == export.bytes_read == export.size
            assert min(size for _, size in export.traffic) >= export.size // count - 2 * MIB


async def test_request_is_sent_while_another_is_in_flight(folder: Path) -> None:
    with pattern(folder, "--filter=delay", "rdelay=300ms") as server:
        async with opened(server.address, connections=1) as export:
            begun = time.monotonic()
            async with trio.open_nursery() as nursery:
                for number in range(8):
                    nursery.start_soon(check, export, number * 7 * MIB, 512)
                    await trio.sleep(0.02)  # so that the thread is asleep over the one before
            assert time.monotonic() - begun < 1.2


# --- failures --------------------------------------------------------------------------------------


def cut(server: Server) -> int:
    """Shut down this process's connections to the server; return how many there were."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as ours:
                    if ours.getpeername() == str(server.socket):
                        ours.shutdown(socket.SHUT_RDWR)
                        count += 1
    return count


@pytest.mark.parametrize("count", [1, 2, 4])
async def test_connections_cut_in_the_middle_of_reads_are_not_noticed(folder: Path, count: int) -> None:
    with steady(folder) as server:
        async with opened(server.address, connections=count) as export:
            cuts, reads = 0, [0] * 4

            async def read(number: int) -> None:
                offset = number * 15 * MIB
                while cuts < 10:
                    await check(export, offset, 256 * KIB)
                    reads[number] += 1
                    offset = (offset + 256 * KIB) % export.size

            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(read, number)
                while cuts < 10:
                    # More than a window holds, so nobody is hit twice over the same bytes.
                    before = list(reads)
                    while any(now < then + 24 for now, then in zip(reads, before, strict=True)):
                        await trio.sleep(0.005)
                    cuts += cut(server) > 0
            assert export.reconnects >= 10


async def test_server_that_was_restarted_is_found_again(folder: Path) -> None:
    with steady(folder) as server:
        async with opened(server.address) as export:
            await check(export, 0, MIB)
            await check(export, MIB, MIB)
            server.kill()
            server.start()
            for number in range(2, 60):
                await check(export, number * MIB, MIB)
            assert 1 <= export.reconnects <= 2


async def test_connection_is_not_made_again_without_leave(folder: Path) -> None:
    asked = 0

    async def refuse() -> bool:
        nonlocal asked
        asked += 1
        return False

    with steady(folder) as server:
        async with open_export(server.address, connections=2, timeout=20, allow_reconnect=refuse) as export:
            await check(export, 0, MIB)
            await check(export, 5 * MIB, MIB)
            assert cut(server) == 2
            with pytest.raises(NbdUnavailable):
                await export.read(30 * MIB, 4096)
            assert asked == 1
            assert cut(server) == 0


async def test_server_that_is_gone_is_told_at_once(folder: Path) -> None:
    with steady(folder) as server:
        async with opened(server.address) as export:
            await check(export, 0, MIB)
            server.kill()
            begun = time.monotonic()
            for _ in range(3):
                with pytest.raises(NbdUnavailable) as caught:
                    await export.read(30 * MIB, 4096)
                assert not isinstance(caught.value, NbdTimeout)
            assert time.monotonic() - begun < 2
        server.start()


async def test_server_that_stops_answering_times_out_and_is_read_again_later(folder: Path) -> None:
    with steady(folder) as server:
        async with opened(server.address, timeout=1.0) as export:
            for number in range(3):
                await check(export, number * MIB, MIB)
            server.signal(signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(NbdTimeout):
                await export.read(40 * MIB, 4096)
            assert 0.9 < time.monotonic() - begun < 2
            # Ten more wait for one attempt, not one after the other.
            errors: list[BackupfsError] = []

            async def fail(offset: int) -> None:
                try:
                    await export.read(offset, 4096)
                except BackupfsError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                for number in range(10):
                    nursery.start_soon(fail, number * 6 * MIB)
            assert time.monotonic() - begun < 4.5
            assert len(errors) == 10
            assert all(isinstance(error, NbdTimeout) for error in errors)
            server.signal(signal.SIGCONT)
            for number in range(2, 60):
                await check(export, number * MIB, MIB)


async def test_buffer_is_held_while_it_may_be_filled_and_free_when_the_request_is_done(folder: Path) -> None:
    with steady(folder) as server:
        connection = Connection(server.address, timeout=0.5)
        try:
            await connection.opened()
            server.signal(signal.SIGSTOP)
            request = Request(0, 4096, bytearray(4096))
            connection.submit(request)
            with trio.move_on_after(0.2):
                await request.wait()
            assert isinstance(request.buffer, bytearray)
            with pytest.raises(BufferError):  # as for any buffer that somebody else has in hand
                request.buffer.append(0)
            with pytest.raises(NbdTimeout):
                await request.wait()
            request.buffer.append(0)
        finally:
            await connection.close()


async def test_server_that_accepts_and_says_nothing_times_out(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        listening.listen()
        begun = time.monotonic()
        with pytest.raises(NbdTimeout):
            async with opened(Address(str(folder / "s"), ""), timeout=0.5):
                pass
        assert 0.4 < time.monotonic() - begun < 1.5


async def test_no_server_is_unavailable(folder: Path) -> None:
    with pytest.raises(NbdUnavailable, match="ENOENT"):
        async with opened(Address(str(folder / "none"), "vda")):
            pass


async def test_unknown_export_is_unavailable(folder: Path) -> None:
    with open_server(folder, "qemu-nbd", "-f", "raw", "-x", "vda", "/dev/zero") as server:
        with pytest.raises(NbdUnavailable):
            async with opened(Address(str(server.socket), "vdb")):
                pass


async def test_error_from_the_server_is_told_and_reading_goes_on(folder: Path) -> None:
    trigger = folder / "trigger"
    words = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    with pattern(folder, "--filter=error", *words) as server:
        async with opened(server.address) as export:
            await check(export, 0, MIB)
            await check(export, MIB, MIB)
            trigger.touch()
            for _ in range(3):
                with pytest.raises(NbdReadFailed) as caught:
                    await export.read(9 * MIB, 4096)
                assert (caught.value.offset, caught.value.length) == (9 * MIB, 4096)
            # Of what is in the window already, nothing is lost.
            read_before = 2
            with contextlib.suppress(NbdReadFailed):
                while read_before < 12:
                    await check(export, read_before * MIB, MIB)
                    read_before += 1
            assert read_before < 12
            trigger.unlink()
            for number in range(2, 60):
                await check(export, number * MIB, MIB)
            assert export.reconnects == 0


async def test_bad_sector_harms_only_who_reads_it(folder: Path) -> None:
    bad = 5 * MIB + 700 * KIB
    read = (
        f"if [ $4 -le {bad} ] && [ $(($4 + $3)) -gt {bad} ]; then echo EIO bad sector >&2; exit 1; fi;"
        ' head -c $3 /dev/zero | tr "\\0" x'
    )
    with open_server(folder, "nbdkit", "eval", "get_size=echo 16M", f"pread={read}") as server:
        async with opened(server.address) as export:
            failed = []
            for offset in range(0, export.size, 64 * KIB):
                try:
                    assert bytes(await export.read(offset, 64 * KIB)) == b"x" * 64 * KIB
                except NbdReadFailed:
                    failed.append(offset)
            assert failed == [bad // (64 * KIB) * 64 * KIB]


async def test_cancelled_reads_do_not_spoil_later_ones(folder: Path) -> None:
    with pattern(folder, "--filter=delay", "rdelay=10ms") as server:
        async with opened(server.address) as export:
            chance = random.Random(4)

            async def read(start: int) -> None:
                offset = start
                for _ in range(60):
                    with trio.move_on_after(chance.choice([0, 0.002, 0.012, 1])):
                        await check(export, offset, 128 * KIB)
                        offset += 128 * KIB

            async with trio.open_nursery() as nursery:
                for start in range(0, 60 * MIB, 12 * MIB):
                    nursery.start_soon(read, start)


async def test_export_closed_under_its_readers_tells_them(folder: Path) -> None:
    with pattern(folder, "--filter=delay", "rdelay=3") as server:
        errors: list[BackupfsError] = []
        async with trio.open_nursery() as nursery:
            async with opened(server.address) as export:

                async def read(offset: int) -> None:
                    try:
                        await export.read(offset, 4096)
                    except BackupfsError as error:
                        errors.append(error)

                for number in range(4):
                    nursery.start_soon(read, number * MIB)
                await trio.sleep(0.2)
                begun = time.monotonic()
            assert time.monotonic() - begun < 1
        assert [type(error) for error in errors] == [NbdUnavailable] * 4
        with pytest.raises(NbdUnavailable):
            await export.read(0, 4096)


async def test_export_closed_while_it_reconnects_does_not_wait_for_that(folder: Path) -> None:
    with steady(folder) as server:
        async with trio.open_nursery() as nursery:
            async with opened(server.address, timeout=20) as export:

                async def read() -> None:
                    with pytest.raises(NbdUnavailable):
                        await export.read(0, 4096)

                await check(export, MIB, MIB)
                server.signal(signal.SIGSTOP)
                cut(server)
                nursery.start_soon(read)
                await trio.sleep(0.3)
                begun = time.monotonic()
            assert time.monotonic() - begun < 1


async def test_fifty_rounds_leave_nothing(folder: Path) -> None:
    with steady(folder) as server:
        for number in range(50):
            async with opened(server.address, connections=3) as export:
                for offset in range(0, 4 * MIB, MIB):
                    await check(export, offset, MIB)
                if number % 5 == 0:
                    cut(server)
                    await check(export, 20 * MIB, MIB)
            assert nbd_threads() == []
    assert len(os.listdir("/proc/self/fd")) < 40


async def test_memory_is_bounded_while_many_stream(folder: Path) -> None:
    with pattern(folder, size="600M") as server:
        async with contextlib.AsyncExitStack() as stack:
            exports = [await stack.enter_async_context(opened(server.address)) for _ in range(4)]

            async def read(export: Export, start: int) -> None:
                for offset in range(start, start + 20 * MIB, MIB):
                    assert len(await export.read(offset, MIB)) == MIB

            async with trio.open_nursery() as nursery:
                for export in exports:
                    for start in range(0, 500 * MIB, 100 * MIB):
                        nursery.start_soon(read, export, start)
            assert window.POOL_OF_ALL.made <= window.POOL + 20 * 2


async def test_memory_of_what_was_read_is_given_back(folder: Path) -> None:
    with pattern(folder) as server:
        async with opened(server.address) as export:
            chance = random.Random(3)
            tracemalloc.start()
            try:
                for _ in range(100):
                    await check(export, chance.randrange(0, export.size - MIB, 2 * MIB), 256 * KIB)
                kept, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert export.bytes_read == 100 * 256 * KIB
            assert kept < 2 * MIB


# --- the map ---------------------------------------------------------------------------------------


async def test_hole_that_is_not_said_to_be_zero_is_read(folder: Path) -> None:
    read = 'head -c $3 /dev/zero | tr "\\0" x'
    words = ["get_size=echo 256K", f"pread={read}", "can_extents=exit 0", "extents=echo 0 256K hole"]
    with open_server(folder, "nbdkit", "eval", *words) as server:
        async with opened(server.address) as export:
            assert list(export.extents) == [(0, 256 * KIB, 0)]
            assert bytes(await export.read(1, 4096)) == b"x" * 4096


async def test_map_that_cannot_be_had_does_not_hinder_reading(folder: Path) -> None:
    raw = folder / "pattern.raw"
    raw.write_bytes(patterned(0, 2 * MIB))
    words = ["error-extents=EIO", "error-extents-rate=100%"]
    with open_server(folder, "nbdkit", "--filter=error", "file", str(raw), *words) as server:
        async with opened(server.address) as export:
            assert list(export.extents) == [(0, 2 * MIB, 0)]
            assert export.why_no_extents is not None
            assert "EIO" in export.why_no_extents
            await check(export, 100, MIB)


async def test_server_without_maps_is_read(folder: Path) -> None:
    with pattern(folder, "--no-sr") as server:
        async with opened(server.address) as export:
            assert export.why_no_extents == "the NBD server does not tell allocation"
            await check(export, 100, MIB)


async def test_server_whose_requests_are_too_small_is_refused_in_plain_words(folder: Path) -> None:
    words = ["blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=64K"]
    with pattern(folder, "--filter=blocksize-policy", *words) as server:
        with pytest.raises(NbdUnavailable, match="at most 65536 bytes"):
            async with opened(server.address):
                pass


@contextlib.asynccontextmanager
async def lied(liar: Liar, timeout: float = 2.0) -> AsyncIterator[Export]:
    with liar:
        async with opened(liar.address, timeout=timeout) as export:
            yield export


def endless(_offset: int, _length: int) -> Iterator[Chunk]:
    while True:
        yield (0, 5, struct.pack(">III", 1, 4096, 2))


LIES = {
    "zero length": lambda _offset, _length: extents(4096, 0, 0, 2),
    "beyond the end": lambda _offset, length: extents(length, 2, 4096, 2),
    "no extent": lambda _offset, _length: [(1, 5, struct.pack(">I", 1))],
    "another context": lambda _offset, length: [(1, 5, struct.pack(">III", 9, length, 2))],
    "twice": lambda _offset, length: [(0, 5, struct.pack(">III", 1, length, 2)), *extents(length, 2)],
    "nothing": lambda _offset, _length: [(1, 0, b"")],
    "endless": endless,
    "half an extent": lambda _offset, _length: [(1, 5, struct.pack(">II", 1, 4096))],
}


@pytest.mark.parametrize("lie", LIES)
async def test_lie_about_the_map_is_not_believed_and_the_disk_is_read(folder: Path, lie: str) -> None:
    begun = time.monotonic()
    async with lied(Liar(folder / "s", status=LIES[lie], read=lambda _offset, length: b"y" * length)) as export:
        assert time.monotonic() - begun < 5
        assert list(export.extents) == [(0, MIB, 0)]
        assert export.why_no_extents is not None
        assert bytes(await export.read(5, 4096)) == b"y" * 4096


async def test_server_that_never_ends_its_map_costs_time_and_memory_within_bounds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbdmap, "MAP_SECONDS", 0.5)
    liar = Liar(folder / "s", size=2**50, status=lambda _offset, _length: extents(512, 2))
    begun = time.monotonic()
    async with lied(liar) as export:
        assert 0.4 < time.monotonic() - begun < 1.5
        assert len(export.extents) == 2
        assert export.extents.total(ZERO) > 0
        assert 0 < export.extents.mapped < MIB * 512


async def test_server_that_hangs_over_the_map_only_is_read(folder: Path) -> None:
    async with lied(Liar(folder / "s", status=lambda _offset, _length: []), timeout=0.5) as export:
        assert export.why_no_extents is not None
        assert "has not answered" in export.why_no_extents
        assert bytes(await export.read(5, 4096)) == bytes(4096)


async def test_what_changes_between_two_answers_is_data(folder: Path) -> None:
    asked = 0

    def status(_offset: int, _length: int) -> list[Chunk]:
        nonlocal asked
        asked += 1
        return extents(MIB // 2, 2, MIB // 2, 0) if asked == 1 else extents(MIB // 4, 0, MIB * 3 // 4, 2)

    async with lied(Liar(folder / "s", status=status)) as export:
        assert list(export.extents) == [(0, MIB // 4, 0), (MIB // 4, MIB // 2, ZERO), (MIB // 2, MIB, 0)]


# --- a map too large to be fetched at once ----------------------------------------------------------


@pytest.fixture
def fragments(folder: Path) -> Path:
    """256 MiB, then 4 GiB thin but for 4000 pieces of 4 KiB, then 100 GiB of nothing, and a last piece."""
    path = folder / "fragments.raw"
    with open(path, "wb") as file:
        for number in range(4000):
            file.seek(256 * MIB + number * MIB)
            file.write(random.Random(number).randbytes(4096))
        file.seek(256 * MIB + 104 * 1024 * MIB)
        file.write(b"the end")
        file.truncate(257 * MIB + 104 * 1024 * MIB)
    return path


async def test_map_beyond_its_bound_is_fetched_where_it_is_read(folder: Path, fragments: Path) -> None:
    with open_server(folder, "qemu-nbd", "-f", "raw", str(fragments)) as server:
        async with opened(server.address, most_extents=1000) as export, opened(server.address) as whole:
            assert whole.extents.mapped == whole.size
            assert 256 * MIB < export.extents.mapped < 1024 * MIB
            assert export.why_no_extents is None
            image = RawImage(export, export.extents)
            assert image.allocated < image.size
            with open(fragments, "rb") as file:
                for offset in range(200 * MIB, 1500 * MIB, MIB):
                    file.seek(offset)
                    assert bytes(await resolve(image, offset, MIB)) == file.read(MIB)
            assert list(export.extents.iter_range(0, 4096 * MIB)) == list(whole.extents.iter_range(0, 4096 * MIB))
            # Of the holes nothing, or nearly so.
            assert export.bytes_read <= 1500 * 4096 + 4 * MIB


async def test_seek_over_what_is_not_mapped_maps_it(folder: Path, fragments: Path) -> None:
    with open_server(folder, "qemu-nbd", "-f", "raw", str(fragments)) as server:
        async with opened(server.address, most_extents=1000) as export:
            with open(fragments, "rb") as file:
                position, seen = 0, []
                while (found := await export.extents.locate(position, ZERO, wanted=False)) is not None:
                    position = await export.extents.locate(found, ZERO, wanted=True) or export.size
                    seen.append((found, position))
                assert seen[0] == (256 * MIB, 256 * MIB + 4096)
                assert len(seen) == 4001
                for start, stop in seen:
                    assert os.lseek(file.fileno(), start, os.SEEK_HOLE) == stop
                    assert os.lseek(file.fileno(), start - 1, os.SEEK_DATA) == start


async def test_random_reads_beyond_the_map_ask_for_none_and_fetch_no_more(folder: Path, fragments: Path) -> None:
    with open_server(folder, "qemu-nbd", "-f", "raw", str(fragments)) as server:
        async with opened(server.address, most_extents=100) as export:
            mapped = export.extents.mapped
            for number in range(64):
                offset = 5 * 1024 * MIB + number * 37 % 64 * 1500 * MIB + 8192
                assert bytes(await export.read(offset, 4096)) == bytes(4096)
            assert export.bytes_read == 64 * 4096
            assert export.extents.mapped == mapped


def after(limit: int, then: Callable[[int, int], Iterator[Chunk] | list[Chunk]]) -> Callable[..., object]:
    """Tell 16 MiB pieces of zeros; from *limit* on do something else."""

    def status(offset: int, length: int) -> Iterator[Chunk] | list[Chunk]:
        if offset >= limit:
            return then(offset, length)
        part = min(length, limit - offset) // 2
        return extents(part, 2, part, 0)

    return status


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        pytest.param(lambda _offset, _length: [(3, 0x8001, struct.pack(">IH", 5, 0))], "EIO", id="fails"),
        pytest.param(lambda _offset, length: extents(length, 2, 0, 2), "cannot be believed", id="lies"),
        pytest.param(lambda _offset, _length: [], "has not answered", id="stalls"),
        pytest.param(lambda _offset, _length: [(1, 99, b"?" * 7)], "no NBD connection", id="talks nonsense"),
    ],
)
async def test_server_that_goes_wrong_in_the_middle_is_read_there(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    then: Callable[[int, int], Iterator[Chunk] | list[Chunk]],
    reason: str,
) -> None:
    monkeypatch.setattr(nbdmap, "WINDOW_SECONDS", 0.3)
    giB = 1024 * MIB
    # Known from the begin, then in a window, then no more.
    liar = Liar(folder / "s", size=40 * giB, status=after(6 * giB, then), read=lambda _offset, length: b"y" * length)
    with liar:
        async with opened(liar.address, timeout=2.0, most_extents=2) as export:
            image = RawImage(export, export.extents)
            assert 0 < export.extents.mapped < 6 * giB
            assert export.why_no_extents is None
            begun, slowest = time.monotonic(), 0.0
            for offset in range(0, image.size, 32 * MIB):
                before = time.monotonic()
                got = bytes(await resolve(image, offset, 4096))
                slowest = max(slowest, time.monotonic() - before)
                assert got in ((b"y" * 4096,) if offset >= 6 * giB else (b"y" * 4096, bytes(4096)))
            assert slowest < 1
            assert time.monotonic() - begun < 8
            with trio.fail_after(3):  # a question may still be under way
                while export.why_no_extents is None:
                    await trio.sleep(0.01)
            assert reason in export.why_no_extents
            assert export.extents.find(0, ZERO, wanted=True) == 0


async def test_export_closed_while_its_map_is_asked_for_does_not_wait_for_that(folder: Path) -> None:
    liar = Liar(folder / "s", size=2**40, status=after(2**31, lambda _offset, _length: []))
    with liar:
        async with opened(liar.address, most_extents=2) as export:
            for offset in range(2**33, 2**33 + 4 * MIB, MIB):
                await export.read(offset, MIB)
            begun = time.monotonic()
        assert time.monotonic() - begun < 0.5


async def test_slow_map_delays_the_begin_within_its_bound_and_comes_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No machine is too slow for this: in the begin only answers make time pass, and after it the
    # server holds the upper three quarters back until it is told to go on.
    monkeypatch.setattr(nbdmap, "MAP_SECONDS", 70.0)
    monkeypatch.setattr(nbdmap, "WINDOW_SECONDS", 70.0)
    monkeypatch.setattr(diskmap, "SEEK_SECONDS", 0.2)
    clock = 0.0
    monkeypatch.setattr(nbdmap, "time", SimpleNamespace(monotonic=lambda: clock))
    asked: list[tuple[int, int]] = []
    begun, go_on = threading.Event(), threading.Event()

    def slowly(offset: int, length: int) -> list[Chunk]:
        nonlocal clock
        asked.append((offset, length))
        if not begun.is_set():
            clock += 20
        elif offset + length > 2**34:
            go_on.wait()
        return extents(length, 2)

    with Liar(folder / "s", size=2**36, status=slowly) as liar, trio.fail_after(60):
        try:
            async with opened(liar.address) as export:
                begun.set()
                # Each is asked twice, the last of them at 60 s.
                assert len(asked) == 4
                assert export.extents.mapped == asked[0][1] + asked[2][1] < export.size
                while export.extents.mapped < 2**33:
                    assert await export.extents.locate(0, ZERO, wanted=False) is not None  # what is not told is data
                assert export.extents.mapped <= 2**34
                go_on.set()
                while await export.extents.locate(0, ZERO, wanted=False) is not None:
                    pass
                assert export.extents.mapped == export.size
        finally:
            go_on.set()


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 2**64 - 1])
async def test_impossible_size_is_refused(folder: Path, size: int) -> None:
    with pytest.raises((NbdProtocolError, NbdUnavailable)):
        async with lied(Liar(folder / "s", size=size)):
            pass


async def test_empty_disk_has_nothing(folder: Path) -> None:
    async with lied(Liar(folder / "s", size=0)) as export:
        assert await resolve(RawImage(export, export.extents), 0, 4096) == b""


async def test_disk_that_changed_its_size_is_not_taken_for_the_same(folder: Path) -> None:
    liar = Liar(folder / "s")
    async with lied(liar) as export:
        assert len(await export.read(0, 4096)) == 4096
        liar.size *= 2
        for client in liar.clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        with pytest.raises(NbdUnavailable, match="it had 1048576"):
            await export.read(8192, 4096)


async def test_answer_that_trickles_times_out(folder: Path) -> None:
    liar = Liar(folder / "s", read=lambda _offset, _length: None)
    async with lied(liar, timeout=0.5) as export:
        begun = time.monotonic()

        async def trickle() -> None:
            await trio.sleep(0.1)
            client = liar.clients[-1]
            with contextlib.suppress(OSError):
                # The reply's head, then a byte now and then.
                client.sendall(struct.pack(">IIQ", 0x67446698, 0, 1))
                while True:
                    client.sendall(b"z")
                    await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with pytest.raises(NbdUnavailable):
                await export.read(0, 4096)
            assert time.monotonic() - begun < 3
            nursery.cancel_scope.cancel()


async def test_answer_that_was_not_asked_for_ends_the_connection_only(folder: Path) -> None:
    liar = Liar(folder / "s", read=lambda _offset, length: bytes(length) + b"more than that")
    async with lied(liar) as export:
        for offset in range(0, MIB, 128 * KIB):
            assert bytes(await export.read(offset, 4096)) == bytes(4096)
        assert export.reconnects >= 3
