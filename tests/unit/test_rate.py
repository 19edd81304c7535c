# SPDX-License-Identifier: GPL-3.0-or-later
"""The bucket on a clock that jumps."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from backupfs.rate import BURST, Bucket, Flow

MIB = 2**20


Clock = trio.testing.MockClock


async def read(bucket: Bucket, flow: Flow, count: int, size: int) -> float:
    """Take *count* times; return when that was over."""
    for _ in range(count):
        await bucket.take(flow, size)
    return trio.current_time()


@pytest.mark.parametrize("rate", [64 * 1024, MIB, 50 * MIB, 777 * MIB])
@pytest.mark.parametrize("size", [4096, 100_001, MIB])
async def test_bytes_come_at_the_rate_after_a_burst(autojump_clock: Clock, rate: int, size: int) -> None:
    bucket = Bucket(rate, MIB)
    flow, burst = Flow(), 0
    while bucket.take_ahead(flow, size):
        burst += size
    assert max(MIB, rate * BURST) - size <= burst <= max(MIB, rate * BURST)
    left = max(MIB, rate * BURST) - burst
    begun = trio.current_time()
    took = await read(bucket, flow, 300, size) - begun
    assert took == pytest.approx((300 * size - left) / rate, rel=1e-3)


async def test_bucket_that_nobody_uses_holds_no_more_than_a_burst(autojump_clock: Clock) -> None:
    bucket = Bucket(100 * MIB, MIB)
    await trio.sleep(1000)
    begun = trio.current_time()
    assert await read(bucket, Flow(), 125, MIB) - begun == pytest.approx(1.0, rel=1e-3)


async def test_all_who_read_get_the_same_share(autojump_clock: Clock) -> None:
    bucket = Bucket(10 * MIB, MIB)
    ends: dict[int, float] = {}

    async def run(size: int) -> None:
        ends[size] = await read(bucket, Flow(), 40 * MIB // size, size)

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for size in (MIB, MIB // 2, MIB // 4, MIB // 8):
            nursery.start_soon(run, size)
    assert min(ends.values()) - begun > 15.0 * 0.95
    assert max(ends.values()) - begun == pytest.approx((160 - 2.5) / 10, rel=0.01)


async def test_one_who_jumps_waits_for_one_block_of_each_who_reads_on(autojump_clock: Clock) -> None:
    bucket = Bucket(10 * MIB, MIB)
    waits: list[float] = []

    async def read_on() -> None:
        # As the kernel reads ahead: several requests of one reader wait at a time.
        flow = Flow()
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(read, bucket, flow, 1000, MIB)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(read_on)
        await trio.sleep(5)
        jumps = Flow()
        for _ in range(50):
            begun = trio.current_time()
            await bucket.take(jumps, 4096)
            waits.append(trio.current_time() - begun)
            await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert max(waits) <= 0.31  # twelve requests of a tenth of a second each wait all the while


async def test_many_who_jump_do_not_starve_one_who_reads_on(autojump_clock: Clock) -> None:
    bucket = Bucket(10 * MIB, MIB)
    jumps = Flow()
    async with trio.open_nursery() as nursery:
        for _ in range(16):
            nursery.start_soon(read, bucket, jumps, 10**6, 32768)
        begun = trio.current_time()
        took = await read(bucket, Flow(), 20, MIB) - begun
        assert took == pytest.approx(4.0, rel=0.15)  # half of it all
        nursery.cancel_scope.cancel()


async def test_what_is_taken_ahead_counts_and_never_goes_before_one_who_waits(autojump_clock: Clock) -> None:
    bucket = Bucket(MIB, MIB)
    flow = Flow()
    assert bucket.take_ahead(flow, MIB)
    assert not bucket.take_ahead(flow, 1)
    begun = trio.current_time()
    await bucket.take(flow, MIB)
    assert trio.current_time() - begun == pytest.approx(1.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bucket.take, flow, MIB)
        await trio.sleep(0.5)
        assert not bucket.take_ahead(Flow(), 1)


async def test_one_who_gives_up_takes_nothing_and_holds_up_nobody(autojump_clock: Clock) -> None:
    bucket = Bucket(MIB, MIB)
    await bucket.take(Flow(), MIB)
    begun = trio.current_time()
    flow = Flow()

    async def give_up(seconds: float) -> None:
        with trio.move_on_after(seconds):
            await bucket.take(flow, MIB)
            pytest.fail("it came")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up, 0.2)
        nursery.start_soon(give_up, 0.4)
        await trio.sleep(0.1)
        nursery.start_soon(bucket.take, Flow(), MIB)
    assert trio.current_time() - begun == pytest.approx(1.0)
    await trio.sleep(1)
    begun = trio.current_time()
    await bucket.take(flow, MIB)
    assert trio.current_time() == begun


async def test_clock_is_the_one_that_was_handed_in(autojump_clock: Clock) -> None:
    now = 0.0
    bucket = Bucket(MIB, MIB, clock=lambda: now)
    assert bucket.take_ahead(Flow(), MIB)
    assert not bucket.take_ahead(Flow(), 4096)
    now = 0.5
    assert bucket.take_ahead(Flow(), MIB // 2)


async def test_all_go_on_when_it_is_closed(autojump_clock: Clock) -> None:
    bucket = Bucket(MIB, MIB)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(bucket.take, Flow(), MIB)
        await trio.testing.wait_all_tasks_blocked()
        bucket.close()
    await bucket.take(Flow(), MIB)
    assert trio.current_time() == begun
