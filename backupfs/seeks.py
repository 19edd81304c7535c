# SPDX-License-Identifier: GPL-3.0-or-later
"""lseek(SEEK_DATA, SEEK_HOLE), which pyfuse3 has no handler for.

Why: `cp`, `tar -S`, bsdtar and `qemu-img convert` find the holes of a disk with lseek. A file
system that knows none is answered for by the kernel, which says "all data", and they read a
thin disk's terabyte of zeros. What would make this module and `_libfuse.c` unnecessary: a
pyfuse3 whose Operations have an `lseek`.

    kernel ─► libfuse ─► _libfuse.c ──arrived──► a task ─► Operations.lseek
                            ▲                    └─ Request.found(offset)
              fuse_reply_*  └───────────────────────── Request.failed(errno)

How: `_libfuse.c` stands in for libfuse's fuse_session_new and adds the one operation. For that the
dynamic linker must meet it before libfuse, so it is loaded here with RTLD_GLOBAL, and this module
must be imported before pyfuse3 is. Where that does not come about (it was installed without a
compiler, pyfuse3 is linked in some other way) nothing else changes: `Seeks.why_not` says so.

Law: each request is answered exactly once; see `_libfuse.c`. The session lives as long as any
request: `end` comes before it is destroyed.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Awaitable, Callable
from types import ModuleType
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from backupfs._libfuse import Request


def _load() -> tuple[ModuleType | None, str]:
    flags = sys.getdlopenflags()
    sys.setdlopenflags(flags | os.RTLD_GLOBAL)
    try:
        return importlib.import_module("backupfs._libfuse"), ""
    except ImportError as error:
        return None, str(error)
    finally:
        sys.setdlopenflags(flags)


_libfuse, _why_not_loaded = _load()

# isort: split
import pyfuse3  # noqa: E402  # only now: its symbols are bound when it is loaded

HINT: Final = "install gcc, python3-dev and libfuse3-dev, then backupfs again"


class Seeks:
    """Where the kernel's lseek requests arrive. One for a process, as the FUSE session is.

    *answer* takes (file handle, offset, whence), returns an offset or raises FUSEError.
    """

    def __init__(self, answer: Callable[[int, int, int], Awaitable[int]]) -> None:
        self._answer = answer
        self._nursery: trio.Nursery | None = None

    def listen(self) -> None:
        """Have the next session know lseek. Must come before pyfuse3.init."""
        if _libfuse is not None:
            _libfuse.listen(self._arrived)

    def end(self) -> None:
        """Take no more requests; what still waits gets EIO. Must come before pyfuse3.close."""
        if _libfuse is not None:
            _libfuse.end()

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Answer requests until cancelled; must have started before pyfuse3.main does."""
        try:
            async with trio.open_nursery() as self._nursery:
                task_status.started()
                await trio.sleep_forever()
        finally:
            self._nursery = None

    @property
    def why_not(self) -> str | None:
        """Why tools are told that all is data, with the cure; None: they are told the truth."""
        if _libfuse is None:
            return f"the C extension is not there ({_why_not_loaded}); {HINT}"
        if not _libfuse.sessions():
            return "pyfuse3 does not take the C extension up; use one that is linked with a shared libfuse3"
        return None

    def _arrived(self, request: Request, _inode: int, handle: int, offset: int, whence: int) -> None:
        # In the midst of libfuse's dispatch, in the trio thread: only hand over.
        if self._nursery is None:
            request.failed(errno.EIO)
        else:
            self._nursery.start_soon(self._reply, request, handle, offset, whence)

    async def _reply(self, request: Request, handle: int, offset: int, whence: int) -> None:
        try:
            request.found(await self._answer(handle, offset, whence))
        except pyfuse3.FUSEError as error:
            request.failed(error.errno)
        finally:
            request.failed(errno.EIO)  # cancelled; no answer after another
