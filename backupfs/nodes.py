# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node of the tree is: a folder or a file, and what an open file gives.

Nodes are small values made anew at each lookup. A node of a point in time is bound to that
point for good; whoever holds it after the point is over gets `EIO` from each of its methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from backupfs.extents import seek_dense

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Attributes:
    """What stat(2) tells of a node; the owner and the modes are the mount's.

    `size` and `allocated` are bytes, `time` whole seconds since 1970 (mtime = ctime = atime).
    Who owns a `writable` folder may make folders in it.
    `generation` is 0 for what belongs to no point in time. `valid` says for how many seconds
    the kernel may answer by itself.
    """

    size: int
    time: int
    allocated: int | None = None  # None: as much as `size`
    links: int = 1
    generation: int = 0
    valid: float = 0.0
    writable: bool = False


class OpenFile(Protocol):
    """An open file of the tree."""

    @property
    def direct(self) -> bool:
        """Whether reads go past the page cache: for contents that no size in a stat binds."""
        ...

    async def read(self, offset: int, length: int) -> Buffer:
        """Return *length* bytes from *offset*; fewer only at the end of the file."""
        ...

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Return where from *offset* on data (or a hole) begins; see `image.Image.seek`."""
        ...

    def close(self) -> None:
        """Give back what the file holds."""
        ...


@runtime_checkable
class Folder(Protocol):
    """A directory."""

    @property
    def path(self) -> str: ...

    async def attributes(self) -> Attributes: ...

    def xattrs(self) -> Mapping[str, str]: ...

    async def child(self, name: str) -> Node:
        """Look *name* up; raise NoSuchFile."""
        ...

    async def open(self, pid: int) -> OpenFolder:
        """List the folder."""
        ...


@runtime_checkable
class Shelf(Folder, Protocol):
    """A directory in which others can be made, and removed."""

    async def make(self, name: str, pid: int) -> Node:
        """Make the directory *name*, on behalf of the process *pid*."""
        ...

    async def remove(self, name: str) -> None:
        """Remove the directory *name*; raise NoSuchFile."""
        ...


@runtime_checkable
class File(Protocol):
    """A regular file."""

    @property
    def path(self) -> str: ...

    async def attributes(self) -> Attributes: ...

    def xattrs(self) -> Mapping[str, str]: ...

    async def open_file(self, pid: int) -> OpenFile:
        """Open it for reading, on behalf of the process *pid* (0: unknown)."""
        ...


Node = Folder | File


class Claim(Protocol):
    """What an open file or folder holds of its point in time; see `holders.Lease`."""

    def check(self) -> None: ...

    def release(self) -> None: ...


@dataclass(frozen=True, slots=True)
class OpenFolder:
    """A listing as it was when the folder was opened."""

    entries: Sequence[tuple[str, Node]]
    claim: Claim | None = None

    def check(self) -> None:
        """Raise if the listing's point in time is over."""
        if self.claim is not None:
            self.claim.check()

    def close(self) -> None:
        """Give back what the listing holds."""
        if self.claim is not None:
            self.claim.release()


@dataclass(frozen=True, slots=True)
class OpenBytes:
    """A file whose contents are in hand."""

    data: bytes
    claim: Claim | None = None
    direct: bool = field(default=False)

    async def read(self, offset: int, length: int) -> Buffer:
        """Return a slice; nothing is waited for."""
        if self.claim is not None:
            self.claim.check()
        return self.data[offset : offset + length]

    async def seek(self, offset: int, *, data: bool) -> int | None:
        """Say that all is data."""
        if self.claim is not None:
            self.claim.check()
        return seek_dense(len(self.data), offset, data=data)

    def close(self) -> None:
        """Give the claim back."""
        if self.claim is not None:
            self.claim.release()
