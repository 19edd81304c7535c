# SPDX-License-Identifier: GPL-3.0-or-later
"""A dirty bitmap, read over a connection of its own: all of it, or an error.

trio thread       read_bitmap ·····································► the map, or an error
its thread            connect ─► ask, from 0 to the disk's end ──run_sync_soon──┘
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

import trio

from backupfs.allocation import MOST_EXTENTS, Answer, Unbelievable
from backupfs.bitmap import PREFIX, Unfinished, walk_bitmap
from backupfs.errors import BackupfsError, NbdProtocolError, NbdUnavailable
from backupfs.extents import ExtentMap
from backupfs.nbdclient import Address, NbdError
from backupfs.nbdstatus import StatusWire

log = logging.getLogger("backupfs.nbdbitmap")

BITMAP_SECONDS: Final = 60.0  # two million extents take 2 s


class BitmapConnection(StatusWire):
    """Reads one bitmap of one disk. Close it in any case."""

    def __init__(self, address: Address, bitmap: str, *, timeout: float, most: int = MOST_EXTENTS) -> None:
        super().__init__(address, PREFIX + bitmap, timeout)
        self._most = most
        self._done = trio.Event()
        self._found: ExtentMap | BackupfsError = self._unavailable("its bitmap was not asked for")
        self._thread.start()

    async def read(self) -> ExtentMap:
        """Wait for the bitmap, DIRTY where it is set; raise NbdUnavailable, NbdTimeout, NbdProtocolError."""
        await self._done.wait()
        if isinstance(self._found, BackupfsError):
            raise self._found
        return self._found

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._found = self._walk()
        except BackupfsError as error:
            self._found = error
        except NbdError as error:
            self._found = self._unavailable(str(error))
        except Exception as error:
            log.exception("%s: unexpected, in the bitmap's thread", self.address.export)
            self._found = self._unavailable(f"unexpected: {error!r}")
        self._hang_up()
        self._tell(self._done.set)

    def _walk(self) -> ExtentMap:
        handle = self._dial()
        size = handle.get_size()
        if not handle.can_meta_context(self.context):
            raise NbdUnavailable(self.address.export, f"the server does not tell {self.context}")
        deadline = time.monotonic() + BITMAP_SECONDS

        def ask(offset: int, length: int) -> Sequence[Answer]:
            return self._put(offset, length, self.timeout)

        try:
            return walk_bitmap(
                size,
                self.context,
                ask,
                most=self._most,
                may_go_on=lambda: not self._closing and time.monotonic() < deadline,
            )
        except Unbelievable as error:
            raise NbdProtocolError(self.address.export, str(error)) from None
        except Unfinished as error:
            raise NbdUnavailable(self.address.export, str(error)) from None


async def read_bitmap(address: Address, bitmap: str, *, timeout: float, most: int = MOST_EXTENTS) -> ExtentMap:
    """Return the dirty *bitmap* of an export; raise NbdUnavailable, NbdTimeout, NbdProtocolError."""
    connection = BitmapConnection(address, bitmap, timeout=timeout, most=most)
    try:
        return await connection.read()
    finally:
        await connection.close()
