# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms of a point in time: what its folders show. Each is complete by itself for a restore.

    raw/      domain.xml  nvram.fd  vda.raw   …   whole disks, byte for byte
    qcow2/    domain.xml  nvram.fd  vda.qcow2 …   the same, only what is allocated

A form is made when somebody first looks into it, for a large map takes a second or two; in a
thread meanwhile others are served. What of it cannot be served is left out, with the reason: so is
the qcow2 file of a disk whose map is not known as a whole, for where its bytes lie hangs on all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from backupfs import qcow2
from backupfs.diskmap import DiskMap
from backupfs.domainxml import Reason
from backupfs.image import Image, RawImage
from backupfs.origin import Origin
from backupfs.qcow2layout import TooLarge
from backupfs.restorexml import render_restore

S = TypeVar("S")

FORMS: Final = ("raw", "qcow2")  # a folder's name, its images' suffix, and their format in libvirt's words


@dataclass(frozen=True, slots=True)
class DiskImage(Generic[S]):
    """A disk in some form."""

    target: str
    image: Image[S]


@dataclass(frozen=True, slots=True)
class Form(Generic[S]):
    """What one folder shows, by the files' names."""

    files: Mapping[str, bytes]
    images: Mapping[str, DiskImage[S]]
    left_out: Mapping[str, Reason] = field(default_factory=dict)


@dataclass(eq=False)
class Forms(Generic[S]):
    """The forms of one point: of its *disks* and their *maps* by target, its *definition*, and *files* besides."""

    domain: str
    uuid: str
    instant: int
    definition: str
    files: Mapping[str, bytes]
    disks: Mapping[str, RawImage[S]]
    maps: Mapping[str, DiskMap]
    _made: dict[str, Form[S]] = field(default_factory=dict)
    _making: trio.Lock = field(default_factory=trio.Lock)

    async def get(self, name: str) -> Form[S]:
        """Return a form; raise BadXml."""
        async with self._making:
            form = self._made.get(name)
            if form is None:
                form = self._made[name] = await trio.to_thread.run_sync(self._make, name)
            return form

    @property
    def left_out(self) -> dict[str, Reason]:
        """What could not be served in the forms that were looked at, and why."""
        return {name: reason for form in self._made.values() for name, reason in form.left_out.items()}

    def _make(self, name: str) -> Form[S]:
        images: dict[str, DiskImage[S]] = {}
        left_out: dict[str, Reason] = {}
        for target, disk in self.disks.items():
            try:
                images[f"{target}.{name}"] = DiskImage(target, disk if name == "raw" else self._qcow2(target, disk))
            except TooLarge as error:
                left_out[f"{target}.{name}"] = Reason(str(error), f"copy raw/{target}.raw")
        definition = render_restore(self.definition, self.disks, name)
        return Form({"domain.xml": definition.encode(), **self.files}, images, left_out)

    def _qcow2(self, target: str, disk: RawImage[S]) -> Image[S]:
        if not self.maps[target].is_whole:
            raise TooLarge("its map of what is allocated is too large to be known as a whole")
        origin = Origin(self.domain, self.uuid, target, self.instant)
        # `first` never changes, so another thread may walk it.
        return qcow2.whole(disk.source, self.maps[target].first, origin)
