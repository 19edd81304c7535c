# SPDX-License-Identifier: GPL-3.0-or-later
"""What the mount looks like; decided here and nowhere else.

    /                          Root
    ├── domain.xml             LiveXml           readable at any time, begins nothing
    ├── raw/                   PointFolder       the first look inside begins the point in time
    │   ├── domain.xml         PointFile
    │   ├── nvram.fd           PointFile         where the domain has one
    │   └── vda.raw            PointImage        one for each disk that takes part
    ├── qcow2/                 PointFolder       the same in another form
    │   └── domain.xml  nvram.fd  vda.qcow2
    ├── checkpoints/           Checkpoints       one folder for each of libvirt's
    │   └── monday/            Checkpoint
    │       └── checkpoint.xml
    └── .backupfs/             Inner             not listed, but there
        └── status.json  metrics.prom  log

The nodes of the point in time are in `pointtree`, those of checkpoints in `checkpointtree`, what all
share in `mounted`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupfs.checkpointtree import Checkpoints
from backupfs.errors import NoSuchFile
from backupfs.forms import FORMS
from backupfs.mounted import Mounted
from backupfs.nodes import Attributes, Node, OpenBytes, OpenFile, OpenFolder
from backupfs.pointtree import PointFolder


@dataclass(frozen=True, slots=True)
class Root:
    """The mount's root. Listing it begins nothing."""

    tree: Mounted
    path: str = "/"

    async def attributes(self) -> Attributes:
        return Attributes(0, self.tree.now, links=3 + len(FORMS))

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), "state": self.tree.job.state.value}

    async def child(self, name: str) -> Node:
        if name == ".backupfs":
            return Inner(self.tree)
        for entry, node in self._entries():
            if entry == name:
                return node
        raise NoSuchFile(f"/{name}")

    async def open(self, pid: int) -> OpenFolder:
        return OpenFolder(self._entries())

    def _entries(self) -> list[tuple[str, Node]]:
        return [
            ("domain.xml", LiveXml(self.tree)),
            *((form, PointFolder(self.tree, form, self.tree.job.generation)) for form in FORMS),
            ("checkpoints", Checkpoints(self.tree)),
        ]


@dataclass(frozen=True, slots=True)
class LiveXml:
    """The definition as it is now."""

    tree: Mounted
    path: str = "/domain.xml"

    async def attributes(self) -> Attributes:
        xml = await self.tree.xml.get_or_last("")
        return Attributes(len(xml.encode()), self.tree.now)

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def open_file(self, pid: int) -> OpenFile:
        return OpenBytes((await self.tree.xml.get()).encode(), direct=True)


@dataclass(frozen=True, slots=True)
class Inner:
    """What backupfs tells of itself."""

    tree: Mounted
    path: str = "/.backupfs"

    async def attributes(self) -> Attributes:
        return Attributes(0, self.tree.now, links=2)

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def child(self, name: str) -> Node:
        if name not in self.tree.inner:
            raise NoSuchFile(f"{self.path}/{name}")
        return InnerFile(self.tree, name)

    async def open(self, pid: int) -> OpenFolder:
        return OpenFolder([(name, InnerFile(self.tree, name)) for name in self.tree.inner])


@dataclass(frozen=True, slots=True)
class InnerFile:
    """A file of `.backupfs/`, as it is when it is opened."""

    tree: Mounted
    name: str

    @property
    def path(self) -> str:
        return f"/.backupfs/{self.name}"

    async def attributes(self) -> Attributes:
        return Attributes(len(self.tree.inner[self.name]()), self.tree.now)

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def open_file(self, pid: int) -> OpenFile:
        return OpenBytes(self.tree.inner[self.name](), direct=True)
