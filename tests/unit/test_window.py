# SPDX-License-Identifier: GPL-3.0-or-later
"""The window ahead of readers, over a source whose answers come when the test says so."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from backupfs.connections import Fetch
from backupfs.diskmap import DiskMap
from backupfs.errors import NbdReadFailed, NbdUnavailable
from backupfs.export import Export
from backupfs.extents import ZERO, Builder, ExtentMap, uniform
from backupfs.nbdclient import Request
from backupfs.rate import Bucket
from backupfs.window import BLOCK, FAR, LATE, NEAR, POOL, STREAMS, SURE, Pool, Windows, align

KIB = 2**10
HALF = BLOCK // 2


PERIOD = BLOCK + 4099  # so that no two blocks are alike
_random = random.Random(7).randbytes(PERIOD) * 4


def content(offset: int, length: int) -> bytes:
    """Bytes that tell their place."""
    return _random[offset % PERIOD :][:length]


class Held:
    """A source that keeps what it is asked for until `answer`."""

    def __init__(self, extents: ExtentMap, *, at_once: bool = True) -> None:
        self.size = extents.size
        self.alignment = 1
        self.extents = DiskMap(extents)
        self.at_once = at_once
        self.asked: list[tuple[int, int]] = []
        self.held: list[Request] = []
        self.broken: set[int] = set()  # offsets that cannot be read
        self.token = trio.lowlevel.current_trio_token()

    def ask(self, offset: int, length: int, buffer: bytearray | memoryview) -> Fetch:
        assert length == len(buffer) > 0
        self.asked.append((offset, length))
        request = Request(offset, length, buffer)
        self.held.append(request)
        if self.at_once:
            self.answer()
        return Fetch(request)

    async def arrive(self, fetch: Fetch) -> None:
        await fetch.request.wait()

    def answer(self, *, only: int | None = None) -> None:
        """Answer all, the last first; or only what begins at one offset."""
        answering = [request for request in self.held if only in (None, request.offset)]
        self.held = [request for request in self.held if request not in answering]
        for request in reversed(answering):
            if any(request.offset <= bad < request.offset + request.length for bad in self.broken):
                error = NbdReadFailed("vda", request.offset, request.length, "EIO")
                request.finish(self.token, error)
            else:
                request.buffer[: request.length] = self.truth(request.offset, request.length)
                request.finish(self.token, None)

    def truth(self, offset: int, length: int) -> bytes:
        return b"".join(
            bytes(stop - start) if flags & ZERO else content(start, stop - start)
            for start, stop, flags in self.extents.iter_range(offset, offset + length)
        )

    @property
    def fetched(self) -> int:
        return sum(length for _, length in self.asked)


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(POOL)
    yield made
    assert len(made._free) == made.made, "a buffer was lost"


class Reader:
    """Reads a source like `Export` does, with a pool of its own."""

    def __init__(self, source: Held, pool: Pool, bucket: Bucket | None = None) -> None:
        self.source = source
        self.windows = Windows(source, pool, bucket)
        self.export = Export(source, bucket)  # type: ignore[arg-type]  # has what Export uses
        self.export._windows = self.windows
        source.is_broken = False  # type: ignore[attr-defined]

    async def check(self, offset: int, length: int) -> None:
        assert bytes(await self.export.read(offset, length)) == self.source.truth(offset, length)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.source.answer()
        self.windows.close()


async def test_read_that_adjoins_no_other_fetches_its_own_bytes_and_no_more(pool: Pool) -> None:
    async with Reader(Held(uniform(100 * BLOCK)), pool) as reader:
        places = [7 * BLOCK + 5, 50 * BLOCK, 3, 90 * BLOCK - 9]
        for place in places:
            await reader.check(place, 4096)
        assert reader.source.asked == [(place, 4096) for place in places]


async def test_second_read_in_a_row_opens_the_window(pool: Pool) -> None:
    async with Reader(Held(uniform(100 * BLOCK)), pool) as reader:
        await reader.check(0, BLOCK)
        assert reader.source.asked == [(0, BLOCK)]
        await reader.check(BLOCK, BLOCK)
        assert reader.source.asked[1:] == [(BLOCK, BLOCK), (2 * BLOCK, BLOCK)]
        for number in range(2, 20):
            await reader.check(number * BLOCK, BLOCK)
        # Each block once, and no more of them ahead than there should be.
        assert reader.source.asked == [(number * BLOCK, BLOCK) for number in range(20 + NEAR)]


async def test_few_small_reads_in_a_row_are_no_stream_yet(pool: Pool) -> None:
    async with Reader(Held(uniform(100 * BLOCK)), pool) as reader:
        for offset in range(0, SURE - 4 * KIB, 4 * KIB):
            await reader.check(offset, 4 * KIB)
        assert reader.source.fetched == SURE - 4 * KIB
        await reader.check(SURE - 4 * KIB, 4 * KIB)
        assert reader.source.asked[-2:] == [(0, BLOCK), (BLOCK, BLOCK)]


async def test_kernels_ramp_then_blocks_that_straddle(pool: Pool) -> None:
    async with Reader(Held(uniform(20 * BLOCK)), pool) as reader:
        offset = 0
        for length in [64 * KIB, 128 * KIB, 256 * KIB, 512 * KIB] + [BLOCK] * 18:
            await reader.check(offset, length)
            offset += length
        await reader.check(offset, 20 * BLOCK - offset)
        assert reader.source.fetched == 20 * BLOCK + 64 * KIB


async def test_window_ends_with_the_disk(pool: Pool) -> None:
    size = 3 * BLOCK + 12345
    async with Reader(Held(uniform(size)), pool) as reader:
        for offset in range(0, size, 100_000):
            await reader.check(offset, min(100_000, size - offset))
        assert max(offset + length for offset, length in reader.source.asked) == size


async def test_requests_that_come_out_of_order_are_one_stream(pool: Pool) -> None:
    async with Reader(Held(uniform(40 * BLOCK)), pool) as reader:
        await reader.check(0, BLOCK)
        await reader.check(BLOCK, BLOCK)
        for number in range(2, 30, 2):
            await reader.check((number + 1) * BLOCK, BLOCK)
            await reader.check(number * BLOCK, BLOCK)
        assert len(reader.source.asked) == len(set(reader.source.asked)) <= 30 + NEAR


async def test_several_readers_and_one_that_jumps_do_not_fight(pool: Pool) -> None:
    async with Reader(Held(uniform(1000 * BLOCK)), pool) as reader:
        for number in range(30):
            for start in (0, 200, 400, 600):
                await reader.check((start + number) * BLOCK, BLOCK)
            await reader.check((number * 7919 % 150 + 800) * BLOCK + 77, 4096)
        blocks = [offset for offset, length in reader.source.asked if length == BLOCK]
        assert len(blocks) == len(set(blocks)) <= 4 * (30 + NEAR)
        assert reader.source.fetched == len(blocks) * BLOCK + 30 * 4096


async def test_reader_that_trails_behind_another_does_not_fetch_each_block_many_times(pool: Pool) -> None:
    async with Reader(Held(uniform(100 * BLOCK)), pool) as reader:
        for number in range(3 * 8, 60 * 8):
            await reader.check(number * 128 * KIB, 128 * KIB)
            await reader.check((number - 3 * 8) * 128 * KIB, 128 * KIB)
        assert reader.source.fetched < 2.2 * 60 * BLOCK


def islands() -> ExtentMap:
    """64 KiB of data in every fourth block, with the block's edge in the middle of some."""
    builder = Builder(40 * BLOCK + 100)
    for number in range(10):
        shift = -32 * KIB if number % 2 else 300 * KIB
        builder.append((number * 4 + 2) * BLOCK + shift - builder.position, ZERO)
        builder.append(64 * KIB, 0)
    return builder.finish(ZERO)


async def test_window_steps_over_zeros_and_fetches_data_only(pool: Pool) -> None:
    found = islands()
    async with Reader(Held(found), pool) as reader:
        for start, stop, flags in found:
            if not flags & ZERO:
                await reader.check(start, stop - start)
        assert reader.source.fetched == 10 * 64 * KIB
        # The first is fetched alone; then each waits in the window before it is asked for.
        assert len(reader.source.asked) == 1 + 4 + 5 * 2


async def test_zeros_within_a_window_are_zeros(pool: Pool) -> None:
    builder = Builder(6 * BLOCK)
    for length, flags in [
        (BLOCK + HALF, 0),
        (HALF, ZERO),
        (BLOCK, ZERO),
        (HALF, ZERO),
        (BLOCK, 0),
        (100, ZERO),
    ]:
        builder.append(length, flags)
    found = builder.finish()
    async with Reader(Held(found), pool) as reader:
        for step in (100 * KIB, 700 * KIB, BLOCK, BLOCK + 4096):
            reader.windows.follow(0, SURE)
            for offset in range(SURE, found.size, step):
                await reader.check(offset, min(step, found.size - offset))


async def test_bad_byte_in_a_block_harms_only_who_asks_for_it(pool: Pool) -> None:
    async with Reader(Held(uniform(10 * BLOCK)), pool) as reader:
        reader.source.broken = {2 * BLOCK + 700 * KIB}
        for offset in range(0, 2 * BLOCK + 640 * KIB, 128 * KIB):
            await reader.check(offset, 128 * KIB)
        with pytest.raises(NbdReadFailed):
            await reader.export.read(2 * BLOCK + 640 * KIB, 128 * KIB)
        await reader.check(2 * BLOCK + 768 * KIB, 128 * KIB)
        reader.source.broken = set()
        await reader.check(2 * BLOCK + 640 * KIB, 128 * KIB)


async def test_cancelled_reader_leaves_its_buffer_to_the_connection(pool: Pool) -> None:
    source = Held(uniform(100 * BLOCK), at_once=False)
    async with Reader(source, pool) as reader:
        for start in range(0, 60, 3):
            reader.windows.follow(start * BLOCK, BLOCK)
            with trio.move_on_after(0):
                await reader.export.read((start + 1) * BLOCK, BLOCK)
        # Each is still being filled, so no buffer may have been given out twice.
        buffers = [ctypes.addressof(ctypes.c_char.from_buffer(request.buffer)) for request in source.held]
        assert len(buffers) == len(set(buffers)) > 20
        source.answer()
        source.at_once = True
        for number in range(70, 90):
            await reader.check(number * BLOCK, BLOCK)


async def test_buffers_are_bounded_however_many_stream(pool: Pool) -> None:
    source = Held(uniform(1000 * BLOCK))
    async with Reader(source, pool) as one, Reader(Held(uniform(1000 * BLOCK)), pool) as other:
        for number in range(12):
            for start in range(0, STREAMS * 50, 50):
                await one.check((start + number) * BLOCK, BLOCK)
                await other.check((start + number) * BLOCK, BLOCK)
        assert pool.made == POOL


async def test_reader_takes_the_buffers_of_one_that_went_away(pool: Pool, mock_clock: trio.testing.MockClock) -> None:
    async with Reader(Held(uniform(1000 * BLOCK)), pool) as gone, Reader(Held(uniform(100 * BLOCK)), pool) as reader:
        for start in range(0, STREAMS * 50, 50):
            for number in range(6):
                await gone.check((start + number) * BLOCK, BLOCK)
        assert pool.made == POOL
        # At first only for what is waited for, later for the window too.
        await reader.check(0, BLOCK)
        await reader.check(BLOCK, BLOCK)
        assert len(reader.source.asked) == 2
        mock_clock.jump(10)
        await reader.check(2 * BLOCK, BLOCK)
        assert len(reader.source.asked) == 5
        assert pool.made == POOL


async def test_reader_who_waits_gets_a_buffer_beyond_the_bound() -> None:
    pool = Pool(2)
    source = Held(uniform(100 * BLOCK), at_once=False)
    async with Reader(source, pool) as reader, trio.open_nursery() as nursery:
        for start in (0, 10, 20, 30):
            reader.windows.follow(start * BLOCK, BLOCK)
            nursery.start_soon(reader.check, (start + 1) * BLOCK, BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        assert pool.made == 5  # one for each, and the first one's window
        source.answer()
    assert pool.made == len(pool._free) == 2


async def test_block_that_failed_ahead_is_asked_for_again(pool: Pool) -> None:
    source = Held(uniform(10 * BLOCK), at_once=False)
    async with Reader(source, pool) as reader:
        reader.windows.follow(0, BLOCK)
        with trio.move_on_after(0):
            await reader.export.read(BLOCK, BLOCK)
        while source.held:
            source.held.pop().finish(source.token, NbdUnavailable("vda", "cut"))
        source.at_once = True
        await reader.check(2 * BLOCK, BLOCK)


async def test_waiters_for_one_block_share_it(pool: Pool) -> None:
    source = Held(uniform(10 * BLOCK))
    async with Reader(source, pool) as reader, trio.open_nursery() as nursery:
        await reader.check(0, BLOCK)
        await reader.check(BLOCK, BLOCK)
        source.at_once = False
        for part in range(8):
            nursery.start_soon(reader.check, 3 * BLOCK + part * 128 * KIB, 128 * KIB)
        await trio.testing.wait_all_tasks_blocked()
        source.answer()
        assert [offset // BLOCK for offset, _ in source.asked].count(3) == 1


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 0), (99, 101), (100, 101)])
async def test_read_outside_the_disk_is_refused(pool: Pool, start: int, stop: int) -> None:
    async with Reader(Held(uniform(100)), pool) as reader:
        with pytest.raises(ValueError, match="is not in"):
            await reader.export.read(start, stop - start)


def test_align_widens_to_whole_blocks_and_ends_with_the_disk() -> None:
    assert align(5, 6, 1, 100) == (5, 6)
    assert align(513, 1500, 512, 4096) == (512, 1536)
    assert align(512, 1024, 512, 4096) == (512, 1024)
    assert align(4000, 4090, 4096, 4090) == (0, 4090)


async def test_window_is_deeper_for_a_server_that_is_slow(pool: Pool, mock_clock: trio.testing.MockClock) -> None:
    source = Held(uniform(200 * BLOCK), at_once=False)
    async with Reader(source, pool) as reader, trio.open_nursery() as nursery:

        def ahead(number: int) -> int:
            return max(offset for offset, _ in source.asked) // BLOCK - number

        for number in range(20):
            # As it comes over a network: nothing is there before it is waited for.
            nursery.start_soon(reader.check, number * BLOCK, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(2 * LATE)
            source.answer(only=number * BLOCK)
        assert ahead(19) == FAR
        source.answer()
        source.at_once = True
        for number in range(20, 100):
            await reader.check(number * BLOCK, BLOCK)
        assert ahead(99) == NEAR


async def test_all_that_is_fetched_is_paid_for_once(pool: Pool, autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket(4 * BLOCK, BLOCK)
    source = Held(uniform(40 * BLOCK))
    async with Reader(source, pool, bucket) as reader, trio.open_nursery() as nursery:
        begun = trio.current_time()

        async def read(start: int) -> None:
            for offset in (start * BLOCK, start * BLOCK + 64 * KIB):
                await reader.check(offset, 64 * KIB)
            for offset in range(start * BLOCK + 128 * KIB, (start + 10) * BLOCK, 128 * KIB):
                # As the kernel does: two at a time, of one block mostly.
                async with trio.open_nursery() as two:
                    two.start_soon(reader.check, offset, 64 * KIB)
                    two.start_soon(reader.check, offset + 64 * KIB, 64 * KIB)

        nursery.start_soon(read, 0)
        nursery.start_soon(read, 20)
    assert source.fetched <= 24 * BLOCK
    assert trio.current_time() - begun == pytest.approx((source.fetched / BLOCK - 1) / 4, rel=0.05)


async def test_zeros_are_not_paid_for(pool: Pool, autojump_clock: trio.testing.MockClock) -> None:
    begun = trio.current_time()
    found = islands()
    async with Reader(Held(found), pool, Bucket(BLOCK, BLOCK)) as reader:
        for start, stop, flags in found:
            if not flags & ZERO:
                await reader.check(start, stop - start)
        assert reader.source.fetched == 10 * 64 * KIB
    builder = Builder(8 * BLOCK)
    builder.append(BLOCK // 4, 0)
    async with Reader(Held(builder.finish(ZERO)), pool, Bucket(BLOCK, BLOCK)) as reader:
        reader.windows.follow(0, SURE)
        await reader.check(SURE, 3 * BLOCK)
        assert reader.source.fetched == BLOCK // 4
    assert trio.current_time() == begun  # a burst, of 40 MiB


async def test_readers_who_pay_lose_no_buffer_when_streams_come_and_go(
    pool: Pool, autojump_clock: trio.testing.MockClock
) -> None:
    bucket = Bucket(BLOCK, BLOCK)
    async with Reader(Held(uniform(1000 * BLOCK)), pool, bucket) as reader, trio.open_nursery() as nursery:
        for start in range(0, 2 * STREAMS * 20, 20):
            reader.windows.follow(start * BLOCK, BLOCK)
            nursery.start_soon(reader.check, (start + 1) * BLOCK, BLOCK)
            await trio.testing.wait_all_tasks_blocked()


async def test_reader_who_pays_while_all_is_closed_loses_no_buffer(
    pool: Pool, autojump_clock: trio.testing.MockClock
) -> None:
    source = Held(uniform(100 * BLOCK))
    async with trio.open_nursery() as nursery:
        async with Reader(source, pool, Bucket(BLOCK, BLOCK)) as reader:
            await reader.check(0, BLOCK)
            reader.windows.follow(10 * BLOCK, BLOCK)
            nursery.start_soon(reader.check, 11 * BLOCK, BLOCK)
            await trio.testing.wait_all_tasks_blocked()
