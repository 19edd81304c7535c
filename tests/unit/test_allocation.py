# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Sequence

import pytest

from backupfs.allocation import CONTEXT, FIRST_LENGTH, STATUS_LENGTH, Answer, Unbelievable, agree, walk
from backupfs.errors import NbdUnavailable
from backupfs.extents import ZERO, Builder, ExtentMap, uniform

HOLE = 1
TIB = 2**40


def zeros(*extents: tuple[int, int]) -> ExtentMap:
    builder = Builder(sum(length for length, _ in extents))
    for length, flags in extents:
        builder.append(length, flags)
    return builder.finish()


def one(*entries: int, offset: int = 0, context: str = CONTEXT) -> list[Answer]:
    return [Answer(context, offset, entries)]


def test_thin_tebibyte_is_asked_for_in_few_requests() -> None:
    asked: list[tuple[int, int]] = []

    def ask(offset: int, length: int) -> Sequence[Answer]:
        asked.append((offset, length))
        return one(length, HOLE | ZERO, offset=offset)

    told = walk(TIB, ask)
    assert list(told.extents) == [(0, TIB, ZERO)]
    assert asked[::2] == asked[1::2]
    assert len(asked) == 2 * 257
    rest = TIB - FIRST_LENGTH - 255 * STATUS_LENGTH
    assert asked[-1] == (TIB - rest, rest)
    assert (told.stop, told.why) == (TIB, None)


def test_only_zero_is_taken_over_and_a_mere_hole_is_data() -> None:
    told = walk(40, lambda *_: one(10, 0, 10, HOLE, 10, ZERO, 10, HOLE | ZERO))
    assert list(told.extents) == [(0, 20, 0), (20, 40, ZERO)]


def test_answer_that_stops_early_is_followed_by_another_question() -> None:
    told = walk(30, lambda offset, _length: one(7, ZERO * (offset % 2), offset=offset))
    assert list(told.extents) == [(0, 7, 0), (7, 14, ZERO), (14, 21, 0), (21, 28, ZERO), (28, 30, 0)]


def test_last_extent_may_reach_beyond_the_end() -> None:
    assert list(walk(30, lambda *_: one(10, 0, 2**32 - 1, ZERO)).extents) == [(0, 10, 0), (10, 30, ZERO)]


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([], id="nothing"),
        pytest.param(one(), id="no extent"),
        pytest.param(one(30), id="half an extent"),
        pytest.param(one(0, ZERO, 30, 0), id="empty extent"),
        pytest.param(one(10, 0, 0, 0, 20, 0), id="empty extent later"),
        pytest.param(one(30, 0, 1, 0), id="beyond the end"),
        pytest.param(one(30, 0, offset=512), id="another place"),
        pytest.param(one(30, 0, context="qemu:dirty-bitmap:x"), id="another context"),
        pytest.param(one(30, 0) + one(30, 0), id="twice"),
    ],
)
def test_what_cannot_be_is_not_believed(answers: list[Answer]) -> None:
    with pytest.raises(Unbelievable):
        walk(30, lambda *_: answers)


def test_number_of_extents_is_bounded_and_the_rest_is_data() -> None:
    entries = [1, 0, 1, ZERO] * 100
    told = walk(1000, lambda offset, _: one(*entries, offset=offset), most=10)
    assert len(told.extents) == 11
    assert list(told.extents)[-2:] == [(9, 10, ZERO), (10, 1000, 0)]
    assert told.stop == 10
    assert (told.why, told.is_full) == ("it has more than 10 extents", True)


def test_slow_server_is_not_asked_for_ever() -> None:
    turns = iter([True, True, False])  # one for each stretch
    told = walk(100, lambda offset, _: one(1, ZERO, offset=offset), may_go_on=lambda: next(turns))
    assert list(told.extents) == [(0, 2, ZERO), (2, 100, 0)]
    assert told.why is not None
    assert "slow" in told.why


def test_zero_is_what_both_answers_called_so() -> None:
    answers = iter([one(10, ZERO, 20, 0), one(5, ZERO, 20, 0, 9, ZERO), one(1, ZERO, offset=30), one(5, 0, offset=30),
                    one(4, ZERO, offset=31), one(4, ZERO, offset=31)])  # fmt: skip
    told = walk(35, lambda *_: next(answers))
    # Each goes only as far as both do.
    assert list(told.extents) == [(0, 5, ZERO), (5, 31, 0), (31, 35, ZERO)]
    first, second = zeros((10, ZERO), (20, 0)), zeros((5, ZERO), (20, 0), (5, ZERO))
    assert list(agree(first, second)) == [(0, 5, ZERO), (5, 30, 0)]


def test_answers_with_very_many_extents_are_followed_by_shorter_questions() -> None:
    asked: list[tuple[int, int]] = []
    tiny = 2**14

    def ask(offset: int, length: int) -> Sequence[Answer]:
        asked.append((offset, length))
        # Thin, then finely fragmented, then thin again.
        if 2**33 <= offset < 2**34:
            return one(*[tiny, 0, tiny, ZERO] * (length // tiny // 2), offset=offset)
        return one(min(length, 2**33 - offset if offset < 2**33 else length), HOLE | ZERO, offset=offset)

    told = walk(2**36, ask, most=2**40, may_go_on=lambda: len(asked) < 20)
    assert told.stop > 2**33
    lengths = [length for offset, length in asked[::2] if offset >= 2**33]
    assert lengths[0] == STATUS_LENGTH
    assert set(lengths[1:]) == {2**16 * tiny}


def test_failure_ends_the_map_where_it_happened() -> None:
    def ask(offset: int, length: int) -> Sequence[Answer]:
        if offset:
            raise NbdUnavailable("vda", "cut")
        return one(10, ZERO)

    told = walk(100, ask)
    assert list(told.extents) == [(0, 10, ZERO), (10, 100, 0)]
    assert (told.stop, told.why, told.is_full) == (10, "vda: no NBD connection: cut", False)


@pytest.mark.parametrize("bad", [(30, 0, 1, 0), (10, 0, 0, 0)])
def test_second_answer_is_looked_at_as_closely(bad: tuple[int, ...]) -> None:
    answers = iter([one(30, 0), one(*bad)])
    with pytest.raises(Unbelievable):
        walk(30, lambda *_: next(answers))


def test_empty_disk_is_not_asked_about() -> None:
    assert walk(0, lambda *_: pytest.fail("asked")).extents == uniform(0)
