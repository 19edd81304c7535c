# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes of `checkpoints/`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupfs import domainxml
from backupfs.errors import NoSuchFile
from backupfs.mounted import Mounted
from backupfs.nodes import Attributes, Node, OpenBytes, OpenFile, OpenFolder


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Libvirt's checkpoints of the domain, as they are now: no event tells of them."""

    tree: Mounted
    path: str = "/checkpoints"

    async def attributes(self) -> Attributes:
        listed = await self.tree.checkpoints.get_or_last({})
        return Attributes(0, self.tree.now, links=2 + len(listed))

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def child(self, name: str) -> Node:
        listed = await self.tree.checkpoints.get()
        if name not in listed:
            raise NoSuchFile(f"{self.path}/{name}")
        return Checkpoint(self.tree, name, listed[name])

    async def open(self, pid: int) -> OpenFolder:
        listed = await self.tree.checkpoints.get()
        return OpenFolder([(name, Checkpoint(self.tree, name, xml)) for name, xml in sorted(listed.items())])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint. It holds no data: it only makes QEMU track what is written."""

    tree: Mounted
    name: str
    xml: str

    @property
    def path(self) -> str:
        return f"/checkpoints/{self.name}"

    async def attributes(self) -> Attributes:
        return Attributes(0, domainxml.parse_checkpoint(self.xml).creation_time, links=2)

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), "checkpoint": self.name}

    async def child(self, name: str) -> Node:
        if name != "checkpoint.xml":
            raise NoSuchFile(f"{self.path}/{name}")
        return CheckpointXml(self)

    async def open(self, pid: int) -> OpenFolder:
        return OpenFolder([("checkpoint.xml", CheckpointXml(self))])


@dataclass(frozen=True, slots=True)
class CheckpointXml:
    """A checkpoint's definition, in the form that `virsh checkpoint-create --redefine` takes."""

    checkpoint: Checkpoint

    @property
    def path(self) -> str:
        return f"{self.checkpoint.path}/checkpoint.xml"

    @property
    def _data(self) -> bytes:
        return domainxml.strip_secrets(self.checkpoint.xml).encode()

    async def attributes(self) -> Attributes:
        own = await self.checkpoint.attributes()
        return Attributes(len(self._data), own.time)

    def xattrs(self) -> Mapping[str, str]:
        return self.checkpoint.xattrs()

    async def open_file(self, pid: int) -> OpenFile:
        return OpenBytes(self._data, direct=True)
