# SPDX-License-Identifier: GPL-3.0-or-later
"""The connection that asks an NBD server what is allocated, and does nothing else.

    trio thread       open ·······► size, map from 0 on     ask(start, stop) ···► arrived(told)
                        │              ▲                        │                     ▲ run_sync_soon
    map's thread     connect ─► walk ──┘ all known? the end     └─► walk the stretch ─┘

It lives for as long as there is something left to ask. Whatever goes wrong ends in a shorter
map, never in an error: a connection that broke is made again for the next question, for the
socket's name is that of one job only; a server that lied is asked no more.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import trio

from backupfs.allocation import CONTEXT, MOST_EXTENTS, Answer, Told, Unbelievable, walk
from backupfs.errors import BackupfsError, NbdProtocolError
from backupfs.extents import uniform
from backupfs.nbdclient import Address, NbdError
from backupfs.nbdstatus import StatusWire

log = logging.getLogger("backupfs.nbdmap")

MAP_SECONDS: Final = 2.0  # of the map at the begin, for which the first reader waits
WINDOW_SECONDS: Final = 2.0  # of a stretch later, for which a reader waits less


@dataclass(frozen=True, slots=True)
class First:
    """What the begin brought: the disk's *size*, if it is known, and its map as far as it was told.

    No more can be had where *is_final*.
    """

    size: int | None
    told: Told
    is_final: bool


@dataclass(frozen=True, slots=True)
class _Question:
    start: int
    stop: int
    most: int
    arrived: Callable[[Told], None]


class MapConnection(StatusWire):
    """Asks for the map of one disk. Close it in any case."""

    def __init__(self, address: Address, *, timeout: float, most: int = MOST_EXTENTS) -> None:
        super().__init__(address, CONTEXT, timeout)
        self._most = most
        self._first = First(None, Told(uniform(0), 0, "its map was not asked for"), is_final=True)
        self._opened = trio.Event()
        self._lie: str | None = None  # why the server is asked no more
        self._thread.start()

    async def first(self) -> First:
        """Wait for the map from 0 on."""
        await self._opened.wait()
        return self._first

    def ask(self, start: int, stop: int, most: int, arrived: Callable[[Told], None]) -> None:
        """Ask for [start, stop); *arrived* gets a map of its own, of stop - start bytes, in the trio thread."""
        self._queue.append(_Question(start, stop, most, arrived))
        self._ring()

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._first = self._begin()
        except (BackupfsError, NbdError) as error:
            self._first = First(None, Told(uniform(0), 0, str(error)), is_final=True)
        except Exception as error:
            log.exception("%s: unexpected, in the map's thread", self.address.export)
            self._first = First(None, Told(uniform(0), 0, f"unexpected: {error!r}"), is_final=True)
        if self._first.is_final:
            self._hang_up()
        self._tell(self._opened.set)
        while not (self._closing or self._first.is_final):
            if self._queue:
                question = self._queue.popleft()
                self._tell(functools.partial(question.arrived, self._answer(question)))
            else:
                self._wait()
        self._hang_up()
        for question in self._queue:
            nothing = Told(uniform(question.stop - question.start), 0, "closed")
            self._tell(functools.partial(question.arrived, nothing))

    def _wait(self) -> None:
        """Wait for a ring, or for the server to hang up."""
        for fd, _ in self._poller.poll():
            if fd == self._wake:
                self._hush()
            else:
                self._hang_up()  # nothing was asked, so whatever comes is the end

    def _begin(self) -> First:
        handle = self._dial()
        size = handle.get_size()
        if not handle.can_meta_context(CONTEXT):
            return First(size, Told(uniform(size), 0, "the NBD server does not tell allocation"), is_final=True)
        told = self._walk(0, size, self._most, MAP_SECONDS)
        # A server that does not tell the first of it will not tell the rest.
        return First(size, told, is_final=told.stop in (0, size) or self._lie is not None)

    def _answer(self, question: _Question) -> Told:
        size = question.stop - question.start
        if self._lie is not None:
            return Told(uniform(size), 0, self._lie)
        try:
            return self._walk(question.start, question.stop, question.most, WINDOW_SECONDS)
        except Exception as error:
            log.exception("%s: unexpected, in the map's thread", self.address.export)
            return Told(uniform(size), 0, f"unexpected: {error!r}")

    def _walk(self, start: int, stop: int, most: int, seconds: float) -> Told:
        """Walk through [start, stop) in so many seconds; what went wrong stands in the answer."""
        deadline = time.monotonic() + seconds

        def ask(offset: int, length: int) -> list[Answer]:
            answers = self._put(start + offset, length, max(0.0, deadline - time.monotonic()))
            return [Answer(one.context, one.offset - start, one.entries) for one in answers]

        try:
            return walk(stop - start, ask, most=most, may_go_on=lambda: time.monotonic() < deadline)
        except Unbelievable as error:
            self._lie = str(NbdProtocolError(self.address.export, str(error)))
            self._hang_up()
            return Told(uniform(stop - start), 0, self._lie)
