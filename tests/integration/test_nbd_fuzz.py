# SPDX-License-Identifier: GPL-3.0-or-later
"""NBD replies that no server gives: a clear error, no wrong byte, no hang, no growth.

reader ─ Export ─ libnbd ─ unix socket ─ Garbler ─ nbdkit pattern      damages what flows back
                                         Liar                          right bytes, wrong heads
"""

from __future__ import annotations

import contextlib
import errno
import random
import select
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from backupfs.errors import BackupfsError, NbdProtocolError, NbdReadFailed, NbdUnavailable
from backupfs.export import Export, open_export
from backupfs.nbdclient import Address

from ..faults import Fault
from .nbdservers import DONE, REQUEST, STRUCTURED, Chunk, Liar, extents

Faults = Callable[..., Fault]
MIB = 2**20
KIB = 2**10


async def allow() -> bool:
    return True


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="bfz", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@contextlib.asynccontextmanager
async def opened(address: Address, timeout: float = 1.0) -> AsyncIterator[Export]:
    async with open_export(address, connections=2, timeout=timeout, allow_reconnect=allow) as export:
        yield export


def resident() -> int:
    """Bytes that this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def content(offset: int, length: int) -> bytes:
    """What nbdkit's pattern plugin holds: each 8 bytes tell where they are."""
    start = offset // 8 * 8
    words = range(start, offset + length + 8, 8)
    return b"".join(struct.pack(">Q", word) for word in words)[offset - start :][:length]


# --- heads that are wrong, bytes that are right ------------------------------------------------------


@dataclass(eq=False)
class HeadLiar(Liar):
    """Answers reads with heads that *head* makes of (cookie, offset, length); the bytes are the pattern's."""

    head: Callable[[bytes, int, int], bytes] = lambda cookie, _offset, _length: (
        struct.pack(">II", 0x67446698, 0) + cookie
    )

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, struct.error), client:
            self._agree(client)
            while True:
                magic, _flags, command = struct.unpack(">IHH", self._take(client, 8))
                cookie = self._take(client, 8)
                offset, length = struct.unpack(">QI", self._take(client, 12))
                assert magic == REQUEST
                if command == 2:
                    return
                if command == 7:
                    for flags, kind, payload in self.status(offset, length):
                        client.sendall(
                            struct.pack(">IHH", STRUCTURED, flags, kind)
                            + cookie
                            + struct.pack(">I", len(payload))
                            + payload
                        )
                else:
                    client.sendall(self.head(cookie, offset, length) + content(offset, length))


def right(cookie: bytes) -> bytes:
    return struct.pack(">II", 0x67446698, 0) + cookie


HEADS: dict[str, Callable[[bytes, int, int], bytes]] = {
    "another request's cookie": lambda cookie, _o, _n: right(bytes(reversed(cookie))),
    "cookie of nothing": lambda _c, _o, _n: right(b"\xff" * 8),
    "another magic": lambda cookie, _o, _n: struct.pack(">II", 0x12345678, 0) + cookie,
    "an unknown error": lambda cookie, _o, _n: struct.pack(">II", 0x67446698, 0xFFFFFFFF) + cookie,
    "a structured reply that was not agreed": lambda cookie, offset, length: (
        struct.pack(">IHH", STRUCTURED, DONE, 1) + cookie + struct.pack(">IQ", length + 8, offset)
    ),
    "a structured reply of 4 GiB": lambda cookie, offset, _n: (
        struct.pack(">IHH", STRUCTURED, 0, 1) + cookie + struct.pack(">IQ", 2**32 - 1, offset)
    ),
}


@pytest.mark.parametrize("lie", HEADS)
async def test_a_reply_with_a_wrong_head_is_an_error_or_the_right_bytes(folder: Path, fault: Faults, lie: str) -> None:
    tried = fault(f"the NBD server answers a read with {lie}", "Hostile input")
    before, begun = resident(), time.monotonic()
    with HeadLiar(folder / "s", size=8 * MIB, status=lambda _o, length: extents(length, 0), head=HEADS[lie]) as liar:
        async with opened(liar.address) as export:
            for offset in (0, 3 * MIB, 64 * KIB, 5 * MIB + 7):
                try:
                    got = bytes(await export.read(offset, 4096))
                except BackupfsError as error:
                    tried.saw("reader", errno.errorcode[error.errno])
                else:
                    assert got == content(offset, 4096)
                    tried.saw("reader", "the instant's bytes")
    assert time.monotonic() - begun < 40
    assert resident() - before < 32 * MIB


# --- maps of all kinds -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_random_lies_about_the_map_cost_no_byte(folder: Path, seed: int) -> None:
    chance = random.Random(seed)

    def status(offset: int, length: int) -> list[Chunk]:
        entries: list[int] = []
        for _ in range(chance.randrange(6)):
            # Zero is what the server may say only of zeros; the disk has none, so it never does.
            entries += [chance.choice([0, 1, 512, 4096, length, 2**32 - 1]), chance.choice([0, 1, 4, 2**31])]
        kind = chance.choice([5, 5, 5, 1, 6, 0x8001, 0xFFFF])
        flags = chance.choice([DONE, DONE, DONE, 0])
        chunk = (flags, kind, struct.pack(f">I{len(entries)}I", chance.choice([1, 1, 1, 7]), *entries))
        return [chunk] * chance.choice([1, 1, 1, 2])

    begun = time.monotonic()
    with HeadLiar(folder / "s", size=8 * MIB, status=status) as liar:
        async with opened(liar.address) as export:
            assert export.size == 8 * MIB
            assert sum(stop - start for start, stop, _ in export.extents) == 8 * MIB
            for offset in range(0, 8 * MIB, MIB):
                assert bytes(await export.read(offset, 70_000)) == content(offset, 70_000)
    assert time.monotonic() - begun < 20


async def test_an_endless_map_is_bounded_in_memory(folder: Path, fault: Faults) -> None:
    tried = fault("the NBD server tells an endless map", "Hostile input")

    def status(_offset: int, _length: int) -> Iterator[Chunk]:
        while True:
            yield (0, 5, struct.pack(">I", 1) + struct.pack(">II", 512, 0) * 8000)

    before, begun = resident(), time.monotonic()
    with HeadLiar(folder / "s", size=2**40, status=status) as liar:  # type: ignore[arg-type]
        async with opened(liar.address) as export:
            tried.reads(lambda: content(0, 4096), bytes(await export.read(0, 4096)))
            assert export.why_no_extents is not None
    grown = resident() - before
    assert grown < 192 * MIB, grown
    assert time.monotonic() - begun < 30


SIZES = {2**63 - 1: "2^63 - 1", 2**63: "2^63", 2**64 - 1: "2^64 - 1"}


@pytest.mark.parametrize("size", SIZES)
async def test_a_size_that_cannot_be_is_an_error(folder: Path, fault: Faults, size: int) -> None:
    tried = fault(f"the NBD server tells a size of {SIZES[size]} bytes", "Hostile input")
    with Liar(folder / "s", size=size) as liar:
        with pytest.raises((NbdProtocolError, NbdUnavailable)) as caught:
            async with opened(liar.address):
                pass
    tried.saw("reader", errno.errorcode[caught.value.errno])


# --- damage on the wire ------------------------------------------------------------------------------


@dataclass(eq=False)
class Garbler:
    """Stands between a client and a server, and damages some of what the server says."""

    path: Path
    server: Path
    chance: random.Random
    rate: float
    damage: int = 0
    threads: list[threading.Thread] = field(default_factory=list)
    sockets: list[socket.socket] = field(default_factory=list)

    def __enter__(self) -> Garbler:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(self.path))
        self.listening.listen()
        self._spawn(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        for one in (self.listening, *self.sockets):
            one.close()

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        self.threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self.threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(self.server))
            self.sockets += [client, server]
            self._spawn(self._pump, client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([client, server], [], [])
                for one in ready:
                    data = one.recv(65536)
                    if not data:
                        client.shutdown(socket.SHUT_RDWR)
                        server.shutdown(socket.SHUT_RDWR)
                        return
                    if one is client:
                        server.sendall(data)
                    else:
                        client.sendall(self._garble(data))

    def _garble(self, data: bytes) -> bytes:
        # Only what is short, which is heads: a byte of the disk that is flipped on the wire nobody could tell.
        if len(data) > 1024 or self.chance.random() > self.rate:
            return data
        self.damage += 1
        at = self.chance.randrange(len(data))
        match self.chance.randrange(5):
            case 0:
                return data[:at] + bytes([data[at] ^ (1 << self.chance.randrange(8))]) + data[at + 1 :]
            case 1:
                return data[:at]
            case 2:
                return data[:at] + self.chance.randbytes(self.chance.randrange(1, 64)) + data[at:]
            case 3:
                return data + data
            case _:
                return self.chance.randbytes(len(data))


@pytest.mark.parametrize("seed", range(10))
async def test_damage_on_the_wire_ends_in_an_error_and_never_hangs(folder: Path, seed: int) -> None:
    before, begun = resident(), time.monotonic()
    chance = random.Random(seed)
    # Its bytes are all zeros, which it does not tell; so even a byte of a head that slips in shows.
    with (
        Liar(folder / "s", size=64 * MIB) as server,
        Garbler(folder / "g", server.path, chance, 0.3) as garbler,
    ):
        good = bad = 0
        for _ in range(15):
            try:
                async with opened(Address(str(garbler.path), ""), timeout=0.3) as export:
                    for _ in range(10):
                        offset = chance.randrange(max(export.size - 4096, 1))
                        with trio.fail_after(10):
                            try:
                                assert len(await export.read(offset, min(4096, export.size))) == min(4096, export.size)
                                good += 1
                            except (NbdUnavailable, NbdReadFailed):
                                bad += 1
            except BackupfsError:
                bad += 1
        assert garbler.damage > 5
        assert bad > 0
    assert time.monotonic() - begun < 120
    assert resident() - before < 64 * MIB
