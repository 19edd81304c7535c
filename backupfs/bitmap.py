# SPDX-License-Identifier: GPL-3.0-or-later
"""What an NBD server tells of a dirty bitmap, made into a map. Pure: it is handed the answers.

    context  qemu:dirty-bitmap:NAME      bit 0: dirty (QEMU, docs/interop/nbd.txt)

Unlike the map of allocation, which only saves work, this one decides what is copied. So there is
no "unknown" that could pass for "not dirty": it is told to its end, or it is an error, and then
that base has no increment. A bit that is not known to us counts as dirty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from backupfs.allocation import (
    ANSWER_EXTENTS,
    FIRST_LENGTH,
    LEAST_LENGTH,
    MOST_EXTENTS,
    STATUS_LENGTH,
    Answer,
    Unbelievable,
)
from backupfs.extents import DIRTY, Builder, ExtentMap

PREFIX: Final = "qemu:dirty-bitmap:"


class Unfinished(ValueError):
    """The bitmap was not told to its end."""


def walk_bitmap(
    size: int,
    context: str,
    ask: Callable[[int, int], Sequence[Answer]],
    *,
    most: int = MOST_EXTENTS,
    may_go_on: Callable[[], bool] = lambda: True,
) -> ExtentMap:
    """Ask the server through *ask* (offset, length) for the dirty bitmap of all *size* bytes, in order.

    Raises Unbelievable where an answer cannot be, Unfinished where there are more than *most*
    extents or *may_go_on* said no, and what *ask* raises.
    """
    builder = Builder(size)
    length = FIRST_LENGTH
    while builder.position < size:
        if not may_go_on():
            raise Unfinished(f"the NBD server is slow to tell {context}; it came to byte {builder.position}")
        entries = _entries(ask(builder.position, min(length, size - builder.position)), context, builder.position)
        words = iter(entries)
        for extent, flags in zip(words, words, strict=True):
            _add(builder, extent, flags)
            if len(builder) > most:
                raise Unfinished(f"{context} has more than {most} extents; it came to byte {builder.position}")
        if len(entries) > 2 * ANSWER_EXTENTS:
            length = max(LEAST_LENGTH, length // 4)
        elif len(entries) < ANSWER_EXTENTS // 2:
            length = min(STATUS_LENGTH, length * 4)
    return builder.finish()


def _entries(answers: Sequence[Answer], context: str, position: int) -> Sequence[int]:
    if len(answers) != 1 or answers[0].context != context or answers[0].offset != position:
        raise Unbelievable(f"it answered something else than {context} from byte {position} on")
    entries = answers[0].entries
    if not entries or len(entries) % 2:
        raise Unbelievable(f"it told no extent of {context} from byte {position} on")
    return entries


def _add(builder: Builder, length: int, flags: int) -> None:
    rest = builder.size - builder.position
    if length <= 0 or not rest:
        raise Unbelievable(f"it told {length} bytes at byte {builder.position} of {builder.size}")
    # The last extent may reach beyond what was asked for, says the protocol.
    builder.append(min(length, rest), DIRTY if flags else 0)
