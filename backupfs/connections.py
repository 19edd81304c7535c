# SPDX-License-Identifier: GPL-3.0-or-later
"""All connections to one export, made again when they break.

    ask ──► Fetch ──► connection 0 ══╗
       in   Fetch ──► connection 1 ══╬══ the server
      turn                           ║
    arrive ◄── done, or the connection broke:
               allow_reconnect? ──yes──► replace the broken ones, ask again
                                └─no───► the error that broke it

A server that stopped answering is not asked again for the same bytes: that reader has waited for
long enough. The next reader's first act is to replace the connection. Readers who wait for one
attempt to reconnect share its outcome, so ten of them wait no longer than one.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Awaitable, Callable

import trio

from backupfs.allocation import MOST_EXTENTS
from backupfs.diskmap import DiskMap
from backupfs.errors import BackupfsError, NbdTimeout, NbdUnavailable
from backupfs.extents import uniform
from backupfs.nbdclient import Address, Connection
from backupfs.nbdmap import MapConnection
from backupfs.request import Request

log = logging.getLogger("backupfs.connections")


class Fetch:
    """Bytes on their way into a buffer, over one connection or, if that breaks, the next.

    The buffer must be left alone until `is_done`, also by those who stopped waiting.
    """

    __slots__ = ("attempts", "request")

    def __init__(self, request: Request) -> None:
        self.request = request
        self.attempts = 1

    @property
    def is_done(self) -> bool:
        """Whether no connection has the buffer any more."""
        return self.request.done

    @property
    def has_failed(self) -> bool:
        """Whether the bytes have not come, and will not unless somebody who waits asks again."""
        return self.request.done and self.request.error is not None


class Connections:
    """Up to *count* connections to one export; opened with `open`, the others as they are needed."""

    def __init__(
        self,
        address: Address,
        count: int,
        timeout: float,
        allow_reconnect: Callable[[], Awaitable[bool]],
        most_extents: int = MOST_EXTENTS,
    ) -> None:
        self.address = address
        self.size = 0
        self.alignment = 1
        self.extents = DiskMap(uniform(0))
        self.reconnects = 0
        self._timeout = timeout
        self._most_extents = most_extents
        self._allow_reconnect = allow_reconnect
        self._connections: list[Connection | None] = [None] * count
        self._map: MapConnection | None = None
        self._next = 0
        self._gone: list[tuple[int, int]] = []  # requests and bytes of connections that broke
        self._mending = trio.Lock()
        self._fresh: Connection | None = None  # being made by `mend`
        self._failures = 0  # of mending
        self._last_failure: BackupfsError | None = None
        self._closed = False

    @property
    def traffic(self) -> list[tuple[int, int]]:
        """Requests answered and bytes brought, by connection; broken ones first."""
        return self._gone + [(c.requests, c.bytes) for c in self._connections if c is not None]

    async def open(self) -> None:
        """Make the first connection and fetch the map; raise NbdUnavailable, NbdTimeout, NbdProtocolError."""
        asking = self._map = MapConnection(self.address, timeout=self._timeout, most=self._most_extents)
        reading = self._connections[0] = Connection(self.address, timeout=self._timeout)
        await reading.opened()
        assert reading.size is not None  # opened
        self.size = reading.size
        self.alignment = reading.alignment
        first = await asking.first()
        if first.told.extents.size != self.size:
            self.extents = DiskMap(uniform(self.size), why=first.told.why)
        elif first.is_final:
            self.extents = DiskMap(first.told.extents, why=first.told.why)
        else:
            log.info(
                "%s: mapped up to byte %d (%s); the rest when needed",
                self.address.export,
                first.told.stop,
                first.told.why,
            )
            self.extents = DiskMap(first.told.extents, first.told.stop, asking.ask)

    async def close(self) -> None:
        """Disconnect all; what is unanswered fails."""
        self._closed = True
        for connection in (self._map, *self._connections, self._fresh):
            if connection is not None:
                await connection.close()

    # --- fetching ----------------------------------------------------------------------------

    def ask(self, offset: int, length: int, buffer: bytearray | memoryview) -> Fetch:
        """Begin to fetch *length* bytes into *buffer*."""
        return Fetch(self._submit(offset, length, buffer))

    async def arrive(self, fetch: Fetch) -> None:
        """Wait for the bytes; several may. Raise NbdUnavailable, NbdTimeout, NbdReadFailed."""
        while True:
            request = fetch.request
            try:
                await request.wait()
            except NbdTimeout:
                raise
            except NbdUnavailable:
                if fetch.request is request:
                    # Each connection can break once under it, before all are new.
                    if fetch.attempts > len(self._connections):
                        raise
                    await self.mend()
                # Unless another reader has, meanwhile: a buffer is never filled twice at a time.
                if fetch.request is request:
                    fetch.attempts += 1
                    fetch.request = self._submit(request.offset, request.length, request.buffer)
            else:
                return

    def _submit(self, offset: int, length: int, buffer: bytearray | memoryview) -> Request:
        request = Request(offset, length, buffer)
        connection = self._choose()
        if connection is None:
            request.fail(NbdUnavailable(self.address.export, "closed" if self._closed else "all connections broke"))
        else:
            connection.submit(request)
        return request

    def _choose(self) -> Connection | None:
        """Return the next connection in turn that is not broken, making it if need be."""
        for _ in self._connections:
            self._next = (self._next + 1) % len(self._connections)
            connection = self._connections[self._next]
            if connection is None and not self._closed:
                connection = Connection(self.address, timeout=self._timeout, size=self.size)
                self._connections[self._next] = connection
            if connection is not None and connection.error is None:
                return connection
        return None

    # --- mending -----------------------------------------------------------------------------

    @property
    def is_broken(self) -> bool:
        """Whether a connection broke that has not been replaced."""
        return any(connection is not None and connection.error is not None for connection in self._connections)

    async def mend(self) -> None:
        """Replace the connections that broke; raise what broke them if that may not be."""
        failures = self._failures
        async with self._mending:
            if self._failures != failures and self._last_failure is not None:
                raise dataclasses.replace(self._last_failure)  # of the attempt that we waited for
            broken = [c for c in self._connections if c is not None and c.error is not None]
            if broken and not self._closed:
                try:
                    await self._replace(broken)
                except BackupfsError as error:
                    self._failures += 1
                    self._last_failure = dataclasses.replace(error)
                    raise

    async def _replace(self, broken: list[Connection]) -> None:
        why = broken[0].error
        assert why is not None  # selected so
        if not await self._allow_reconnect():
            raise dataclasses.replace(why)
        if self._closed:
            raise NbdUnavailable(self.address.export, "closed")
        log.info("%s: the NBD connection broke (%s); making it again", self.address.export, why)
        fresh = self._fresh = Connection(self.address, timeout=self._timeout, size=self.size)
        try:
            await fresh.opened()
        except BaseException:
            await fresh.close()
            raise
        finally:
            self._fresh = None
        # One that is known to work is enough; the others are made when they are needed.
        for connection in broken:
            place = self._connections.index(connection)
            self._connections[place] = fresh if connection is broken[0] else None
            self._gone.append((connection.requests, connection.bytes))
            self.reconnects += 1
        for connection in broken:
            await connection.close()
