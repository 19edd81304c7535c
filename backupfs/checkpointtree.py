# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes of `checkpoints/`: folders that can be made and removed, and the increments in them.

A checkpoint's folder shows what is of the point in time, so it carries a generation as raw/ does.
`checkpoint.xml` is of no point, and reading it begins none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from backupfs import domainxml
from backupfs.checkpoints import Base
from backupfs.errors import NoSuchFile
from backupfs.mounted import Mounted
from backupfs.nodes import Attributes, Node, OpenBytes, OpenFile, OpenFolder
from backupfs.point import Point
from backupfs.pointtree import PointImage, check_generation, instant_xattrs, look

PRUNED = "<!-- pruned by backupfs: libvirt has it no more; its folder stays as a base until rmdir -->\n"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The domain's checkpoints as they are now: no event tells of them."""

    tree: Mounted
    path: str = "/checkpoints"

    async def attributes(self) -> Attributes:
        listed = await self.tree.checkpoints.get_or_last({})
        return Attributes(0, self.tree.now, links=2 + len(listed), writable=True)

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def child(self, name: str) -> Node:
        listed = await self.tree.checkpoints.get()
        if name not in listed:
            raise NoSuchFile(f"{self.path}/{name}")
        return self._node(listed[name])

    async def open(self, pid: int) -> OpenFolder:
        listed = await self.tree.checkpoints.get()
        return OpenFolder([(name, self._node(base)) for name, base in sorted(listed.items())])

    async def make(self, name: str, pid: int) -> Node:
        """Make a checkpoint, and with it a new point in time."""
        await self.tree.job.make_checkpoint(name, pid)
        self.tree.checkpoints.forget()
        return await self.child(name)

    async def remove(self, name: str) -> None:
        """Delete a checkpoint, or forget one that was pruned."""
        self.tree.checkpoints.forget()
        if name not in await self.tree.checkpoints.get():
            raise NoSuchFile(f"{self.path}/{name}")
        await self.tree.job.checkpoints.remove(name)
        self.tree.checkpoints.forget()

    def _node(self, base: Base) -> Checkpoint:
        return Checkpoint(self.tree, base, self.tree.job.generation)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint. It holds no data: it only makes QEMU track what is written."""

    tree: Mounted
    base: Base
    generation: int

    @property
    def path(self) -> str:
        return f"/checkpoints/{self.base.name}"

    async def attributes(self) -> Attributes:
        check_generation(self.tree, self.generation)
        return Attributes(0, self.base.checkpoint.creation_time, links=2, generation=self.generation)

    def xattrs(self) -> Mapping[str, str]:
        told = {**self.tree.xattrs(), "checkpoint": self.base.name, "from": str(self.base.instant)}
        point = self.tree.job.point
        if point is not None and point.generation == self.generation:
            told |= instant_xattrs(point)
        return told

    async def child(self, name: str) -> Node:
        if name == "checkpoint.xml":
            return CheckpointXml(self.tree, self.base)
        for entry, node in await self._increments(await look(self.tree, self.generation)):
            if entry == name:
                return node
        raise NoSuchFile(f"{self.path}/{name}")

    async def open(self, pid: int) -> OpenFolder:
        point = await look(self.tree, self.generation)
        entries: list[tuple[str, Node]] = [("checkpoint.xml", CheckpointXml(self.tree, self.base))]
        entries += await self._increments(point)
        return OpenFolder(entries, self.tree.job.lease(point, pid=0))

    async def _increments(self, point: Point) -> list[tuple[str, Node]]:
        listed = (await self.tree.checkpoints.get()).get(self.base.name)
        if listed is None or listed.identity != self.base.identity:
            raise NoSuchFile(self.path)  # deleted since this folder was looked up
        found = await point.bases.get(listed)
        check_generation(self.tree, self.generation)  # the point may have ended meanwhile
        return [
            (
                name,
                PointImage(
                    self.tree, point, f"{self.path}/{name}", one.target, one.image, point.instant, base=self.base
                ),
            )
            for name, one in found.images.items()
        ]


@dataclass(frozen=True, slots=True)
class CheckpointXml:
    """A checkpoint's definition, in the form that `virsh checkpoint-create --redefine` takes."""

    tree: Mounted
    base: Base

    @property
    def path(self) -> str:
        return f"/checkpoints/{self.base.name}/checkpoint.xml"

    @property
    def _data(self) -> bytes:
        xml = domainxml.strip_secrets(self.base.xml)
        return (PRUNED + xml if self.base.pruned else xml).encode()

    async def attributes(self) -> Attributes:
        return Attributes(len(self._data), self.base.checkpoint.creation_time)

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), "checkpoint": self.base.name, "from": str(self.base.instant)}

    async def open_file(self, pid: int) -> OpenFile:
        return OpenBytes(self._data, direct=True)
