# SPDX-License-Identifier: GPL-3.0-or-later
"""NBD servers for tests: qemu-nbd, nbdkit, and one that tells what no real server would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from backupfs.nbdclient import Address

from .conftest import wait_until


@dataclass(eq=False)
class Server:
    """A running server."""

    words: list[str]
    socket: Path
    pid_file: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> Address:
        return Address(str(self.socket), "")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"

    def start(self) -> None:
        self.pid_file.unlink(missing_ok=True)
        self.process = subprocess.Popen(self.words, stderr=subprocess.DEVNULL)
        # Written when it listens.
        wait_until(lambda: self.pid_file.exists() and self.pid_file.read_text().endswith("\n"))

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)  # qemu-nbd refuses to listen where it is


@contextlib.contextmanager
def open_server(folder: Path, program: str, *words: str) -> Iterator[Server]:
    """Run `nbdkit ...` or `qemu-nbd ...` on a socket in *folder*."""
    sock, pid_file = folder / "nbd.sock", folder / "nbd.pid"
    if program == "nbdkit":
        line = ["nbdkit", "-f", "-r", "-U", str(sock), "-P", str(pid_file), *words]
    else:
        line = ["qemu-nbd", "-r", "-t", "-e", "64", "-k", str(sock), "--pid-file", str(pid_file), *words]
    server = Server(line, sock, pid_file)
    server.start()
    try:
        yield server
    finally:
        server.signal(signal.SIGCONT)
        server.kill()


# --- one that lies ---------------------------------------------------------------------------------

NBDMAGIC, IHAVEOPT, OPT_REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
STRUCTURED, SIMPLE, REQUEST = 0x668E33EF, 0x67446698, 0x25609513
OPT_GO, OPT_STRUCTURED, OPT_META = 7, 8, 10
CMD_READ, CMD_DISC, CMD_STATUS = 0, 2, 7
DONE = 1
Chunk = tuple[int, int, bytes]  # flags, type, payload


def extents(*entries: int) -> list[Chunk]:
    """A right answer to a question for the map."""
    return [(DONE, 5, struct.pack(f">I{len(entries)}I", 1, *entries))]


@dataclass(eq=False)
class Liar:
    """A server of one disk of zeros, on a thread; *status* and *read* say what it answers.

    `status(offset, length)` returns chunks; `read(offset, length)` returns the raw reply's tail, or
    None to say nothing; both may return generators that never end.
    """

    path: Path
    size: int = 2**20
    status: Callable[[int, int], Iterator[Chunk] | list[Chunk]] = lambda _offset, length: extents(length, 0)
    read: Callable[[int, int], bytes | None] = lambda _offset, length: bytes(length)
    name: bytes = b"base:allocation"
    clients: list[socket.socket] = field(default_factory=list)
    connected: int = 0

    @property
    def address(self) -> Address:
        return Address(str(self.path), "")

    def __enter__(self) -> Liar:
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(self.path))
        self.listening.listen()
        self.threads = [threading.Thread(target=self._accept, daemon=True)]
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        for client in self.clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listening.close()
        os.unlink(self.path)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            self.connected += 1
            self.clients.append(client)
            thread = threading.Thread(target=self._talk, args=(client,), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _talk(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, struct.error), client:
            self._agree(client)
            while True:
                magic, _flags, command, cookie, offset, length = struct.unpack(">IHHQQI", self._take(client, 28))
                assert magic == REQUEST
                if command == CMD_DISC:
                    return
                if command == CMD_STATUS:
                    for flags, kind, payload in self.status(offset, length):
                        client.sendall(struct.pack(">IHHQI", STRUCTURED, flags, kind, cookie, len(payload)) + payload)
                elif (data := self.read(offset, length)) is not None:
                    client.sendall(struct.pack(">IIQ", SIMPLE, 0, cookie) + data)

    def _agree(self, client: socket.socket) -> None:
        client.sendall(struct.pack(">QQH", NBDMAGIC, IHAVEOPT, 3))
        self._take(client, 4)
        while True:
            _, option, length = struct.unpack(">QII", self._take(client, 16))
            payload = self._take(client, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                client.sendall(struct.pack(">QIII", OPT_REPLY, option, kind, len(data)) + data)

            if option == OPT_META:
                if self.name.split(b":")[0] in payload:
                    reply(4, struct.pack(">I", 1) + self.name)
                reply(1)
            elif option == OPT_STRUCTURED:
                reply(1)
            elif option == OPT_GO:
                reply(3, struct.pack(">HQH", 0, self.size, 0b11))
                reply(1)
                return
            else:
                reply(0x80000001)

    @staticmethod
    def _take(client: socket.socket, length: int) -> bytes:
        data = client.recv(length, socket.MSG_WAITALL) if length else b""
        if len(data) < length:
            raise EOFError
        return data
