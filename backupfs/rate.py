# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast the guest's host is read: one bucket of bytes for all disks of a mount.

    filled at *rate*, up to BURST seconds' worth or a block
          │
          ▼
       bucket ──take──► who reads: the one whose turn it is, then the next
             └─take_ahead──► blocks ahead: only what nobody waits for

Turns go by bytes, not by requests: each flow has a finish, how many bytes it would have got if
all had been served alike, and the one with the least goes first (start-time fair queueing). So one who jumps
about in 4 KiB waits for a megabyte of each who reads on at most, not for all that they ask for.

A reader pays before his request is sent: the time that he waits is not the server's.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Final

import trio

BURST: Final = 0.25  # seconds


class Flow:
    """Requests that share a turn: one reader's who reads on, or those of all who jump about."""

    __slots__ = ("finish",)

    def __init__(self) -> None:
        self.finish = 0.0  # bytes


class _Turn:
    """One who waits."""

    __slots__ = ("come", "key")

    def __init__(self, start: float, number: int) -> None:
        self.key = start, number
        self.come = trio.Event()

    def __lt__(self, other: _Turn) -> bool:
        return self.key < other.key


class Bucket:
    """At most *rate* bytes a second, and *block* of them at least at once."""

    def __init__(self, rate: float, block: int, clock: Callable[[], float] = trio.current_time) -> None:
        self.rate = rate
        self._most = max(rate * BURST, float(block))
        self._clock = clock
        self._bytes = self._most
        self._filled = clock()
        self._turn = 0.0  # the start of the flow that was served last
        self._waiting: list[_Turn] = []  # a heap
        self._numbers = itertools.count()
        self._closed = False

    def close(self) -> None:
        """Let all go on who wait: what they are to read is being closed."""
        self._closed = True
        for turn in self._waiting:
            turn.come.set()

    async def take(self, flow: Flow, count: int) -> None:
        """Wait for *count* bytes, a block at most, until it is the flow's turn and they are there."""
        start = max(self._turn, flow.finish)
        flow.finish = start + count
        mine = _Turn(start, next(self._numbers))
        heapq.heappush(self._waiting, mine)
        try:
            while not self._closed and (self._waiting[0] is not mine or self._missing(count)):
                mine.come = trio.Event()
                first = self._waiting[0] is mine
                with trio.move_on_after(self._missing(count) / self.rate if first else float("inf")):
                    await mine.come.wait()
        except BaseException:
            # Not for one that others have come after: their turns stand.
            if flow.finish == start + count:
                flow.finish = start
            raise
        else:
            self._bytes -= count
            self._turn = start
        finally:
            self._waiting.remove(mine)
            heapq.heapify(self._waiting)
            if self._waiting:
                self._waiting[0].come.set()

    def take_ahead(self, flow: Flow, count: int) -> bool:
        """Take *count* bytes if nobody waits for them and they are there."""
        if self._waiting or self._missing(count):
            return False
        self._bytes -= count
        flow.finish = max(self._turn, flow.finish) + count
        return True

    def _missing(self, count: int) -> float:
        now = self._clock()
        self._bytes = min(self._most, self._bytes + (now - self._filled) * self.rate)
        self._filled = now
        missing = count - self._bytes
        return missing if missing >= 1 else 0.0  # for a rest that is too small, no clock moves
