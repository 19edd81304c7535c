# SPDX-License-Identifier: GPL-3.0-or-later
"""FUSE requests, answered from the tree.

Numbers and errors are translated here, nothing is decided: an inode number becomes a node, a
handle an open file, an error of ours its errno.

Law: a handler may raise FUSEError only; anything else would end the main loop and leave the
request, and with it the reader, unanswered for ever. So each one passes the boundary `answered`.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, ReaddirToken, RequestContext, StatvfsData

from backupfs.errors import BackupfsError, NoSuchFile, PointLost, PointOver, ReadOnly
from backupfs.inodes import Inodes
from backupfs.nodes import Attributes, Buffer, Folder, Node, OpenFile, OpenFolder, Shelf

log = logging.getLogger("backupfs.operations")

P = ParamSpec("P")
T = TypeVar("T")

BLOCK: Final = 2**20  # what a reader had best ask for at a time
XATTR_PREFIX: Final = b"user.backupfs."
_WRITING: Final = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND | os.O_CREAT


def answered(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError out of *handler*: the one place where errors become numbers."""

    @functools.wraps(handler)
    async def boundary(*args: P.args, **kwargs: P.kwargs) -> T:
        operations = args[0]
        assert isinstance(operations, Operations)
        if operations.at_first_request is not None:
            operations.at_first_request()
            operations.at_first_request = None
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except BackupfsError as error:
            operations.tell(error)
            raise FUSEError(error.errno) from None
        except Exception:
            log.exception("unexpected, answered with EIO: %s", handler.__name__)
            raise FUSEError(errno.EIO) from None

    return boundary


class Operations(pyfuse3.Operations):
    """The mount's answers to the kernel.

    *size* tells the bytes of all disks (for statfs), *owner* the uid and gid, *modes* those of
    folders and files, without the type.
    """

    supports_dot_lookup = False

    def __init__(
        self, root: Folder, *, size: Callable[[], int], owner: tuple[int, int], modes: tuple[int, int]
    ) -> None:
        super().__init__()
        self.inodes = Inodes(root)
        self.at_first_request: Callable[[], None] | None = None  # the kernel has settled the mount by then
        self._size = size
        self._owner = owner
        self._folder_mode = stat.S_IFDIR | modes[0]
        self._file_mode = stat.S_IFREG | modes[1]
        self._handles = itertools.count(1)
        self._files: dict[int, OpenFile] = {}
        self._folders: dict[int, tuple[Folder, OpenFolder]] = {}
        self._told: set[str] = set()

    def tell(self, error: BackupfsError) -> None:
        """Log what a reader met: each sentence once, for a reader asks a thousand times."""
        if error.told or isinstance(error, NoSuchFile | ReadOnly | PointOver | PointLost):
            return  # told when it happened, or an answer like any other
        sentence = str(error)
        if sentence in self._told:
            log.debug("%s", sentence)
            return
        if len(self._told) > 1000:
            self._told.clear()
        self._told.add(sentence)
        log.warning("%s: %s", os.strerror(error.errno), sentence)

    # --- names and attributes ----------------------------------------------------------------

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        folder = self._folder(parent_inode)
        node = await folder.child(os.fsdecode(name))
        attributes = await self._attributes(node)
        # No await between here and the answer: the latest lookup answered is the kernel's.
        self.inodes.remember(node)
        return attributes

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, lookups in inode_list:
            self.inodes.forget(number, lookups)

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return await self._attributes(self.inodes.node(inode))

    async def _attributes(self, node: Node) -> EntryAttributes:
        return self._entry(node, await node.attributes())

    def _entry(self, node: Node, attributes: Attributes) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = self.inodes.number(node)
        entry.generation = attributes.generation
        # Every walk along a path must ask again: the same name may be of another point by now.
        entry.entry_timeout = 0
        entry.attr_timeout = attributes.valid
        mode = self._folder_mode if isinstance(node, Folder) else self._file_mode
        entry.st_mode = mode | stat.S_IWUSR if attributes.writable else mode
        entry.st_nlink = attributes.links
        entry.st_uid, entry.st_gid = self._owner
        entry.st_size = attributes.size
        entry.st_blksize = BLOCK
        allocated = attributes.size if attributes.allocated is None else attributes.allocated
        entry.st_blocks = (allocated + 511) // 512
        entry.st_mtime_ns = entry.st_ctime_ns = entry.st_atime_ns = attributes.time * 10**9
        return entry

    def _folder(self, inode: int) -> Folder:
        node = self.inodes.node(inode)
        if not isinstance(node, Folder):
            raise FUSEError(errno.ENOTDIR)
        return node

    # --- folders -----------------------------------------------------------------------------

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        folder = self._folder(inode)
        opened = await folder.open(ctx.pid)
        handle = next(self._handles)
        self._folders[handle] = folder, opened
        return handle

    @answered
    async def readdir(self, fh: int, start_id: int, token: ReaddirToken) -> None:
        folder, opened = self._folders[fh]
        opened.check()
        for position, (name, node) in enumerate(opened.entries[start_id:], start_id + 1):
            try:
                node, entry = await self._listed(folder, name, node)
            except NoSuchFile:
                continue  # vanished meanwhile
            if not pyfuse3.readdir_reply(token, os.fsencode(name), entry, position):
                break
            self.inodes.remember(node)

    async def _listed(self, folder: Folder, name: str, node: Node) -> tuple[Node, EntryAttributes]:
        """Return an entry as it is now; a point that is over ends the listing of its own folders only."""
        try:
            return node, await self._attributes(node)
        except PointOver:
            # The root was opened, then a point ended: its raw/ is that of the next one by now.
            node = await folder.child(name)
            return node, await self._attributes(node)

    async def releasedir(self, fh: int) -> None:
        self._folders.pop(fh)[1].close()

    @answered
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        shelf = self._shelf(parent_inode)
        node = await shelf.make(os.fsdecode(name), ctx.pid)
        attributes = await self._attributes(node)
        self.inodes.remember(node)
        return attributes

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        await self._shelf(parent_inode).remove(os.fsdecode(name))

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        self._shelf(parent_inode_old)
        raise FUSEError(errno.EPERM)  # a checkpoint has one name for good

    def _shelf(self, inode: int) -> Shelf:
        """Return a folder that can be changed; raise ReadOnly for all others."""
        folder = self._folder(inode)
        if not isinstance(folder, Shelf):
            raise ReadOnly(folder.path)
        return folder

    # --- files -------------------------------------------------------------------------------

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        node = self.inodes.node(inode)
        if isinstance(node, Folder):
            raise FUSEError(errno.EISDIR)
        if flags & _WRITING:
            raise ReadOnly(node.path)
        opened = await node.open_file(ctx.pid)
        handle = next(self._handles)
        self._files[handle] = opened
        return FileInfo(fh=handle, direct_io=opened.direct, keep_cache=not opened.direct)

    @answered
    async def read(self, fh: int, off: int, size: int) -> Buffer:  # type: ignore[override]  # any buffer will do
        # The buffer may be one that the next read fills again: it is answered with before any await.
        return await self._files[fh].read(off, size)

    @answered
    async def lseek(self, fh: int, off: int, whence: int) -> int:
        """Answer SEEK_DATA and SEEK_HOLE; the kernel does the other kinds itself. See `seeks`."""
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise FUSEError(errno.EINVAL)
        found = await self._files[fh].seek(off, data=whence == os.SEEK_DATA)
        if found is None:
            raise FUSEError(errno.ENXIO)
        return found

    async def release(self, fh: int) -> None:
        self._files.pop(fh).close()

    async def flush(self, fh: int) -> None:
        """Have nothing to write: closing is no error."""

    # --- the rest ----------------------------------------------------------------------------

    @answered
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        answer = StatvfsData()
        answer.f_bsize = BLOCK
        answer.f_frsize = 4096
        answer.f_blocks = -(-self._size() // answer.f_frsize)
        answer.f_bfree = answer.f_bavail = 0
        answer.f_files = len(self.inodes) + 1
        answer.f_ffree = answer.f_favail = 0
        answer.f_namemax = 255
        return answer

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        value = None
        if name.startswith(XATTR_PREFIX):
            value = self.inodes.node(inode).xattrs().get(os.fsdecode(name.removeprefix(XATTR_PREFIX)))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode("utf-8", "surrogateescape")

    @answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        return [XATTR_PREFIX + name.encode() for name in self.inodes.node(inode).xattrs()]

    @answered
    async def refuse(self, *_arguments: Any, **_more: Any) -> NoReturn:
        """Answer anything that would write with EROFS."""
        raise ReadOnly("the mount")


_WRITERS: Final = "setattr mknod unlink symlink link create write setxattr removexattr"
for _writer in _WRITERS.split():
    setattr(Operations, _writer, Operations.refuse)
