# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Sequence

import pytest

from backupfs.allocation import ANSWER_EXTENTS, FIRST_LENGTH, LEAST_LENGTH, STATUS_LENGTH, Answer, Unbelievable
from backupfs.bitmap import PREFIX, Unfinished, walk_bitmap
from backupfs.extents import DIRTY, uniform

CONTEXT = PREFIX + "backup-vda"


def one(*entries: int, offset: int = 0, context: str = CONTEXT) -> list[Answer]:
    return [Answer(context, offset, entries)]


def test_every_flag_counts_as_dirty() -> None:
    found = walk_bitmap(50, CONTEXT, lambda *_: one(10, 0, 10, 1, 10, 0, 10, 2, 10, 0))
    assert list(found) == [(0, 10, 0), (10, 20, DIRTY), (20, 30, 0), (30, 40, DIRTY), (40, 50, 0)]


def test_answers_may_stop_early_and_the_last_reach_beyond_the_end() -> None:
    found = walk_bitmap(30, CONTEXT, lambda offset, _: one(20, (offset // 20) % 2, offset=offset))
    assert list(found) == [(0, 20, 0), (20, 30, DIRTY)]


def test_thin_disk_takes_few_questions_and_a_busy_one_short_answers() -> None:
    lengths: list[int] = []

    def thin(offset: int, length: int) -> Sequence[Answer]:
        lengths.append(length)
        return one(length, 0, offset=offset)

    assert walk_bitmap(2**40, CONTEXT, thin) == uniform(2**40)
    assert lengths[:3] == [FIRST_LENGTH, 4 * FIRST_LENGTH, 16 * FIRST_LENGTH - 2**16]
    assert max(lengths) == STATUS_LENGTH
    assert len(lengths) == 258

    lengths.clear()

    def busy(offset: int, length: int) -> Sequence[Answer]:
        lengths.append(length)
        return one(*([1, 0] * (ANSWER_EXTENTS + 1)), offset=offset)

    with pytest.raises(StopIteration):
        walk_bitmap(2**40, CONTEXT, lambda offset, length: busy(offset, length) if len(lengths) < 5 else next(iter([])))
    assert lengths == [FIRST_LENGTH, FIRST_LENGTH // 4, LEAST_LENGTH, LEAST_LENGTH, LEAST_LENGTH]


def test_answers_of_the_wanted_length_are_asked_for_again() -> None:
    lengths: list[int] = []

    def ask(offset: int, length: int) -> Sequence[Answer]:
        lengths.append(length)
        return one(*([1, 0] * ANSWER_EXTENTS), offset=offset)

    walk_bitmap(2 * ANSWER_EXTENTS, CONTEXT, ask)
    assert lengths == [2 * ANSWER_EXTENTS, ANSWER_EXTENTS]


@pytest.mark.parametrize(
    "answers",
    [
        pytest.param([], id="nothing"),
        pytest.param(one(), id="no extent"),
        pytest.param(one(30), id="half an extent"),
        pytest.param(one(0, 1, 30, 0), id="empty extent"),
        pytest.param(one(-1, 1), id="less than an empty extent"),
        pytest.param(one(30, 0, 1, 0), id="beyond the end"),
        pytest.param(one(30, 0, offset=512), id="another place"),
        pytest.param(one(30, 0, context="base:allocation"), id="another context"),
        pytest.param(one(30, 0) + one(30, 0), id="twice"),
    ],
)
def test_what_cannot_be_is_not_believed(answers: list[Answer]) -> None:
    with pytest.raises(Unbelievable):
        walk_bitmap(30, CONTEXT, lambda *_: answers)


def test_too_many_extents_are_an_error_and_not_a_guess() -> None:
    with pytest.raises(Unfinished, match="more than 4 extents; it came to byte 5"):
        walk_bitmap(9, CONTEXT, lambda *_: one(*[1, 0, 1, 1] * 5), most=4)


def test_slow_server_is_an_error_and_not_a_guess() -> None:
    turns = iter([True, False])
    with pytest.raises(Unfinished, match="slow"):
        walk_bitmap(9, CONTEXT, lambda offset, _: one(1, 1, offset=offset), may_go_on=lambda: next(turns))


def test_empty_disk_is_not_asked_about() -> None:
    assert walk_bitmap(0, CONTEXT, lambda *_: pytest.fail("asked")) == uniform(0)
