# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import pytest

from backupfs.errors import ForeignJob, PointOver
from backupfs.nodes import Attributes, OpenBytes, OpenFolder
from backupfs.operations import Operations


@dataclass(eq=False)
class Folder:
    """A folder whose children are what the test says."""

    path: str
    error: Exception | None = None
    children: dict[str, Any] = field(default_factory=dict)
    listed: list[tuple[str, Any]] | None = None

    async def attributes(self) -> Attributes:
        if self.error is not None:
            raise self.error
        return Attributes(0, 1000, generation=3)

    def xattrs(self) -> dict[str, str]:
        return {"domain": "web01"}

    async def child(self, name: str) -> Any:
        return self.children[name]

    async def open(self, pid: int) -> OpenFolder:
        return OpenFolder(self.listed or list(self.children.items()))


CONTEXT: Any = pyfuse3.RequestContext.__new__(pyfuse3.RequestContext)


def made(root: Folder) -> Operations:
    return Operations(root, size=lambda: 5000, owner=(7, 8), modes=(0o500, 0o400))


async def listing(operations: Operations, monkeypatch: pytest.MonkeyPatch, most: int = 99) -> list[str]:
    names: list[str] = []

    def reply(_token: object, name: bytes, _entry: object, _next: int) -> bool:
        if len(names) == most:
            return False
        names.append(name.decode())
        return True

    monkeypatch.setattr(pyfuse3, "readdir_reply", reply)
    handle = await operations.opendir(pyfuse3.ROOT_INODE, CONTEXT)
    await operations.readdir(handle, 0, None)
    await operations.releasedir(handle)
    return names


async def test_root_lists_the_next_points_folder_when_one_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Folder("/raw")
    root = Folder("/", children={"raw": fresh}, listed=[("raw", Folder("/raw", PointOver("web01", 5)))])
    operations = made(root)
    assert await listing(operations, monkeypatch) == ["raw"]
    assert operations.inodes.node(operations.inodes.number(fresh)) is fresh


async def test_a_listing_inside_an_ended_point_is_eio(monkeypatch: pytest.MonkeyPatch) -> None:
    over = Folder("/raw", PointOver("web01", 5))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await listing(made(Folder("/", children={"raw": over})), monkeypatch)
    assert caught.value.errno == errno.EIO


async def test_only_entries_that_fitted_count_as_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Folder("/", children={"a": Folder("/a"), "b": Folder("/b")})
    operations = made(root)
    assert await listing(operations, monkeypatch, most=1) == ["a"]
    assert len(operations.inodes) == 1


async def test_attributes_are_translated() -> None:
    operations = made(Folder("/", children={"a": Folder("/a")}))
    entry = await operations.lookup(pyfuse3.ROOT_INODE, b"a", CONTEXT)
    assert entry.st_mode & 0o7777 == 0o500
    assert (entry.st_uid, entry.st_gid, entry.generation) == (7, 8, 3)
    assert entry.entry_timeout == 0
    assert entry.st_mtime_ns == 1000 * 10**9
    await operations.forget([(entry.st_ino, 1)])
    assert len(operations.inodes) == 0
    assert (await operations.statfs(CONTEXT)).f_blocks == 2


async def test_an_unexpected_error_is_eio_and_is_logged(logged_warnings: list[str]) -> None:
    operations = made(Folder("/", ValueError("bug")))
    with pytest.raises(pyfuse3.FUSEError) as caught:
        await operations.getattr(pyfuse3.ROOT_INODE, CONTEXT)
    assert caught.value.errno == errno.EIO
    assert "ValueError: bug" in logged_warnings[0]
    logged_warnings.clear()


async def test_a_cause_is_told_once_however_often_it_is_met(logged_warnings: list[str]) -> None:
    operations = made(Folder("/", ForeignJob("web01", "a backup job")))
    for _ in range(3):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.getattr(pyfuse3.ROOT_INODE, CONTEXT)
        assert caught.value.errno == errno.EBUSY
    assert len(logged_warnings) == 1
    logged_warnings.clear()


async def test_xattrs_have_their_prefix_and_no_others_are_there() -> None:
    operations = made(Folder("/"))
    assert await operations.listxattr(pyfuse3.ROOT_INODE, CONTEXT) == [b"user.backupfs.domain"]
    assert await operations.getxattr(pyfuse3.ROOT_INODE, b"user.backupfs.domain", CONTEXT) == b"web01"
    for name in (b"user.backupfs.other", b"security.selinux"):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.getxattr(pyfuse3.ROOT_INODE, name, CONTEXT)
        assert caught.value.errno == pyfuse3.ENOATTR


@dataclass(eq=False)
class OverClaim:
    """A claim on a point in time that is over."""

    def check(self) -> None:
        raise PointOver("web01", 5)

    def release(self) -> None: ...


async def test_lseek_tells_data_from_holes_and_every_failure_by_its_errno() -> None:
    operations = made(Folder("/"))
    operations._files = {1: OpenBytes(b"12345"), 2: OpenBytes(b"12345", OverClaim())}
    assert await operations.lseek(1, 3, os.SEEK_DATA) == 3
    assert await operations.lseek(1, 3, os.SEEK_HOLE) == 5
    for handle, offset, whence, expected in (
        (1, 5, os.SEEK_DATA, errno.ENXIO),
        (1, 5, os.SEEK_HOLE, errno.ENXIO),
        (1, 0, os.SEEK_SET, errno.EINVAL),
        (1, 0, 99, errno.EINVAL),
        (2, 0, os.SEEK_DATA, errno.EIO),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await operations.lseek(handle, offset, whence)
        assert caught.value.errno == expected
