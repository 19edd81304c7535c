# SPDX-License-Identifier: GPL-3.0-or-later
"""A pyfuse3 file system with one file, answered from memory: what pyfuse3 itself can do.

python -m tests.bench.memoryfs MOUNTPOINT SIZE
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence

import pyfuse3
import trio

NAME = b"memory.raw"
FILE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
BLOCK = 2**20


class Memory(pyfuse3.Operations):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.block = memoryview(os.urandom(BLOCK))

    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(2)
        return await self.getattr(FILE, ctx)

    async def getattr(self, inode: int, ctx: object) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFREG | 0o400 if inode == FILE else stat.S_IFDIR | 0o500)
        entry.st_size = self.size if inode == FILE else 0
        entry.st_blksize = BLOCK
        return entry

    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1))

    async def read(self, fh: int, off: int, size: int) -> memoryview:
        length = min(size, self.size - off)
        return self.block[:length]

    async def opendir(self, inode: int, ctx: object) -> int:
        return 2

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        return

    async def release(self, fh: int) -> None: ...

    async def flush(self, fh: int) -> None: ...

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None: ...


def main() -> None:
    pyfuse3.init(Memory(int(sys.argv[2])), sys.argv[1], {"fsname=memory", "subtype=bench"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main()
