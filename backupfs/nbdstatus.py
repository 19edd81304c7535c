# SPDX-License-Identifier: GPL-3.0-or-later
"""A connection that asks an NBD server for block status in one context, and does nothing else.

StatusWire ──┬── nbdmap.MapConnection          base:allocation: what is zero, where it is needed
└── nbdbitmap.BitmapConnection    qemu:dirty-bitmap:…: what changed, all of it, once
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import trio

from backupfs.allocation import Answer
from backupfs.errors import BackupfsError, NbdUnavailable
from backupfs.nbdclient import Address, Handle, NbdError, Wire


class StatusWire(Wire):
    """What such connections have in common; its thread is started by whoever inherits."""

    def __init__(self, address: Address, context: str, timeout: float) -> None:
        super().__init__(address, timeout, None)
        self.context = context
        self._handle: Handle | None = None

    def _tell(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(call)

    def _put(self, offset: int, length: int, seconds: float) -> list[Answer]:
        """Put one question; raise BackupfsError, and then the connection is gone if it was at fault."""
        answers: list[Answer] = []

        def collect(context: str, start: int, entries: list[int], _error: Any) -> int:
            if len(answers) < 2:  # one is right, two are a lie; no more are kept
                answers.append(Answer(context, start, entries))
            return 0

        handle = self._handle or self._dial()
        try:
            cookie = handle.aio_block_status(length, offset, collect)
            self._drive(handle, lambda: len(answers) > 1 or handle.aio_command_completed(cookie), "mapping", seconds)
        except NbdError as error:
            if handle.aio_is_dead() or handle.aio_is_closed():
                self._hang_up()
            raise NbdUnavailable(self.address.export, str(error)) from None
        except BackupfsError:
            self._hang_up()  # the answer may come yet, and would be in the way
            raise
        return answers

    def _dial(self) -> Handle:
        try:
            handle = self._connect(self.context)
            self._check(handle)
        except NbdError as error:
            raise self._unavailable(str(error)) from None
        self._handle = handle
        return handle

    def _hang_up(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(NbdError):
                handle.aio_disconnect(0)
        self._unwatch()
