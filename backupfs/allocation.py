# SPDX-License-Identifier: GPL-3.0-or-later
"""What an NBD server tells about allocation, made into a map. Pure: it is handed the answers.

    asked    [position ··· 4 GiB ···)[position ···            each answer may stop early,
    answer   |-12M data-|-3.9G zero-|                         or tell of more than was asked
    again    |-12M data-|-3.9G zero-|                         zero only where both say so
    map      |---------------------------|···

The map only saves work, so whatever is wrong with it ends in "data", which is read, with the
reason kept. The server may lie: it is believed only where it can be right, and neither its
number of answers nor of extents is without bound.

Only *zero* may be made up. A hole that is not said to be zero may hold anything, so it is data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from backupfs.errors import BackupfsError
from backupfs.extents import ZERO, Builder, ExtentMap, combine

CONTEXT: Final = "base:allocation"
STATE_ZERO: Final = 2  # NBD_STATE_ZERO; bit 0, NBD_STATE_HOLE, promises nothing about the contents
STATUS_LENGTH: Final = 2**32 - 2**16  # NBD's lengths have 32 bits; a multiple of any block size
FIRST_LENGTH: Final = 2**28  # of the first question: the next are as long as the answers suggest
LEAST_LENGTH: Final = 2**24
ANSWER_EXTENTS: Final = 2**16  # wanted in one answer; a million of them would be 100 MB as libnbd hands them over
MOST_EXTENTS: Final = 2**21  # of one map: 16 MiB of memory


@dataclass(frozen=True, slots=True)
class Answer:
    """One chunk of an answer: lengths and flags in turn, from *offset* on."""

    context: str
    offset: int
    entries: Sequence[int]


class Unbelievable(ValueError):
    """The server said something about allocation that cannot be."""


@dataclass(frozen=True, slots=True)
class Told:
    """The map, how far the server told it, and why no farther; *is_full*: because of its bound."""

    extents: ExtentMap
    stop: int
    why: str | None = None
    is_full: bool = False


def walk(
    size: int,
    ask: Callable[[int, int], Sequence[Answer]],
    *,
    most: int = MOST_EXTENTS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Told:
    """Ask the server through *ask* (offset, length) for the map of [0, *size*), in order, all of it twice.

    What lies behind the place where there were *most* extents, *may_go_on* said no or asking
    failed is data in the map. Raises Unbelievable.
    """
    builder = Builder(size)
    why, is_full = None, False
    length = FIRST_LENGTH
    while builder.position < size:
        position = builder.position
        length = min(length, size - position)
        try:
            if not may_go_on():
                why = "the NBD server is slow to tell allocation"
                break
            first = _entries(ask(position, length), position)
            second = _entries(ask(position, length), position)
        except BackupfsError as error:
            why = str(error)
            break
        _add(builder, first, second, most)
        if len(builder) >= most:
            why, is_full = f"it has more than {most} extents", True
            break
        length = _next_length(builder.position - position, len(first) // 2)
    told, extents = builder.position, builder.finish()
    return Told(extents, told, why, is_full) if told < size else Told(extents, told)


def _next_length(covered: int, extents: int) -> int:
    """Return for how much to ask, so that the answer has neither too many extents nor too few."""
    alike = covered * ANSWER_EXTENTS // extents & -LEAST_LENGTH
    return max(LEAST_LENGTH, min(STATUS_LENGTH, alike))


def _entries(answers: Sequence[Answer], position: int) -> Sequence[int]:
    """Return the one answer's lengths and flags; raise Unbelievable."""
    if len(answers) != 1 or answers[0].context != CONTEXT or answers[0].offset != position:
        raise Unbelievable(f"it answered something else than {CONTEXT} from byte {position} on")
    entries = answers[0].entries
    if not entries or len(entries) % 2:
        raise Unbelievable(f"it told no extent from byte {position} on")
    return entries


def _add(builder: Builder, first: Sequence[int], second: Sequence[int], most: int) -> None:
    """Add what two answers, from the builder's position on, agree in; *most* extents in all."""
    try:
        if first == second:  # nobody wrote meanwhile; comparing takes no time
            builder.extend(first, STATE_ZERO, most)
            return
        rest = builder.size - builder.position
        stop = min(rest, sum(first[::2]), sum(second[::2]))
        maps = []
        for entries in (first, second):
            whole = Builder(rest)
            whole.extend(entries, STATE_ZERO, len(entries))
            maps.append(whole.finish())
    except ValueError as error:
        raise Unbelievable(f"it told {error}") from None
    agreed = agree(*maps)
    words = [word for start, end, flags in agreed.iter_range(0, stop) for word in (end - start, flags)]
    builder.extend(words, ZERO, most)


def agree(first: ExtentMap, second: ExtentMap) -> ExtentMap:
    """Return the map that is zero only where two answers both said so.

    The guest may discard while the server walks down from the scratch to the disk: it looks into
    the scratch, then the old block is saved there and discarded below, then it finds a zero
    below. A block that this has happened to is in the scratch ever after, so the second answer,
    asked for when the first had come, sees it there.
    """
    return combine(first, second, lambda one, other: one & other)
