# SPDX-License-Identifier: GPL-3.0-or-later
"""Readers of all kinds at once, over a source that answers in any order, late or not at all."""

from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass, field

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from backupfs import qcow2
from backupfs.connections import Fetch
from backupfs.diskmap import DiskMap
from backupfs.errors import BackupfsError, NbdReadFailed
from backupfs.export import Export, resolve
from backupfs.extents import ZERO, Builder
from backupfs.image import Image, Literal, RawImage, Span, Zeros
from backupfs.nbdclient import Request
from backupfs.origin import Origin
from backupfs.window import BLOCK, Pool, Windows

_random = random.Random(11).randbytes(BLOCK + 4099) * 6
PIECE = 64 * 1024


@dataclass(eq=False)
class Source:
    """Answers when told to; complains when a buffer is handed to it that it still has."""

    extents: DiskMap
    alignment: int
    chance: random.Random
    is_broken: bool = False
    held: list[Request] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.extents.size

    def truth(self, start: int, stop: int) -> bytes:
        return b"".join(
            bytes(end - begin) if flags & ZERO else _random[begin % (BLOCK + 4099) :][: end - begin]
            for begin, end, flags in self.extents.iter_range(start, stop)
        )

    def ask(self, offset: int, length: int, buffer: bytearray | memoryview) -> Fetch:
        assert offset % self.alignment == 0
        assert (offset + length) % self.alignment == 0 or offset + length == self.size
        start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        for other in self.held:
            theirs = ctypes.addressof(ctypes.c_char.from_buffer(other.buffer))
            assert start + length <= theirs or theirs + other.length <= start, "two requests fill one buffer"
        request = Request(offset, length, buffer)
        self.held.append(request)
        return Fetch(request)

    async def arrive(self, fetch: Fetch) -> None:
        await fetch.request.wait()

    def answer(self, token: trio.lowlevel.TrioToken) -> None:
        for _ in range(self.chance.randrange(4)):
            if self.held:
                request = self.held.pop(self.chance.randrange(len(self.held)))
                if self.chance.randrange(10):
                    request.buffer[: request.length] = self.truth(request.offset, request.offset + request.length)
                    request.finish(token, None)
                else:
                    request.buffer[: request.length] = bytes([0xEE]) * request.length
                    request.finish(token, NbdReadFailed("vda", request.offset, request.length, "EIO"))


def truth(image: Image[Export], source: Source, start: int, stop: int) -> bytes:
    parts = []
    for segment in image.segments(start, stop):
        match segment:
            case Literal(data=data):
                parts.append(data)
            case Zeros(length=length):
                parts.append(bytes(length))
            case Span(offset=offset, length=length):
                parts.append(source.truth(offset, offset + length))
    return b"".join(parts)


async def read_on(image: Image[Export], source: Source, chance: random.Random) -> None:
    """Read in order or not, give up at times; what comes must be right."""
    position = chance.randrange(image.size)
    step = chance.choice([1, 512, 4096, 100_000, 128 * 1024, BLOCK, BLOCK + 1])
    for _ in range(12):
        if chance.randrange(8) == 0:
            position = chance.randrange(image.size)
        with trio.move_on_after(chance.choice([0, 3, 1000])):
            try:
                got = await resolve(image, position, step)
            except BackupfsError:
                pass
            else:
                assert bytes(got) == truth(image, source, position, min(position + step, image.size))
        position = (position + step) % image.size
        await trio.lowlevel.checkpoint()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3 * BLOCK // PIECE), st.sampled_from([0, ZERO])), min_size=1, max_size=12),
    st.integers(0, 5000),
    st.sampled_from([1, 512, 4096]),
    st.integers(1, 12),
    st.integers(1, 6),
    st.integers(),
)
def test_readers_get_the_right_bytes_whatever_the_source_does(
    pieces: list[tuple[int, int]], tail: int, alignment: int, buffers: int, readers: int, seed: int
) -> None:
    chance = random.Random(seed)
    builder = Builder(sum(length for length, _ in pieces) * PIECE + tail)
    for length, flags in pieces:
        builder.append(length * PIECE, flags)
    source = Source(DiskMap(builder.finish(ZERO)), alignment, chance)
    pool = Pool(buffers)

    async def main() -> None:
        export = Export(source)  # type: ignore[arg-type]  # has what Export uses
        windows = export._windows = Windows(source, pool)
        raw = RawImage(export, source.extents)
        images = [raw, qcow2.whole(export, source.extents.first, Origin("web01", "1234", "vda", 1000))]
        assert truth(raw, source, 0, raw.size) == source.truth(0, raw.size)
        token = trio.lowlevel.current_trio_token()

        async def answer_always() -> None:
            while True:
                await trio.sleep(1)
                source.answer(token)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_always)
            async with trio.open_nursery() as inner:
                for _ in range(readers):
                    inner.start_soon(read_on, chance.choice(images), source, random.Random(chance.random()))
            nursery.cancel_scope.cancel()
        while source.held:
            source.answer(token)
        windows.close()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    # Everything that was made has come back.
    assert len(pool._free) == pool.made
