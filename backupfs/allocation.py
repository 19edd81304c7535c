# SPDX-License-Identifier: GPL-3.0-or-later
"""What an NBD server tells about allocation, made into a map. Pure: it is handed the answers.

    asked    [position ··· 4 GiB ···)[position ···            each answer may stop early,
    answer   |-12M data-|-3.9G zero-|                         or tell of more than was asked
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

from backupfs.extents import ZERO, Builder, ExtentMap, combine

CONTEXT: Final = "base:allocation"
STATE_ZERO: Final = 2  # NBD_STATE_ZERO; bit 0, NBD_STATE_HOLE, promises nothing about the contents
STATUS_LENGTH: Final = 2**32 - 2**16  # NBD's lengths have 32 bits; a multiple of any block size
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
    """The map, how far the server was asked for it, and why no farther."""

    extents: ExtentMap
    stop: int
    why: str | None


def walk(
    size: int,
    ask: Callable[[int, int], Sequence[Answer]],
    *,
    stop: int | None = None,
    most: int = MOST_EXTENTS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> Told:
    """Ask the server through *ask* (offset, length) for the map of [0, *stop*), in order.

    The rest of the disk's *size* bytes is data, as is all behind the place where *most* extents
    were told or *may_go_on* said no. Raises Unbelievable.
    """
    builder = Builder(size)
    stop = size if stop is None else stop
    why = None
    while builder.position < stop:
        if not may_go_on():
            why = f"the NBD server is slow to tell allocation; from byte {builder.position} on everything is read"
            break
        position = builder.position
        add_answers(builder, ask(position, min(STATUS_LENGTH, stop - position)), most)
        if len(builder) >= most:
            why = f"more than {most} extents; from byte {builder.position} on everything is read"
            break
    told = builder.position
    return Told(builder.finish(), told, why)


def add_answers(builder: Builder, answers: Sequence[Answer], most: int) -> None:
    """Add what was answered from the builder's position on, *most* extents in all; else raise Unbelievable."""
    position = builder.position
    if len(answers) != 1 or answers[0].context != CONTEXT or answers[0].offset != position:
        raise Unbelievable(f"it answered something else than {CONTEXT} from byte {position} on")
    entries = answers[0].entries
    if not entries or len(entries) % 2:
        raise Unbelievable(f"it told no extent from byte {position} on")
    size = builder.size
    words = iter(entries)
    for length, flags in zip(words, words, strict=True):
        if position == size:
            raise Unbelievable(f"its map goes on beyond {size} bytes")
        if length <= 0:
            raise Unbelievable(f"it told an empty extent at byte {position}")
        if len(builder) >= most:
            return
        # The last extent may reach beyond what was asked for, says the protocol.
        length = min(length, size - position)
        builder.append(length, ZERO if flags & STATE_ZERO else 0)
        position += length


def agree(first: ExtentMap, second: ExtentMap) -> ExtentMap:
    """Return the map that is zero only where two walks both said so.

    The guest may discard while the server walks down from the scratch to the disk: it looks into
    the scratch, then the old block is saved there and discarded below, then it finds a zero
    below. A block that this has happened to is in the scratch ever after, so the second walk
    sees it.
    """
    if first == second:
        return first  # nobody wrote meanwhile; comparing takes no time
    return combine(first, second, lambda one, other: one & other)
