# SPDX-License-Identifier: GPL-3.0-or-later
"""One read on its way to a server and back, and how long it may take.

trio thread      Request ·········· wait ─────────────► buffer
                    │                ▲
connection's        ▼                │ run_sync_soon, only if somebody waits
thread           aio_pread ·····► finish
"""

from __future__ import annotations

import contextlib
import dataclasses

import trio

from backupfs.errors import BackupfsError


class Request:
    """One read, filling *buffer*; got from and waited for in the trio thread."""

    __slots__ = ("_event", "_waiting", "buffer", "done", "error", "length", "offset")

    def __init__(self, offset: int, length: int, buffer: bytearray | memoryview) -> None:
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.done = False
        self.error: BackupfsError | None = None
        self._waiting = False
        self._event: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until the buffer is full; raise what went wrong. May be waited for by several."""
        if not self.done:
            if self._event is None:
                self._event = trio.Event()
            # In this order, and the thread does it the other way round: no wake-up is lost.
            self._waiting = True
            if not self.done:
                await self._event.wait()
        if self.error is not None:
            raise dataclasses.replace(self.error)  # one that is raised twice would keep all frames

    def fail(self, error: BackupfsError) -> None:
        """Mark it done without a connection; called in the trio thread, before anybody waits."""
        self.error = error
        self.done = True

    def finish(self, token: trio.lowlevel.TrioToken, error: BackupfsError | None) -> None:
        """Mark it done; called by the connection's thread."""
        self.error = error
        self.done = True
        if self._waiting and self._event is not None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._event.set)


class Patience:
    """How long the server may leave us without an answer.

    Only time that was spent in waiting counts, and no more of it than was asked for: a process
    that was stopped for an hour itself finds the answer in its socket.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._spent = 0.0
        self._heard = True

    def renew(self) -> None:
        self._spent = 0.0

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self._spent)

    def spend(self, seconds: float, heard: bool) -> None:
        self._spent += min(seconds, self.seconds)
        self._heard = heard

    @property
    def is_over(self) -> bool:
        """Whether it was silent for too long, or went on for twice as long without coming to an end."""
        return self._spent >= self.seconds and (not self._heard or self._spent >= 2 * self.seconds)
