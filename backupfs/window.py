# SPDX-License-Identifier: GPL-3.0-or-later
"""What is kept in flight ahead of each sequential reader.

    a stream's blocks, 1 MiB each      |  n-1  |   n   |  n+1  |  n+2  |  n+3  |  n+4  |
                                        behind   read    ·····asked for ahead·····

State is kept per stream, not per file: several readers of one file, and one that jumps about,
each have their own. A read that adjoins no other fetches its own bytes and no more; a stream
begins with the second of two that adjoin, once they make up SURE bytes. Its window grows by a
block a read, steps over what is zero, which nobody asks for, and ends with the disk.

It grows to NEAR blocks, and to FAR where the reader has to wait for longer than LATE all the
same: a server in the same machine is fastest while the blocks fit into the processor's cache
(2 instead of 4 gave a tenth to a quarter more, for a fifth less CPU), one behind a network or a
slow disk needs more on their way.

Blocks live in buffers that all exports share, taken last in, first out: what was used last is
still in the processor's cache. There are POOL of them, whatever the number of disks, readers and
connections. A reader who waits for a block always gets a buffer, if need be one of a stream that
was not used for longest; a block ahead only gets one that nobody else makes use of.

Law: a buffer is filled again only when its block is in no window, no reader waits for it, and no
connection has it.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import OrderedDict
from typing import Final, Protocol

import trio

from backupfs.connections import Fetch
from backupfs.extents import ZERO, Extents
from backupfs.rate import Bucket, Flow

Buffer = bytes | bytearray | memoryview

BLOCK: Final = 2**20
NEAR: Final = 2  # blocks ahead
FAR: Final = 4
LATE: Final = 0.002  # seconds; a block from a page cache takes a quarter of it
BEHIND: Final = 1  # blocks: of two requests in flight the second may come first
SLACK: Final = 2 * BLOCK  # ... by so much
SURE: Final = 2**16  # bytes
STREAMS: Final = 16  # remembered per export; most are one read long
POOL: Final = 40  # blocks
IDLE: Final = 1.0  # seconds after which a stream's blocks may serve another's window


class Source(Protocol):
    """Where blocks come from: `connections.Connections`."""

    size: int
    alignment: int

    @property
    def extents(self) -> Extents: ...

    def ask(self, offset: int, length: int, buffer: bytearray | memoryview) -> Fetch: ...

    async def arrive(self, fetch: Fetch) -> None: ...


class _Block:
    """Bytes [start, stop) of the disk, at the beginning of a buffer; all else of its 1 MiB is zero."""

    __slots__ = ("data", "fetch", "readers", "start", "stop")

    def __init__(self, start: int, stop: int, data: memoryview, fetch: Fetch) -> None:
        self.start = start
        self.stop = stop
        self.data = data
        self.fetch = fetch
        self.readers = 0  # who wait for it

    @property
    def is_free(self) -> bool:
        return not self.readers and self.fetch.is_done


class _Stream:
    """A reader who goes forward."""

    __slots__ = ("ahead", "blocks", "depth", "flow", "paying", "position", "run", "used")

    def __init__(self) -> None:
        self.position = 0  # where he is expected next
        self.run = 0  # bytes that he has read, one after the other
        self.ahead = 0  # blocks; 0: no window yet
        self.depth: float = NEAR  # what `ahead` grows to
        self.blocks: dict[int, _Block] = {}
        self.used = 0.0
        self.flow = Flow()
        self.paying = trio.Lock()  # two of its reads may want the same block

    def adapt(self, waited: float) -> None:
        """Look farther ahead for a reader who has waited long, and less far again for one who does not."""
        self.depth = min(FAR, self.depth + 1) if waited > LATE else max(NEAR, self.depth - 1 / 32)

    def take_free(self) -> memoryview | None:
        """Give up the buffer of one block that nobody uses."""
        for number, block in self.blocks.items():
            if block.is_free:
                del self.blocks[number]
                return block.data
        return None


class Pool:
    """The process's buffers. *most* bounds them, but for readers who would wait without one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.made = 0
        self._arena: mmap.mmap | None = None
        self._cut = 0  # buffers of it that were handed out, ever
        self._free: list[memoryview] = []
        self._left: list[_Block] = []  # in no window any more, but still with a connection or a reader
        self._streams: OrderedDict[_Stream, None] = OrderedDict()  # with a window; longest unused first

    def touch(self, stream: _Stream) -> None:
        """Note that the stream is being read."""
        stream.used = trio.current_time()
        self._streams[stream] = None
        self._streams.move_to_end(stream)

    def forget(self, stream: _Stream) -> None:
        """Take the stream's buffers back."""
        self._streams.pop(stream, None)
        for block in stream.blocks.values():
            self.leave(block)
        stream.blocks.clear()

    def leave(self, block: _Block) -> None:
        """Take the buffer of a block that is in no window any more."""
        if block.is_free:
            self.give(block.data)
        else:
            self._left.append(block)

    def collect(self) -> None:
        """Take back what connections and readers have let go of: none of them says so."""
        left, self._left = self._left, []
        for block in left:
            self.leave(block)

    def take(self) -> memoryview:
        """Return a buffer for a reader who waits."""
        return self._spare() or self._steal(float("inf")) or self._make()

    def take_ahead(self) -> memoryview | None:
        """Return a buffer for a block ahead, if one can be had at nobody's cost."""
        return self._spare() or self._steal(trio.current_time() - IDLE)

    def _spare(self) -> memoryview | None:
        if not self._free:
            self.collect()
        if self._free:
            return self._free.pop()
        return self._make() if self.made < self.most else None

    def _steal(self, unused_since: float) -> memoryview | None:
        for stream in self._streams:
            if stream.used > unused_since:
                return None
            if (data := stream.take_free()) is not None:
                return data
        return None

    def _make(self) -> memoryview:
        self.made += 1
        if self._cut == self.most:
            return memoryview(bytearray(BLOCK))
        if self._arena is None:
            self._arena = _open_arena(self.most * BLOCK)
        start = self._cut * BLOCK
        self._cut += 1
        return memoryview(self._arena)[start : start + BLOCK]

    def give(self, data: memoryview) -> None:
        """Take back a buffer that was used for nothing."""
        if self.made > self.most and data.obj is not self._arena:
            self.made -= 1
        else:
            self._free.append(data)


def _open_arena(size: int) -> mmap.mmap:
    """Return memory in huge pages where there are any: the kernel pins each page of an answer."""
    arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without: a tenth slower
        arena.madvise(mmap.MADV_HUGEPAGE)
    return arena


POOL_OF_ALL: Final = Pool(POOL)
_joined: Final = bytearray(BLOCK)  # a read that straddles blocks; see `Windows.read` for who owns it


class Windows:
    """The streams of one export."""

    def __init__(self, source: Source, pool: Pool = POOL_OF_ALL, bucket: Bucket | None = None) -> None:
        self._source = source
        self._pool = pool
        self._bucket = bucket
        self._closed = False
        self._streams: OrderedDict[_Stream, None] = OrderedDict()

    def close(self) -> None:
        """Give all buffers back. The connections are closed."""
        self._closed = True
        for stream in self._streams:
            self._pool.forget(stream)
        self._streams.clear()
        self._pool.collect()

    # --- which stream ------------------------------------------------------------------------

    def follow(self, offset: int, length: int) -> _Stream | None:
        """Note a read; return its stream if it has a window, None if it is to be fetched alone."""
        end = offset + length
        stream = self._find(offset)
        if stream is None:
            stream = _Stream()
            if len(self._streams) >= STREAMS:
                self._pool.forget(self._streams.popitem(last=False)[0])
        self._streams[stream] = None
        self._streams.move_to_end(stream)
        stream.run += length
        # Whoever reads on does so behind the zeros, which are made up and never asked for here.
        stream.position = max(stream.position, self._next_data(end))
        if stream.run > length and stream.run >= SURE:
            stream.ahead = min(int(stream.depth), stream.ahead + 1)
        return stream if stream.ahead else None

    def _find(self, offset: int) -> _Stream | None:
        """Find the stream that expects a read at *offset*, else the nearest one that is close before it."""
        number = offset // BLOCK
        found, nearest = None, 0
        for stream in self._streams:
            distance = offset - stream.position
            if distance == 0:
                return stream
            if (
                stream.ahead
                and (0 < distance <= SLACK or number in stream.blocks)
                and (found is None or abs(distance) < nearest)
            ):
                found, nearest = stream, abs(distance)
        return found

    # --- reading -----------------------------------------------------------------------------

    async def read(self, stream: _Stream, offset: int, length: int) -> Buffer:
        """Return the bytes through the stream's window.

        The buffer stays as it is until the caller's task next awaits, not longer.
        """
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        self._pool.touch(stream)
        self._leave_behind(stream, first - BEHIND)
        blocks: list[_Block] = []
        try:
            for number in range(first, last + 1):
                if self._bucket is not None:
                    await self._pay(self._bucket, stream, number)
                if (block := self._block(stream, number)) is not None:
                    block.readers += 1
                    blocks.append(block)
            self._ask_ahead(stream, last)
            begun = trio.current_time()
            for block in blocks:
                await self._source.arrive(block.fetch)
            stream.adapt(trio.current_time() - begun)
        finally:
            for block in blocks:
                block.readers -= 1
            if self._closed:
                self._pool.forget(stream)  # it came while this reader was paying
        return _join(blocks, offset, length)

    async def _pay(self, bucket: Bucket, stream: _Stream, number: int) -> None:
        """Wait until a block may be asked for, if it must be; then ask before the next await."""
        if self._due(stream, number):
            async with stream.paying:
                if due := self._due(stream, number):
                    await bucket.take(stream.flow, due)
                    # It may have been forgotten meanwhile, and will have a block now.
                    self._streams[stream] = None
                    self._pool.touch(stream)

    def _due(self, stream: _Stream, number: int) -> int:
        """Return how many bytes must be fetched for a block."""
        block = stream.blocks.get(number)
        if block is not None and not block.fetch.has_failed:
            return 0
        if self._next_data(number * BLOCK) >= min((number + 1) * BLOCK, self._source.size):
            return 0
        start, stop = self._trim(number)
        return stop - start

    def _leave_behind(self, stream: _Stream, below: int) -> None:
        for number in [number for number in stream.blocks if number < below]:
            if not stream.blocks[number].readers:
                self._pool.leave(stream.blocks.pop(number))

    def _ask_ahead(self, stream: _Stream, number: int) -> None:
        for _ in range(stream.ahead):
            offset = self._next_data((number + 1) * BLOCK)
            if offset >= self._source.size:
                return
            number = offset // BLOCK
            if number not in stream.blocks:
                data = self._pool.take_ahead()
                if data is None:
                    return
                if self._bucket is not None and not self._bucket.take_ahead(stream.flow, self._due(stream, number)):
                    self._pool.give(data)
                    return
                self._ask(stream, number, data)

    def _block(self, stream: _Stream, number: int) -> _Block | None:
        """Return a block of the window, asking for it if it is not there; None: it is all zero."""
        block = stream.blocks.get(number)
        if block is not None and block.fetch.has_failed:
            # Ahead, or for a reader who has been told; this one has not.
            self._pool.leave(stream.blocks.pop(number))
            block = None
        if block is None and self._next_data(number * BLOCK) < min((number + 1) * BLOCK, self._source.size):
            block = self._ask(stream, number, self._pool.take())
        return block

    def _ask(self, stream: _Stream, number: int, data: memoryview) -> _Block:
        start, stop = self._trim(number)
        fetch = self._source.ask(start, stop - start, data[: stop - start])
        block = stream.blocks[number] = _Block(start, stop, data, fetch)
        return block

    def _trim(self, number: int) -> tuple[int, int]:
        """Return the part of a block that is not zero, from its first such byte to its last."""
        end = min((number + 1) * BLOCK, self._source.size)
        start = stop = self._next_data(number * BLOCK)
        for _begin, upto, flags in self._source.extents.iter_range(start, end):
            if not flags & ZERO:
                stop = upto
        return align(start, stop, self._source.alignment, self._source.size)

    def _next_data(self, offset: int) -> int:
        """Return the first byte from *offset* on that is not zero, or the disk's size."""
        if offset >= self._source.size:
            return self._source.size
        found = self._source.extents.find(offset, ZERO, wanted=False)
        return self._source.size if found is None else found


def align(start: int, stop: int, alignment: int, size: int) -> tuple[int, int]:
    """Return the smallest aligned stretch that holds [start, stop); it ends with the disk at the latest."""
    return start - start % alignment, min(size, stop + -stop % alignment)


def _join(blocks: list[_Block], offset: int, length: int) -> Buffer:
    """Return the bytes from *offset* on; where there is no block they are zero.

    blocks       [ data ]  [data ]
    wanted    |----------------|
    """
    end = offset + length
    if len(blocks) == 1 and blocks[0].start <= offset and end <= blocks[0].stop:
        start = offset - blocks[0].start
        return blocks[0].data[start : start + length]
    # Joining bytes halved the speed; one buffer that is filled again did not.
    target = memoryview(_joined if length <= BLOCK else bytearray(length))[:length]
    position = offset
    for block in blocks:
        start, stop = max(block.start, position), min(block.stop, end)
        if start < stop:
            target[position - offset : start - offset] = bytes(start - position)
            target[start - offset : stop - offset] = block.data[start - block.start : stop - block.start]
            position = stop
    target[position - offset :] = bytes(end - position)
    return target
