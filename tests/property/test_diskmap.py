# SPDX-License-Identifier: GPL-3.0-or-later
"""A map that grows says the same as the whole map, or "data", in whatever order it is used."""

from __future__ import annotations

from collections.abc import Callable

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs.allocation import CONTEXT, Answer, Told, walk
from backupfs.diskmap import DiskMap
from backupfs.errors import NbdUnavailable
from backupfs.extents import ZERO, Builder, ExtentMap

GRAIN = 16


def built(pieces: list[tuple[int, int]]) -> ExtentMap:
    builder = Builder(sum(length for length, _ in pieces))
    for length, flags in pieces:
        builder.append(length, flags)
    return builder.finish()


def flat(found: ExtentMap | DiskMap, start: int, stop: int) -> bytes:
    out, position, last = b"", start, None
    for begin, end, flags in found.iter_range(start, stop):
        assert begin == position < end
        assert flags != last, "neighbours that are alike"
        out, position, last = out + bytes([flags]) * (end - begin), end, flags
    assert position == stop
    return out


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, ZERO])), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.data(),
)
def test_map_that_grows_equals_the_whole_one(
    pieces: list[tuple[int, int]], window_extents: int, most_windows: int, data: st.DataObject
) -> None:
    truth = built(pieces)
    size = truth.size
    known = data.draw(st.integers(0, size))
    fails = data.draw(st.booleans())

    def walked(start: int, stop: int, most: int, fails: bool) -> Told:
        def ask(offset: int, length: int) -> list[Answer]:
            if fails and data.draw(st.integers(0, 3)) == 0:
                raise NbdUnavailable("vda", "cut")
            words: list[int] = []
            for begin, end, flags in truth.iter_range(start + offset, start + offset + length):
                words += [end - begin, flags]
            return [Answer(CONTEXT, offset, words[: 2 * data.draw(st.integers(1, len(words) // 2))])]

        return walk(stop - start, ask, most=most)

    first = built([(known, ZERO), (size - known, 0)] if 0 < known < size else [(size, 0)])
    if known:
        builder = Builder(size)
        for begin, end, flags in truth.iter_range(0, known):
            builder.append(end - begin, flags)
        first = builder.finish()

    async def main() -> None:
        held: list[Callable[[], None]] = []
        may_wait = True

        def ask(start: int, stop: int, most: int, arrived: Callable[[Told], None]) -> None:
            assert known <= start < stop <= size
            assert not found.knows(start, stop)

            def answer() -> None:
                arrived(walked(start, stop, most, fails))

            if may_wait and data.draw(st.booleans()):
                held.append(answer)
            else:
                answer()

        found = DiskMap(first, known, ask, window_extents=window_extents, most_windows=most_windows, grain=GRAIN)
        for _ in range(data.draw(st.integers(1, 12))):
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start + 1, size))
            if data.draw(st.booleans()):
                await found.cover(start, stop)
            may_wait = True
            while held and data.draw(st.booleans()):
                held.pop()()
            got, whole = flat(found, start, stop), flat(truth, start, stop)
            assert all(ours in (0, theirs) for ours, theirs in zip(got, whole, strict=True)), "a zero was made up"
            if found.knows(start, stop) and not fails:
                assert got == whole
            assert found.knows(0, size) is (found.mapped == size)
            assert len(found) <= len(first) + most_windows * (window_extents + 1)
            for wanted in (True, False):
                everything = [bool(byte & ZERO) for byte in flat(found, start, size)]
                expected = start + everything.index(wanted) if wanted in everything else None
                assert found.find(start, ZERO, wanted) == expected
                may_wait = bool(held) or fails
                if not may_wait:
                    assert await found.locate(start, ZERO, wanted) == truth.find(start, ZERO, wanted)
        while held:
            held.pop()()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
