# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms of a point in time: what its folders show. Each is complete by itself for a restore.

    raw/      domain.xml  nvram.fd  vda.raw   …   whole disks, byte for byte

A form is made when somebody first looks into it, for a large map takes a second or two; in a
thread meanwhile others are served. What of it cannot be served is left out, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from backupfs.domainxml import Reason
from backupfs.image import Image, RawImage

S = TypeVar("S")

FORMS: Final = ("raw",)  # a folder's name, its images' suffix, and their format in libvirt's words


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
    """The forms of one point: of its *disks* by target, its *definition*, and *files* besides."""

    domain: str
    uuid: str
    instant: int
    definition: str
    files: Mapping[str, bytes]
    disks: Mapping[str, RawImage[S]]
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
            images[f"{target}.{name}"] = DiskImage(target, disk)
        return Form({"domain.xml": self.definition.encode(), **self.files}, images, left_out)
