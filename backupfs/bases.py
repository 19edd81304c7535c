# SPDX-License-Identifier: GPL-3.0-or-later
"""The increments of a point in time: what changed since each checkpoint, as files.

    checkpoints/monday/   vda.inc.qcow2       over the file that was copied at monday's point
                          vda.extents.json    the same as a list

    live at the point     its bitmaps, as read when the point began
    pruned, of ours       the labels that are newer than its instant
    younger than the point, or the one it was made with          none

The files of a base are made when somebody first looks at them, in a thread meanwhile others are served.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from backupfs import qcow2
from backupfs.changes import Changes
from backupfs.checkpoints import Base
from backupfs.diskmap import DiskMap
from backupfs.domainxml import Reason
from backupfs.errors import BaseForgotten
from backupfs.extentsjson import render_extents
from backupfs.image import Image, RawImage
from backupfs.lineage import Identity
from backupfs.options import BackingName
from backupfs.origin import Origin
from backupfs.qcow2layout import TooLarge
from backupfs.tracking import Concluded

S = TypeVar("S")

YOUNGER: Final = Reason("it is younger than the point in time", "begin another point in time")
FORGOTTEN: Final = Reason(
    "it was pruned, and what has changed since is not known any more", "rmdir it, and make a full copy"
)
NOT_IN_IT: Final = Reason("the disk is not in this checkpoint", "make a new checkpoint")


@dataclass(frozen=True, slots=True)
class Increment(Generic[S]):
    """What changed on a disk since a checkpoint, in some form."""

    target: str
    image: Image[S]


@dataclass(frozen=True, slots=True)
class Increments(Generic[S]):
    """What the directory of one checkpoint shows of the point, by the files' names."""

    images: Mapping[str, Increment[S]]
    left_out: Mapping[str, Reason]  # by target


@dataclass(eq=False)
class Bases(Generic[S]):
    """The bases of one point: of its *disks* and their *maps* by target."""

    domain: str
    uuid: str
    instant: int
    backing: BackingName
    disks: Mapping[str, RawImage[S]]
    maps: Mapping[str, DiskMap]
    why_not: Mapping[str, Reason]  # of the disks that can hold no bitmap
    concluded: Concluded
    _made: dict[tuple[Identity, bool], Increments[S]] = field(default_factory=dict)
    _names: dict[str, Increments[S]] = field(default_factory=dict)
    _making: trio.Lock = field(default_factory=trio.Lock)

    async def get(self, base: Base) -> Increments[S]:
        """Return what there is since *base*, as it is listed now; raise BaseForgotten, ValueError."""
        async with self._making:
            key = base.identity, base.pruned
            if key not in self._made:
                self._made[key] = await trio.to_thread.run_sync(self._make, base)
            found = self._names[base.name] = self._made[key]
            if base.pruned and not found.images and FORGOTTEN in found.left_out.values():
                raise BaseForgotten(self.domain, base.name)
            return found

    @property
    def left_out(self) -> dict[str, Reason]:
        """What there is no increment of, and why."""
        found = {
            f"checkpoints/{name}/{disk}": reason
            for disk, one in self.concluded.disks.items()
            for name, reason in one.left_out.items()
        }
        for name, made in self._names.items():
            found.update((f"checkpoints/{name}/{target}", reason) for target, reason in made.left_out.items())
        return found

    def _make(self, base: Base) -> Increments[S]:
        images: dict[str, Increment[S]] = {}
        left_out: dict[str, Reason] = {}
        for target, disk in self.disks.items():
            changed = self._changed(base, target)
            if isinstance(changed, Reason):
                left_out[target] = changed
                continue
            zeros = self.maps[target].first  # never changes; what it does not know is data
            dirty = changed.to_extents()
            origin = Origin(self.domain, self.uuid, target, self.instant, base.instant, base.name)
            backing = qcow2.Backing(self.backing.name(target, base.name), self.backing.format)
            try:
                images[f"{target}.inc.qcow2"] = Increment(
                    target, qcow2.increment(disk.source, zeros, dirty, origin, backing)
                )
            except TooLarge as error:
                left_out[f"{target}.inc.qcow2"] = Reason(str(error), f"copy raw/{target}.raw")
            images[f"{target}.extents.json"] = Increment(target, render_extents(zeros, dirty, origin))
        return Increments(images, left_out)

    def _changed(self, base: Base, target: str) -> Changes | Reason:
        """Return what changed on a disk since *base*, or why that is not known."""
        if target not in base.checkpoint.disks:
            return self.why_not.get(target, NOT_IN_IT)
        conclusion = self.concluded.disks[target]
        then = self.concluded.live.get(base.name)
        if then is not None and then.identity == base.identity:
            if base.name in conclusion.increments:
                return conclusion.increments[base.name]
            if base.name in conclusion.left_out and not base.pruned:
                return conclusion.left_out[base.name]
        if not base.pruned:
            return YOUNGER
        mark = base.identity.mark
        changed = None if mark is None else conclusion.record.changed_since(mark.instant)
        return FORGOTTEN if changed is None else changed
