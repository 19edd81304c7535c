# SPDX-License-Identifier: GPL-3.0-or-later
"""A FUSE mount without a domain: `python -m tests.integration.bare_mount MOUNTPOINT [NBD-SOCKET]`.

    /disk      an NBD server's disk, or else a map that begins and ends as a test wants
    /text      a small file
    /stuck     an lseek in it is never answered
    /broken    an lseek in it raises what no boundary expects

Prints "ready" when it is mounted, and what `Seeks.why_not` says. Ends when it is unmounted, or by SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from backupfs import mount
from backupfs.seeks import Seeks

# isort: split
import trio

from backupfs.errors import NoSuchFile
from backupfs.export import open_export, resolve
from backupfs.extents import ZERO, Builder
from backupfs.image import RawImage
from backupfs.nbdclient import Address
from backupfs.nodes import Attributes, Buffer, OpenBytes, OpenFolder
from backupfs.operations import Operations

EXTENTS = [(4096, 0), (5000, ZERO), (1, 0), (8191, ZERO), (512, 0), (3_000_000, ZERO)]


@dataclass(frozen=True)
class OpenDisk:
    image: RawImage[Any]
    direct: bool = False

    async def read(self, offset: int, length: int) -> Buffer:
        return await resolve(self.image, offset, length)

    async def seek(self, offset: int, *, data: bool) -> int | None:
        return await self.image.seek(offset, data=data)

    def close(self) -> None: ...


class OpenStuck(OpenBytes):
    async def seek(self, offset: int, *, data: bool) -> int | None:
        print("stuck", flush=True)
        await trio.sleep_forever()
        return None


class OpenBroken(OpenBytes):
    async def seek(self, offset: int, *, data: bool) -> int | None:
        raise ZeroDivisionError


@dataclass(frozen=True)
class File:
    path: str
    size: int
    opened: Any
    allocated: int | None = None

    async def attributes(self) -> Attributes:
        return Attributes(self.size, 1, allocated=self.allocated, valid=3600.0)  # as those of a point

    def xattrs(self) -> Mapping[str, str]:
        return {}

    async def open_file(self, pid: int) -> Any:
        return self.opened


@dataclass(frozen=True)
class Root:
    files: tuple[File, ...]
    path: str = "/"

    async def attributes(self) -> Attributes:
        return Attributes(0, 1)

    def xattrs(self) -> Mapping[str, str]:
        return {}

    async def child(self, name: str) -> File:
        for file in self.files:
            if file.path == f"/{name}":
                return file
        raise NoSuchFile(name)

    async def open(self, pid: int) -> OpenFolder:
        return OpenFolder([(file.path[1:], file) for file in self.files])


@asynccontextmanager
async def disk(socket: str | None) -> AsyncIterator[RawImage[Any]]:
    async def never() -> bool:
        return False

    async with AsyncExitStack() as stack:
        if socket is not None:
            export = await stack.enter_async_context(open_export(Address(socket, ""), allow_reconnect=never))
            yield RawImage(export, export.extents)
            return
        builder = Builder(sum(length for length, _ in EXTENTS))
        for length, flags in EXTENTS:
            builder.append(length, flags)
        yield RawImage(None, builder.finish())


async def main(path: str, socket: str | None = None) -> None:
    async with disk(socket) as image:
        files = (
            File("/disk", image.size, OpenDisk(image), image.allocated),
            File("/text", 5, OpenBytes(b"12345")),
            File("/stuck", 5, OpenStuck(b"12345")),
            File("/broken", 5, OpenBroken(b"12345")),
        )
        operations = Operations(Root(files), size=lambda: 0, owner=(0, 0), modes=(0o500, 0o400))
        seeks = Seeks(operations.lseek)
        async with mount._open_fuse(operations, seeks, path, {"subtype=backupfs", "fsname=bare"}):
            async with trio.open_nursery() as nursery:
                await nursery.start(seeks.run)
                nursery.start_soon(mount._run_fuse, nursery)
                with trio.open_signal_receiver(signal.SIGTERM) as arriving:
                    print(f"ready {seeks.why_not}", flush=True)
                    async for _ in arriving:
                        nursery.cancel_scope.cancel()
    print("ended", flush=True)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
