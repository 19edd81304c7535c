# SPDX-License-Identifier: GPL-3.0-or-later
"""The control socket: how `backupfs release` and `backupfs begin` reach a running mount.

One line of JSON each way: {"command": "release"} is answered {"said": "…"} or {"error": "…"}.
The socket lies in a folder that only the mounting user can enter; its path stands in
`.backupfs/status.json`. It is not a file of the mount, so it answers also when the mount is
read-only, or a reader is stuck.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import trio

from backupfs.errors import BackupfsError, UsageError

log = logging.getLogger("backupfs.control")

LONGEST_LINE: Final = 4096

Command = Callable[[], Awaitable[str]]


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Name a socket's *path* in few bytes: sockaddr_un holds 107, a state folder may need more."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@contextlib.asynccontextmanager
async def open_control(path: Path, commands: Mapping[str, Command]) -> AsyncIterator[None]:
    """Answer *commands* on a socket at *path* for as long as the context lasts."""
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # of a killed process: the state folder's lock is ours now
        mask = os.umask(0o177)
        try:
            with _short(path) as short:
                await listener.bind(short)
        finally:
            os.umask(mask)
        listener.listen(8)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_accept, nursery, listener, commands)
                yield
                nursery.cancel_scope.cancel()
        finally:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


async def _accept(nursery: trio.Nursery, listener: trio.socket.SocketType, commands: Mapping[str, Command]) -> None:
    while True:
        connection, _address = await listener.accept()
        nursery.start_soon(_serve, trio.SocketStream(connection), commands)


async def _serve(stream: trio.SocketStream, commands: Mapping[str, Command]) -> None:
    async with stream:
        try:
            with trio.fail_after(10):
                line = await stream.receive_some(LONGEST_LINE)
            answer = await _answer(line, commands)
            await stream.send_all(json.dumps(answer).encode() + b"\n")
        except (trio.BrokenResourceError, trio.TooSlowError) as error:
            log.debug("a caller of the control socket went away: %r", error)


async def _answer(line: bytes, commands: Mapping[str, Command]) -> dict[str, str]:
    try:
        name = str(json.loads(line)["command"])
        command = commands[name]
    except (ValueError, KeyError, TypeError):
        return {"error": f"not a command; there are: {', '.join(commands)}"}
    try:
        return {"said": await command()}
    except BackupfsError as error:
        return {"error": str(error)}
    except Exception:
        log.exception("unexpected, in the command %s", name)
        return {"error": "an unexpected error; see the mount's log"}


def call(path: str, command: str, *, timeout: float) -> str:
    """Send *command* to the mount that listens at *path*; return what it said. Blocks.

    Raises UsageError with what the mount answered, or why it did not.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout)
            with _short(Path(path)) as short:
                connection.connect(short)
            connection.sendall(json.dumps({"command": command}).encode() + b"\n")
            line = connection.makefile("rb").readline()
    except OSError as error:
        raise UsageError(f"the mount's control socket {path} does not answer: {error}") from error
    try:
        answer = json.loads(line)
    except ValueError:
        raise UsageError(f"the mount's control socket {path} answered nonsense; is it of this version?") from None
    if "error" in answer:
        raise UsageError(str(answer["error"]))
    return str(answer.get("said", ""))
