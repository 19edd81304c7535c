# SPDX-License-Identifier: GPL-3.0-or-later
"""One disk of a backup job, read over NBD.

    image ──segments──► resolve ──┬── literal: bytes in hand
                                  ├── zeros:   one buffer for all, no I/O
                                  └── span:    Export.read ──┬── window.Windows, for who reads on
                                                             └── just these bytes, for who jumps

Where the time goes, reading dense data from a page cache over a unix socket (perf, 0.6 s of CPU
per GiB): a third is answering the kernel (18 % the copy, 10 % pinning the buffer's pages), a
quarter receiving from the socket (16 % the copy), a quarter the interpreter, the rest is waking
up. A megabyte comes in six pieces, since the socket holds 200 KiB, and each is one turn of the
thread's loop. Bigger blocks leave the processor's cache and are slower; so is more than one copy.
A lone 4 KiB read is all waking up: to the connection's thread and back.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from backupfs.allocation import MOST_EXTENTS
from backupfs.connections import Connections
from backupfs.diskmap import DiskMap
from backupfs.errors import NbdReadFailed
from backupfs.extents import is_zero
from backupfs.image import Image, Literal, Span, Zeros
from backupfs.nbdclient import LONGEST, Address
from backupfs.rate import Bucket, Flow
from backupfs.window import Buffer, Windows, align

_zeros: Final = memoryview(bytes(LONGEST))


class Export:
    """One disk over NBD. Got with `open_export`."""

    def __init__(self, connections: Connections, bucket: Bucket | None = None) -> None:
        self._connections = connections
        self._windows = Windows(connections, bucket=bucket)
        self._bucket = bucket
        self._alone = Flow()  # of all who jump

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._connections.size

    @property
    def extents(self) -> DiskMap:
        """What is zero; the rest must be read."""
        return self._connections.extents

    @property
    def why_no_extents(self) -> str | None:
        """Why the map says less than it might, in words for the user."""
        return self._connections.extents.why

    @property
    def traffic(self) -> list[tuple[int, int]]:
        """Requests answered and bytes brought, by connection; broken ones first."""
        return self._connections.traffic

    @property
    def reconnects(self) -> int:
        """How many connections broke and were made again."""
        return self._connections.reconnects

    @property
    def bytes_read(self) -> int:
        """Bytes brought over NBD so far."""
        return sum(count for _, count in self.traffic)

    @property
    def requests(self) -> int:
        """Read requests answered so far."""
        return sum(count for count, _ in self.traffic)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return exactly *length* bytes from *offset*, which must lie in the export.

        The buffer stays as it is until the caller's task next awaits, not longer. Raises
        NbdUnavailable, NbdTimeout, NbdReadFailed.
        """
        if length <= 0 or offset < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not in [0, {self.size})")
        if self._connections.is_broken:
            await self._connections.mend()
        extents = self._connections.extents
        if not extents.knows(offset, offset + length):
            await extents.cover(offset, offset + length)
            if is_zero(extents, offset, offset + length):
                return _zeros[:length] if length <= len(_zeros) else bytes(length)
        stream = self._windows.follow(offset, length)
        if stream is not None:
            try:
                return await self._windows.read(stream, offset, length)
            except NbdReadFailed:
                pass  # perhaps for bytes of the block that nobody asked for
        return await self._read_alone(offset, length)

    async def _read_alone(self, offset: int, length: int) -> Buffer:
        connections = self._connections
        start, stop = align(offset, offset + length, connections.alignment, connections.size)
        # Not from the pool: a reader that is cancelled leaves its buffer to the connection.
        data = bytearray(stop - start)
        view = memoryview(data)
        fetches = []
        for position in range(0, len(data), LONGEST):
            part = view[position : position + LONGEST]
            if self._bucket is not None:
                await self._bucket.take(self._alone, len(part))
            fetches.append(connections.ask(start + position, len(part), part))
        for fetch in fetches:
            await connections.arrive(fetch)
        return view[offset - start : offset - start + length]


@contextlib.asynccontextmanager
async def open_export(
    address: Address,
    *,
    connections: int = 2,
    timeout: float = 30.0,
    allow_reconnect: Callable[[], Awaitable[bool]],
    bucket: Bucket | None = None,
    most_extents: int = MOST_EXTENTS,
) -> AsyncIterator[Export]:
    """Connect to an export and fetch its map; disconnect on the way out.

    *timeout* is how many seconds the server may leave a request unanswered. When a connection
    breaks, *allow_reconnect* is asked whether the same job still serves there; then reads in
    progress are put again and notice nothing. What is fetched is paid for from *bucket*;
    *most_extents* bounds the map that is fetched now. Raises NbdUnavailable, NbdTimeout,
    NbdProtocolError.
    """
    made = Connections(address, connections, timeout, allow_reconnect, most_extents)
    export = None
    try:
        await made.open()
        export = Export(made, bucket)
        yield export
    finally:
        with trio.CancelScope(shield=True):
            await made.close()
        if export is not None:
            export._windows.close()


async def resolve(image: Image[Export], offset: int, length: int) -> Buffer:
    """Return *length* bytes of *image* from *offset* on; fewer only at its end.

    The one place where segments become bytes. The buffer stays as it is until the caller's task
    next awaits.
    """
    stop = min(offset + length, image.size)
    if offset >= stop:
        return b""
    segments = list(image.segments(offset, stop))
    if len(segments) == 1:
        match segments[0]:
            case Zeros(length=count) if count <= len(_zeros):
                return _zeros[:count]
            case Span(source=export, offset=start, length=count):
                return await export.read(start, count)
            case Literal(data=data):
                return data
    answer = bytearray(stop - offset)
    position = 0
    for segment in segments:
        match segment:
            case Span(source=export, offset=start, length=count):
                # Copied before the next await, as `read` demands.
                answer[position : position + count] = await export.read(start, count)
            case Literal(data=data):
                answer[position : position + len(data)] = data
        position += segment.length
    return answer
