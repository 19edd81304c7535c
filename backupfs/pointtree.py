# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes of the point in time: its forms' folders, and the files in them.

Law: a folder carries the generation it was looked up with. When that is no longer the
job's, the folder belongs to a point that is over, and everything asked of it is `EIO`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from backupfs.checkpoints import Base
from backupfs.errors import NoSuchFile, PointLost, PointOver
from backupfs.export import Export, resolve
from backupfs.forms import Form
from backupfs.holders import Lease
from backupfs.image import Image
from backupfs.mounted import Mounted
from backupfs.nodes import Attributes, Buffer, Node, OpenBytes, OpenFile, OpenFolder
from backupfs.point import Point

POINT_VALID: Final = 3600.0  # nothing in a point changes; another point has another inode


def check_generation(tree: Mounted, generation: int) -> None:
    """Raise PointOver unless the folder's point is the one of now, or the next to begin."""
    job = tree.job
    if generation != job.generation:
        job.touch_if_lost()
        raise PointOver(job.domain.name, job.record.last_instant)


async def look(tree: Mounted, generation: int) -> Point:
    """Look inside a folder that carries *generation*, which begins the point; raise PointOver if it is over."""
    check_generation(tree, generation)
    point = await tree.job.look()
    check_generation(tree, generation)  # the wait may have been for the end of the one and the begin of the next
    return point


@dataclass(frozen=True, slots=True)
class PointFolder:
    """One form of the point in time, bound to the point by *generation*."""

    tree: Mounted
    form: str
    generation: int

    @property
    def path(self) -> str:
        return f"/{self.form}"

    async def _look(self) -> tuple[Point, Form[Export]]:
        point = await look(self.tree, self.generation)
        form = await point.forms.get(self.form)
        check_generation(self.tree, self.generation)  # the point may have ended while its form was made
        return point, form

    async def attributes(self) -> Attributes:
        check_generation(self.tree, self.generation)
        point = self.tree.job.point
        time = point.instant if point is not None else self.tree.now
        return Attributes(0, time, links=2, generation=self.generation)

    def xattrs(self) -> Mapping[str, str]:
        point = self.tree.job.point
        if point is None or point.generation != self.generation:
            return self.tree.xattrs()
        return {**self.tree.xattrs(), **instant_xattrs(point)}

    async def child(self, name: str) -> Node:
        for entry, node in self._entries(*await self._look()):
            if entry == name:
                return node
        raise NoSuchFile(f"{self.path}/{name}")

    async def open(self, pid: int) -> OpenFolder:
        point, form = await self._look()
        # Not held by the process: a shell that completed a name would hold the point for its life.
        return OpenFolder(self._entries(point, form), self.tree.job.lease(point, pid=0))

    def _entries(self, point: Point, form: Form[Export]) -> list[tuple[str, Node]]:
        entries: list[tuple[str, Node]] = [
            (name, PointFile(self.tree, point, f"{self.path}/{name}", data)) for name, data in form.files.items()
        ]
        for name, disk in form.images.items():
            path, time = f"{self.path}/{name}", point.newest[disk.target]
            entries.append((name, PointImage(self.tree, point, path, disk.target, disk.image, time)))
        return entries


def instant_xattrs(point: Point) -> dict[str, str]:
    told = {
        "instant": str(point.instant),
        "point": point.job_id,
        "quiesced": "yes" if point.quiesced.is_sure else "no",
    }
    if point.quiesced.frozen is not None:
        told["frozen"] = f"{point.quiesced.frozen * 1000:.0f}"  # ms
    return told


def check_point(tree: Mounted, point: Point) -> None:
    if point.lost is not None:
        tree.job.touch_if_lost()
        raise PointLost(point.domain, point.lost)
    if point.over:
        raise PointOver(point.domain, point.instant)


@dataclass(frozen=True, slots=True)
class PointFile:
    """A small file of the point in time."""

    tree: Mounted
    point: Point
    path: str
    data: bytes

    async def attributes(self) -> Attributes:
        check_point(self.tree, self.point)
        return Attributes(len(self.data), self.point.instant, generation=self.point.generation, valid=POINT_VALID)

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), **instant_xattrs(self.point)}

    async def open_file(self, pid: int) -> OpenFile:
        check_point(self.tree, self.point)
        return OpenBytes(self.data, self.tree.job.lease(self.point, pid))


@dataclass(frozen=True, slots=True)
class PointImage:
    """A disk of the point in time in one form, whole or what changed in it; *time* is its label.

    Where it tells of a *base*, it is what changed since that instant.
    """

    tree: Mounted
    point: Point
    path: str
    target: str
    image: Image[Export]
    time: int
    base: Base | None = None

    async def attributes(self) -> Attributes:
        check_point(self.tree, self.point)
        return Attributes(
            self.image.size,
            self.time,
            allocated=self.image.allocated,
            generation=self.point.generation,
            valid=POINT_VALID,
        )

    def xattrs(self) -> Mapping[str, str]:
        told = {**self.tree.xattrs(), **instant_xattrs(self.point), "disk": self.target}
        if self.base is not None:
            told |= {"checkpoint": self.base.name, "from": str(self.base.instant), "to": str(self.point.instant)}
        return told

    async def open_file(self, pid: int) -> OpenFile:
        check_point(self.tree, self.point)
        return OpenImage(self.image, self.tree.job.lease(self.point, pid), self.tree.job.options.direct_io)


@dataclass(frozen=True, slots=True)
class OpenImage:
    """An open disk image."""

    image: Image[Export]
    lease: Lease
    direct: bool = False

    async def read(self, offset: int, length: int) -> Buffer:
        self.lease.check()
        return await resolve(self.image, offset, length)

    async def seek(self, offset: int, *, data: bool) -> int | None:
        self.lease.check()
        return await self.image.seek(offset, data=data)

    def close(self) -> None:
        self.lease.release()
