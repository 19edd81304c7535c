# SPDX-License-Identifier: GPL-3.0-or-later
"""The map that grows, over a server that answers when the test says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from backupfs.allocation import STATUS_LENGTH, Told
from backupfs.diskmap import (
    GRAIN,
    MOST_QUESTIONS,
    MOST_WINDOWS,
    NEAR,
    PATIENCE,
    READS,
    SEEK_SECONDS,
    WINDOW_EXTENTS,
    DiskMap,
)
from backupfs.extents import ZERO, Builder, ExtentMap, is_zero, uniform

MIB = 2**20
SIZE = 2**45  # 32 TiB
KNOWN = 2**40


class Server:
    """Answers as *tell* has it, at once or when `answer` is called."""

    def __init__(self, tell: Callable[[int, int], Told], *, at_once: bool = True) -> None:
        self.tell = tell
        self.at_once = at_once
        self.asked: list[tuple[int, int]] = []
        self.waiting: list[tuple[int, int, Callable[[Told], None]]] = []

    def ask(self, start: int, stop: int, most: int, arrived: Callable[[Told], None]) -> None:
        assert most == WINDOW_EXTENTS
        self.asked.append((start, stop))
        self.waiting.append((start, stop, arrived))
        if self.at_once:
            self.answer()

    def answer(self) -> None:
        waiting, self.waiting = self.waiting, []
        for start, stop, arrived in waiting:
            arrived(self.tell(start, stop))


def all_zero(start: int, stop: int) -> Told:
    return Told(uniform(stop - start, ZERO), stop - start)


def grown(server: Server) -> DiskMap:
    return DiskMap(uniform(SIZE), KNOWN, server.ask)


async def read_on(found: DiskMap, start: int, stop: int, step: int = MIB) -> None:
    for offset in range(start, stop, step):
        if not found.knows(offset, offset + abs(step)):
            await found.cover(offset, offset + abs(step))


async def test_map_that_is_known_asks_nothing() -> None:
    found = DiskMap(uniform(100, ZERO), why="so it is")
    assert found.knows(0, 100)
    await found.cover(0, 100)
    assert list(found) == [(0, 100, ZERO)]
    assert found.find(3, ZERO, True) == await found.locate(3, ZERO, True) == 3
    assert await found.locate(100, ZERO, True) is None
    assert (found.total(ZERO), found.mapped, len(found), found.why) == (100, 100, 1, "so it is")


async def test_what_is_unknown_is_data() -> None:
    found = DiskMap(uniform(100, ZERO), 40, Server(all_zero).ask)
    found = DiskMap(made((40, ZERO), (60, 0)), 40, Server(all_zero).ask)
    assert list(found) == [(0, 40, ZERO), (40, 100, 0)]
    assert found.find(0, ZERO, False) == 40
    assert found.find(50, ZERO, True) is None
    assert not is_zero(found, 30, 50)
    assert found.mapped == 40


def made(*extents: tuple[int, int]) -> ExtentMap:
    builder = Builder(sum(length for length, _ in extents))
    for length, flags in extents:
        builder.append(length, flags)
    return builder.finish()


async def test_reader_who_goes_on_from_the_known_finds_the_rest_mapped() -> None:
    server = Server(all_zero)
    found = grown(server)
    await read_on(found, KNOWN - 3 * MIB, KNOWN + 3 * STATUS_LENGTH, 16 * MIB)
    assert server.asked[0] == (KNOWN, KNOWN + STATUS_LENGTH)
    assert [stop - start for start, stop in server.asked[:3]] == [STATUS_LENGTH] * 3
    assert is_zero(found, KNOWN, KNOWN + 3 * STATUS_LENGTH)
    assert found.mapped == KNOWN + 3 * STATUS_LENGTH + (STATUS_LENGTH if len(server.asked) == 4 else 0)


async def test_single_read_somewhere_is_not_worth_a_map_but_a_second_one_near_is() -> None:
    server = Server(all_zero)
    found = grown(server)
    for number in range(2 * READS):
        await found.cover(2**41 + number * 2**36, 2**41 + number * 2**36 + 4096)
    assert server.asked == []
    last = 2**41 + (2 * READS - 1) * 2**36
    await found.cover(last + MIB, last + 2 * MIB)
    assert server.asked == [(last, last + STATUS_LENGTH)]


async def test_reader_who_goes_backwards_makes_no_tiny_windows() -> None:
    server = Server(all_zero)
    found = grown(server)
    await read_on(found, 2**42 + 63 * MIB, 2**42 - 64 * MIB, -MIB)
    assert server.asked == [(2**42, 2**42 + STATUS_LENGTH), (2**42 - GRAIN, 2**42)]


async def test_windows_are_bounded_and_the_last_used_ones_stay() -> None:
    server = Server(all_zero)
    found = grown(server)
    for number in range(3 * MOST_WINDOWS):
        start = KNOWN + number * 2**36
        await read_on(found, start, start + 2 * MIB)
        assert found.knows(KNOWN, KNOWN + MIB)  # used all the while
    assert len(server.asked) == 3 * MOST_WINDOWS
    assert len(found) == MOST_WINDOWS + 1
    assert not found.knows(KNOWN + 2**36, KNOWN + 2**36 + MIB)
    assert found.knows(start, start + MIB)


async def test_window_that_is_full_ends_early_and_the_next_goes_on_there() -> None:
    def tell(start: int, stop: int) -> Told:
        return Told(uniform(stop - start), 10 * MIB, "it has very many", is_full=True)

    server = Server(tell)
    found = grown(server)
    await read_on(found, KNOWN, KNOWN + 30 * MIB)
    assert [start for start, _ in server.asked] == [KNOWN, KNOWN + 10 * MIB, KNOWN + 20 * MIB]
    assert found.why is None


async def test_failure_is_data_and_tells_why_and_is_not_tried_again_at_once() -> None:
    server = Server(lambda start, stop: Told(made((MIB, ZERO), (stop - start - MIB, 0)), MIB, "cut"))
    found = grown(server)
    await read_on(found, KNOWN, KNOWN + STATUS_LENGTH - 16 * MIB, 16 * MIB)
    assert server.asked == [(KNOWN, KNOWN + STATUS_LENGTH)]
    assert list(found.iter_range(KNOWN, KNOWN + 2 * MIB)) == [
        (KNOWN, KNOWN + MIB, ZERO),
        (KNOWN + MIB, KNOWN + 2 * MIB, 0),
    ]
    assert found.why == "cut"


async def test_reader_waits_no_longer_than_reading_would_take(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(all_zero, at_once=False)
    found = grown(server)
    begun = trio.current_time()
    await read_on(found, KNOWN, KNOWN + 20 * MIB)  # all of them together
    assert trio.current_time() - begun == pytest.approx(PATIENCE)
    assert not is_zero(found, KNOWN, KNOWN + MIB)
    assert len(server.asked) == 1
    server.answer()
    assert is_zero(found, KNOWN, KNOWN + STATUS_LENGTH)


async def test_questions_that_wait_are_few_and_do_not_overlap(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(all_zero, at_once=False)
    found = grown(server)
    for number in (3, 1, 2, *range(100, 1000, 70)):
        start = KNOWN + number * GRAIN
        await read_on(found, start, start + 2 * MIB)
    assert len(server.asked) == MOST_QUESTIONS
    # 3, then what lies before it, cut where the one before begins.
    assert server.asked[0] == (KNOWN + 3 * GRAIN, KNOWN + 3 * GRAIN + STATUS_LENGTH)
    assert server.asked[1] == (KNOWN + GRAIN, KNOWN + 3 * GRAIN)
    server.answer()
    assert is_zero(found, KNOWN + GRAIN, KNOWN + 3 * GRAIN + STATUS_LENGTH)


async def test_locate_maps_what_lies_on_the_way() -> None:
    place = KNOWN + 700 * STATUS_LENGTH + 12345

    def tell(start: int, stop: int) -> Told:
        if not start <= place < stop:
            return all_zero(start, stop)
        return Told(made((place - start, ZERO), (4096, 0), (stop - place - 4096, ZERO)), stop - start)

    server = Server(tell)
    found = DiskMap(made((KNOWN, ZERO), (SIZE - KNOWN, 0)), KNOWN, server.ask)
    assert await found.locate(5, ZERO, wanted=False) == place
    assert len(server.asked) == 701
    assert await found.locate(place, ZERO, wanted=True) == place + 4096
    assert await found.locate(place + 4096, ZERO, wanted=False) is None
    assert found.find(5, ZERO, wanted=False) == KNOWN  # long forgotten; data, then


async def test_locate_takes_the_rest_for_data_after_a_while(autojump_clock: trio.testing.MockClock) -> None:
    found = grown(Server(all_zero, at_once=False))
    begun = trio.current_time()
    assert await found.locate(KNOWN + 5, ZERO, wanted=False) == KNOWN + 5
    assert trio.current_time() - begun == pytest.approx(SEEK_SECONDS)
    assert await found.locate(KNOWN + 5, ZERO, wanted=True) is None


async def test_locate_does_without_where_too_much_is_asked(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(all_zero, at_once=False)
    found = grown(server)
    for number in range(MOST_QUESTIONS):
        await read_on(found, 2**42 + number * 2**36, 2**42 + number * 2**36 + 2 * MIB)
    begun = trio.current_time()
    assert await found.locate(KNOWN, ZERO, wanted=False) == KNOWN
    assert trio.current_time() == begun


async def test_total_is_a_guess_that_never_says_no_holes() -> None:
    half = made((KNOWN // 2, ZERO), (KNOWN // 2, 0), (SIZE - KNOWN, 0))
    ask = Server(all_zero).ask
    assert DiskMap(half, KNOWN, ask).total(ZERO) == SIZE // 2
    assert DiskMap(uniform(SIZE), KNOWN, ask).total(ZERO) == 4096
    assert DiskMap(uniform(SIZE), 0, ask).total(ZERO) == 4096
    assert DiskMap(half).total(ZERO) == KNOWN // 2


async def test_range_outside_the_disk_is_refused() -> None:
    found = grown(Server(all_zero))
    with pytest.raises(ValueError, match="is not in"):
        list(found.iter_range(0, SIZE + 1))
    assert found.find(SIZE, ZERO, False) is None
    assert found.find(-1, ZERO, False) is None
    assert list(found.iter_range(KNOWN + 5, KNOWN + 5)) == []


async def test_first_bytes_of_a_disk_of_which_nothing_is_known_are_not_next_to_anything() -> None:
    server = Server(all_zero)
    found = DiskMap(uniform(SIZE), 0, server.ask)
    await found.cover(NEAR // 2, NEAR // 2 + 4096)
    assert server.asked == []
