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

Law: `PointFolder` carries the generation it was looked up with. When that is no longer the
job's, the folder belongs to a point that is over, and everything asked of it is `EIO`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from backupfs import domainxml
from backupfs.errors import BackupfsError, NoSuchFile, PointLost, PointOver
from backupfs.export import Export, resolve
from backupfs.forms import FORMS, Form
from backupfs.holders import Lease
from backupfs.image import Image
from backupfs.job import Job
from backupfs.nodes import Attributes, Buffer, Node, OpenBytes, OpenFile, OpenFolder
from backupfs.point import Point

T = TypeVar("T")

FRESH_SECONDS: Final = 1.0  # for so long an answer of libvirt's serves the stats that follow it
STAT_SECONDS: Final = 2.0  # a stat waits for libvirt no longer than that
POINT_VALID: Final = 3600.0  # nothing in a point changes; another point has another inode


@dataclass(eq=False)
class Fresh(Generic[T]):
    """A value that is asked for again when it is older than FRESH_SECONDS."""

    ask: Callable[[], Awaitable[T]]
    _value: T | None = None
    _asked: float = float("-inf")

    async def get(self) -> T:
        """Return the value, a second old at most; raise what asking raises."""
        if self._value is None or trio.current_time() - self._asked > FRESH_SECONDS:
            self._value = await self.ask()
            self._asked = trio.current_time()
        return self._value

    async def get_or_last(self, default: T) -> T:
        """Return the value, or the last known one where asking fails or takes long: for stat."""
        try:
            with trio.move_on_after(STAT_SECONDS):
                return await self.get()
        except BackupfsError:
            pass  # whoever opens the file is told
        # While libvirt is away not every stat of a listing shall wait for it anew.
        self._asked = trio.current_time()
        return default if self._value is None else self._value


@dataclass(eq=False)
class Tree:
    """What all nodes of one mounted domain share."""

    job: Job
    inner: Mapping[str, Callable[[], bytes]]  # name in .backupfs/ -> its contents now
    started: int
    xml: Fresh[str] = field(init=False)
    checkpoints: Fresh[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.xml = Fresh(self._shown_xml)
        self.checkpoints = Fresh(self._list_checkpoints)

    async def _shown_xml(self) -> str:
        return domainxml.strip_secrets(await self.job.domain.live_xml())

    async def _list_checkpoints(self) -> dict[str, str]:
        listed = await self.job.domain.checkpoints()
        return {name: xml for name, xml in listed.items() if domainxml.file_name(name) is not None}

    @property
    def now(self) -> int:
        """The time of what belongs to no point: the latest point's instant, or the mount's."""
        return max(self.started, self.job.point.instant if self.job.point else 0)

    def xattrs(self) -> dict[str, str]:
        """What every node tells of its origin."""
        domain = self.job.domain
        return {"domain": domain.name, "uuid": domain.uuid, "uri": domain.uri}


@dataclass(frozen=True, slots=True)
class Root:
    """The mount's root. Listing it begins nothing."""

    tree: Tree
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

    tree: Tree
    path: str = "/domain.xml"

    async def attributes(self) -> Attributes:
        xml = await self.tree.xml.get_or_last("")
        return Attributes(len(xml.encode()), self.tree.now)

    def xattrs(self) -> Mapping[str, str]:
        return self.tree.xattrs()

    async def open_file(self, pid: int) -> OpenFile:
        return OpenBytes((await self.tree.xml.get()).encode(), direct=True)


@dataclass(frozen=True, slots=True)
class PointFolder:
    """One form of the point in time, bound to the point by *generation*."""

    tree: Tree
    form: str
    generation: int

    @property
    def path(self) -> str:
        return f"/{self.form}"

    def _check(self) -> None:
        job = self.tree.job
        if self.generation != job.generation:
            job.touch_if_lost()
            raise PointOver(job.domain.name, job.record.last_instant)

    async def _look(self) -> tuple[Point, Form[Export]]:
        self._check()
        point = await self.tree.job.look()
        self._check()  # the wait may have been for the end of the one and the begin of the next
        form = await point.forms.get(self.form)
        self._check()  # the point may have ended while its form was made
        return point, form

    async def attributes(self) -> Attributes:
        self._check()
        point = self.tree.job.point
        time = point.instant if point is not None else self.tree.now
        return Attributes(0, time, links=2, generation=self.generation)

    def xattrs(self) -> Mapping[str, str]:
        point = self.tree.job.point
        if point is None or point.generation != self.generation:
            return self.tree.xattrs()
        return {**self.tree.xattrs(), **_instant(point)}

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
            entries.append((name, PointImage(self.tree, point, f"{self.path}/{name}", disk.target, disk.image)))
        return entries


def _instant(point: Point) -> dict[str, str]:
    told = {
        "instant": str(point.instant),
        "point": point.job_id,
        "quiesced": "yes" if point.quiesced.is_sure else "no",
    }
    if point.quiesced.frozen is not None:
        told["frozen"] = f"{point.quiesced.frozen * 1000:.0f}"  # ms
    return told


def _check_point(tree: Tree, point: Point) -> None:
    if point.lost is not None:
        tree.job.touch_if_lost()
        raise PointLost(point.domain, point.lost)
    if point.over:
        raise PointOver(point.domain, point.instant)


@dataclass(frozen=True, slots=True)
class PointFile:
    """A small file of the point in time."""

    tree: Tree
    point: Point
    path: str
    data: bytes

    async def attributes(self) -> Attributes:
        _check_point(self.tree, self.point)
        return Attributes(len(self.data), self.point.instant, generation=self.point.generation, valid=POINT_VALID)

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), **_instant(self.point)}

    async def open_file(self, pid: int) -> OpenFile:
        _check_point(self.tree, self.point)
        return OpenBytes(self.data, self.tree.job.lease(self.point, pid))


@dataclass(frozen=True, slots=True)
class PointImage:
    """A whole disk of the point in time, in one form."""

    tree: Tree
    point: Point
    path: str
    target: str
    image: Image[Export]

    async def attributes(self) -> Attributes:
        _check_point(self.tree, self.point)
        return Attributes(
            self.image.size,
            self.point.instant,
            allocated=self.image.allocated,
            generation=self.point.generation,
            valid=POINT_VALID,
        )

    def xattrs(self) -> Mapping[str, str]:
        return {**self.tree.xattrs(), **_instant(self.point), "disk": self.target}

    async def open_file(self, pid: int) -> OpenFile:
        _check_point(self.tree, self.point)
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


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Libvirt's checkpoints of the domain, as they are now: no event tells of them."""

    tree: Tree
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

    tree: Tree
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


@dataclass(frozen=True, slots=True)
class Inner:
    """What backupfs tells of itself."""

    tree: Tree
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

    tree: Tree
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
