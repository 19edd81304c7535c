# SPDX-License-Identifier: GPL-3.0-or-later
"""One disk of a backup job, read over NBD, with a window ahead of each sequential reader.

    a stream's blocks, 1 MiB each      |  n-1  |   n   |  n+1  |  n+2  |  n+3  |  n+4  |
                                        behind   read    ·····queued ahead·····

State is kept per stream, not per file: several readers of one file, and one that jumps about,
each have their own. A stream begins at the second of two reads that adjoin; a read that adjoins
nothing fetches its own bytes and no more. The window grows by a block a read up to AHEAD, and
steps over zeros, which nobody asks for.

Blocks come from a pool that all exports share, last out first in: what was used last is still
in the processor's cache. Where the time goes: at 1 MiB a block two thirds of it are copying,
kernel to buffer and buffer to kernel; bigger blocks leave the cache and are slower.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

import trio

from backupfs.errors import NbdTimeout, NbdUnavailable
from backupfs.extents import ZERO, ExtentMap, uniform
from backupfs.image import Image, Literal, Span, Zeros
from backupfs.nbdclient import Address, Connection, Request

log = logging.getLogger("backupfs.export")

Buffer = bytes | bytearray | memoryview

BLOCK: Final = 2**20
AHEAD: Final = 4
BEHIND: Final = 1
STREAMS: Final = 16  # remembered per export; most are one read long
POOL: Final = 40  # blocks kept by the process: what bounds its memory
SLACK: Final = 2 * BLOCK  # the kernel's two requests in flight may come in either order

_zeros: Final = memoryview(bytes(BLOCK))
_assembly = bytearray(BLOCK)


class Pool:
    """Blocks to fill again; a stack."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.out = 0
        self._free: list[bytearray] = []

    @property
    def has_room(self) -> bool:
        """Whether a block can be had without going over the bound."""
        return self.out < self.most

    def take(self) -> bytearray:
        """Return a block, beyond the bound too: a reader who waits is not refused."""
        self.out += 1
        return self._free.pop() if self._free else bytearray(BLOCK)

    def give(self, block: bytearray) -> None:
        """Take a block back."""
        self.out -= 1
        if len(self._free) + self.out < self.most:
            self._free.append(block)


_pool = Pool(POOL)


class _Block:
    """One block of a stream's window, and the request that fills it."""

    __slots__ = ("data", "request", "users")

    def __init__(self, request: Request, data: bytearray) -> None:
        self.request = request
        self.data = data
        self.users = 0


class _Stream:
    """A reader who goes forward."""

    __slots__ = ("ahead", "blocks", "position")

    def __init__(self, position: int) -> None:
        self.position = position  # where he is expected next
        self.ahead = 0  # 0: seen once, no window yet
        self.blocks: dict[int, _Block] = {}


class Export:
    """One disk over NBD. Got with `open_export`.

    `size` and `bytes_read` are bytes; `extents` says what is zero, `why_no_extents` why it says
    less than it might.
    """

    def __init__(
        self,
        address: Address,
        connections: int,
        timeout: float,
        allow_reconnect: Callable[[], Awaitable[bool]],
    ) -> None:
        self.address = address
        self.size = 0
        self.extents: ExtentMap = uniform(0)
        self.why_no_extents: str | None = None
        self.reconnects = 0
        self._timeout = timeout
        self._allow_reconnect = allow_reconnect
        self._connections: list[Connection | None] = [None] * connections
        self._next = 0
        self._gone: list[tuple[int, int]] = []  # requests and bytes of connections that broke
        self._reconnecting = trio.Lock()
        self._streams: OrderedDict[int, _Stream] = OrderedDict()
        self._orphans: list[_Block] = []
        self._closed = False

    # --- figures -----------------------------------------------------------------------------

    @property
    def traffic(self) -> list[tuple[int, int]]:
        """Requests answered and bytes brought, by connection; broken ones first."""
        return self._gone + [(c.requests, c.bytes) for c in self._connections if c is not None]

    @property
    def bytes_read(self) -> int:
        """Bytes brought over NBD so far."""
        return sum(count for _, count in self.traffic)

    @property
    def requests(self) -> int:
        """Read requests answered so far."""
        return sum(count for count, _ in self.traffic)

    # --- reading -----------------------------------------------------------------------------

    async def read(self, offset: int, length: int) -> Buffer:
        """Return exactly *length* bytes from *offset*, which must lie in the export.

        The buffer stays as it is until the caller's task next awaits, not longer. Raises
        NbdUnavailable, NbdTimeout, NbdReadFailed.
        """
        if length <= 0 or offset < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not in [0, {self.size})")
        if self._is_broken:
            await self._heal()
        stream = self._stream(offset, length)
        if not stream.ahead:
            data = bytearray(length)
            await self._fetch(Request(offset, length, data))
            return data
        return await self._read_window(stream, offset, length)

    def _stream(self, offset: int, length: int) -> _Stream:
        """Find or make the stream that the read belongs to, and move it on."""
        end = offset + length
        for stream in reversed(self._streams.values()):
            if stream.ahead and -SLACK <= offset - stream.position <= SLACK:
                break
            if not stream.ahead and offset == stream.position:
                break
        else:
            stream = _Stream(0)
            self._streams[id(stream)] = stream
            self._set_position(stream, end)
            if len(self._streams) > STREAMS:
                self._drop(self._streams.popitem(last=False)[1])
            return stream
        self._streams.move_to_end(id(stream))
        stream.ahead = min(AHEAD, stream.ahead + 1)
        self._set_position(stream, max(end, stream.position))
        return stream

    def _set_position(self, stream: _Stream, end: int) -> None:
        # Whoever reads on reads on behind the zeros: those never reach this module.
        stream.position = self._next_data(end)

    def _next_data(self, offset: int) -> int:
        found = self.extents.find(offset, ZERO, wanted=False) if offset < self.size else None
        return self.size if found is None else found

    async def _read_window(self, stream: _Stream, offset: int, length: int) -> Buffer:
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        self._recycle(stream, first - BEHIND)
        blocks = [self._block(stream, number) for number in range(first, last + 1)]
        self._queue_ahead(stream, last)
        for block in blocks:
            block.users += 1
        try:
            for number, block in zip(range(first, last + 1), blocks, strict=True):
                await self._wait_block(stream, number, block)
        finally:
            for block in blocks:
                block.users -= 1
        if first == last:
            start = offset % BLOCK
            return memoryview(blocks[0].data)[start : start + length]
        return self._assemble(blocks, offset, length)

    def _assemble(self, blocks: list[_Block], offset: int, length: int) -> Buffer:
        # Joining bytes halved the speed; one buffer that is filled again did not.
        target = memoryview(_assembly if length <= BLOCK else bytearray(length))
        done, start = 0, offset % BLOCK
        for block in blocks:
            part = min(BLOCK - start, length - done)
            target[done : done + part] = memoryview(block.data)[start : start + part]
            done, start = done + part, 0
        return target[:length]

    def _block(self, stream: _Stream, number: int) -> _Block:
        """Return the window's block *number*, and ask for it if it is not there."""
        block = stream.blocks.get(number)
        if block is None:
            self._reclaim()
            data = _pool.take()
            offset = number * BLOCK
            length = min(BLOCK, self.size - offset)
            block = _Block(Request(offset, length, memoryview(data)[:length]), data)
            stream.blocks[number] = block
            self._submit(block.request)
        return block

    def _queue_ahead(self, stream: _Stream, last: int) -> None:
        number = last
        for _ in range(stream.ahead):
            offset = self._next_data((number + 1) * BLOCK)
            if offset >= self.size:
                return
            number = offset // BLOCK
            if number not in stream.blocks:
                self._reclaim()
                if not _pool.has_room:
                    return
                self._block(stream, number)

    async def _wait_block(self, stream: _Stream, number: int, block: _Block) -> None:
        try:
            await block.request.wait()
        except NbdUnavailable as error:
            if isinstance(error, NbdTimeout):
                self._forget(stream, number, block)
                raise
            request = Request(block.request.offset, block.request.length, block.request.buffer)
            block.request = request
            try:
                await self._retry(request, error)
            except BaseException:
                self._forget(stream, number, block)
                raise
        except BaseException:
            if block.request.error is not None:
                self._forget(stream, number, block)
            raise

    def _forget(self, stream: _Stream, number: int, block: _Block) -> None:
        """Let the next read ask for the block again."""
        if stream.blocks.get(number) is block:
            del stream.blocks[number]
            self._orphans.append(block)

    # --- the blocks' way back ----------------------------------------------------------------

    def _recycle(self, stream: _Stream, below: int) -> None:
        """Give back the blocks behind the reader, and those that he has jumped away from."""
        for number in [n for n, block in stream.blocks.items() if n < below and not block.users]:
            self._orphans.append(stream.blocks.pop(number))

    def _drop(self, stream: _Stream) -> None:
        self._orphans.extend(stream.blocks.values())
        stream.blocks.clear()

    def _reclaim(self) -> None:
        """Return to the pool what nobody uses and libnbd has let go of."""
        if self._orphans:
            kept = []
            for block in self._orphans:
                if block.users or not block.request.done:
                    kept.append(block)
                else:
                    _pool.give(block.data)
            self._orphans = kept

    # --- connections -------------------------------------------------------------------------

    async def _fetch(self, request: Request) -> None:
        """Read past the window."""
        self._submit(request)
        try:
            await request.wait()
        except NbdTimeout:
            raise
        except NbdUnavailable as error:
            await self._retry(Request(request.offset, request.length, request.buffer), error)

    def _submit(self, request: Request) -> None:
        self._next = (self._next + 1) % len(self._connections)
        connection = self._connections[self._next]
        if connection is None and not self._closed:
            connection = self._connections[self._next] = Connection(self.address, timeout=self._timeout)
        if connection is None:
            raise NbdUnavailable(self.address.export, "closed")
        connection.submit(request)

    async def _retry(self, request: Request, error: NbdUnavailable) -> None:
        """Read once more over new connections, if the job that they led to is still the same."""
        if self._closed:
            raise error
        await self._heal()
        self._submit(request)
        await request.wait()

    @property
    def _is_broken(self) -> bool:
        return any(connection is not None and connection.error is not None for connection in self._connections)

    async def _heal(self) -> None:
        """Replace the connections that broke; raise what broke them if that may not be."""
        async with self._reconnecting:
            broken = [c for c in self._connections if c is not None and c.error is not None]
            if broken and not self._closed:
                if not await self._allow_reconnect():
                    assert broken[0].error is not None  # selected so
                    raise broken[0].error
                await self._replace(broken)

    async def _replace(self, broken: list[Connection]) -> None:
        log.info("%s: the NBD connection broke (%s); making it again", self.address.export, broken[0].error)
        for connection in broken:
            index = self._connections.index(connection)
            await connection.close()
            self._gone.append((connection.requests, connection.bytes))
            self._connections[index] = None
            self.reconnects += 1
        fresh = Connection(self.address, timeout=self._timeout)
        try:
            await fresh.opened()
        except BaseException:
            await fresh.close()
            raise
        if fresh.size != self.size:
            await fresh.close()
            raise NbdUnavailable(self.address.export, f"its size is {fresh.size} now, it was {self.size}")
        self._connections[self._connections.index(None)] = fresh

    async def _open(self) -> None:
        first = self._connections[0] = Connection(self.address, timeout=self._timeout, want_extents=True)
        await first.opened()
        assert first.extents is not None  # opened
        self.size = first.size
        self.extents = first.extents
        self.why_no_extents = first.why_no_extents

    async def _close(self) -> None:
        self._closed = True
        for connection in self._connections:
            if connection is not None:
                await connection.close()
        for stream in self._streams.values():
            self._drop(stream)
        self._reclaim()


@contextlib.asynccontextmanager
async def open_export(
    address: Address, *, connections: int, timeout: float, allow_reconnect: Callable[[], Awaitable[bool]]
) -> AsyncIterator[Export]:
    """Connect to an export and fetch its map; disconnect on the way out.

    *timeout* is how many seconds the server may leave a request unanswered. When a connection
    breaks, *allow_reconnect* is asked whether the same job still serves there; then reads in
    progress are put again and notice nothing. Raises NbdUnavailable, NbdTimeout.
    """
    export = Export(address, connections, timeout, allow_reconnect)
    try:
        await export._open()
        yield export
    finally:
        with trio.CancelScope(shield=True):
            await export._close()


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
            case Zeros(length=count) if count <= BLOCK:
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
