# SPDX-License-Identifier: GPL-3.0-or-later
"""A domain's checkpoints: those that libvirt lists, and those of ours that were pruned.

    made with a point ─► live ──keep=N──► pruned ──rmdir──► forgotten       ours, in the store
                          │  └──rmdir, or deleted by somebody──► forgotten
                          └──libvirt lost it──► redefined, if its bitmap is there

A pruned checkpoint is no longer libvirt's, and costs the guest nothing. It stays as a base: the history
tells what has changed since.

Law: what libvirt lists counts. Another's checkpoint is deleted by rmdir alone, never to make room.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from backupfs import domainxml
from backupfs.checkpointxml import name_checkpoint, render_checkpoint, render_redefinition, why_bad_name
from backupfs.domain import Domain
from backupfs.errors import (
    BackupfsError,
    BadCheckpointName,
    BadXml,
    CheckpointExists,
    CheckpointUnusable,
    LibvirtRefused,
    NoSuchFile,
)
from backupfs.lineage import Identity, Mark, identify, prunable, render_mark
from backupfs.store import OwnCheckpoint, Store

log = logging.getLogger("backupfs.checkpoints")


@dataclass(frozen=True, slots=True)
class Base:
    """A checkpoint that has a directory; *pruned*: libvirt has it no more."""

    checkpoint: domainxml.Checkpoint
    xml: str
    pruned: bool = False
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", identify(self.checkpoint))

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def instant(self) -> int:
        """From when changes count: for ours the label of its point, for another's libvirtd's clock."""
        return self.checkpoint.creation_time if self.identity.mark is None else self.identity.mark.instant


@dataclass(eq=False)
class Checkpoints:
    """The checkpoints of one mounted domain."""

    domain: Domain
    store: Store
    unreadable: dict[tuple[Identity, str], domainxml.Reason] = field(default_factory=dict)  # of a disk; they never heal

    async def live(self) -> dict[str, Base]:
        """Return what libvirt lists, by name."""
        listed = await self.domain.checkpoints()
        return {name: _base(name, xml) for name, xml in listed.items()}

    async def all(self) -> dict[str, Base]:
        """Return all that can have a directory, by name."""
        live = await self.live()
        pruned = {
            name: _base(name, own.xml, pruned=True)
            for name, own in self.store.checkpoints.items()
            if own.pruned and name not in live
        }
        return {name: base for name, base in {**live, **pruned}.items() if domainxml.file_name(name) is not None}

    def trusted(self) -> set[Identity]:
        """Return those that we know to have made."""
        return {own.identity for own in self.store.checkpoints.values()}

    # --- making ------------------------------------------------------------------------------

    async def check_name(self, name: str) -> None:
        """Raise BadCheckpointName or CheckpointExists unless a checkpoint can be made that is called so."""
        if (why := why_bad_name(name)) is not None:
            raise BadCheckpointName(self.domain.name, name, why)
        if name in await self.all():
            raise CheckpointExists(self.domain.name, name)

    async def name(self, template: str) -> str:
        """Return a name for the checkpoint of a point that begins now."""
        return name_checkpoint(template, time.time(), await self.all())

    def note_made(self, base: Base) -> None:
        """Note, durably, a checkpoint that libvirt lists and that we have made."""
        mark = base.identity.mark
        assert mark is not None
        self.store.keep(OwnCheckpoint(base.name, base.checkpoint.creation_time, mark, base.xml))

    # --- unmaking ----------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """Delete a checkpoint, whoever made it, or forget a pruned one; raise NoSuchFile, LibvirtRefused."""
        live = await self.live()
        if name not in live and name not in self.store.checkpoints:
            raise NoSuchFile(f"/checkpoints/{name}")
        if name in live:
            await self._delete(live[name])
            log.info("%s: checkpoint %s is deleted", self.domain.name, name)
        if name in self.store.checkpoints:
            self.store.drop(name)

    async def _delete(self, base: Base) -> None:
        try:
            await self.domain.delete_checkpoint(base.name)
        except CheckpointUnusable:
            pass  # somebody was quicker
        except LibvirtRefused:
            # Libvirt cannot delete one whose bitmap is gone, and does not say so by a code.
            if not await self._has_lost_bitmap(base):
                raise
            await self.domain.delete_checkpoint(base.name, metadata_only=True)

    async def _has_lost_bitmap(self, base: Base) -> bool:
        try:
            await self.domain.redefine_checkpoint(base.xml)
        except CheckpointUnusable:
            return True
        return False

    async def discard(self, mark: Mark) -> None:
        """Delete the checkpoint with this *mark*, if it was made, as well as that can be."""
        try:
            for name, base in (await self.live()).items():
                if base.identity.mark == mark:
                    await self.domain.delete_checkpoint(name)
                    if name in self.store.checkpoints:
                        self.store.drop(name)
        except BackupfsError as error:
            log.warning("%s: a checkpoint may be left over from a point that failed: %s", self.domain.name, error)

    async def prune(self, keep: int) -> None:
        """Delete our own beyond the newest *keep*. Call it when the records of the point are written."""
        live = await self.live()
        for name in prunable([base.checkpoint for base in live.values()], keep):
            own = self.store.checkpoints.get(name)
            if own is None or own.identity != live[name].identity:
                self.note_made(live[name])
            self.store.mark_pruned(name)
            try:
                await self._delete(live[name])
            except BackupfsError as error:
                log.warning("%s: cannot prune checkpoint %s: %s", self.domain.name, name, error)
            else:
                log.info("%s: checkpoint %s is pruned; its directory stays", self.domain.name, name)

    # --- what libvirt has lost ---------------------------------------------------------------

    async def redefine_lost(self) -> None:
        """Tell libvirt of those of ours that it has lost though their bitmaps are there; forget the others."""
        own = [one for one in self.store.checkpoints.values() if not one.pruned]
        live = set(await self.domain.checkpoints()) if own else set()
        newest: str | None = None
        for one in own:
            if one.name not in live:
                await self._redefine(one, live, newest)
            if one.name in live:
                newest = one.name

    async def _redefine(self, one: OwnCheckpoint, live: set[str], parent: str | None) -> None:
        try:
            await self.domain.redefine_checkpoint(render_redefinition(one.xml, live, parent))
        except (CheckpointUnusable, BadXml):
            log.info("%s: checkpoint %s was deleted by somebody; it is forgotten", self.domain.name, one.name)
            self.store.drop(one.name)
        except LibvirtRefused as error:
            log.warning("%s: checkpoint %s is lost to libvirt: %s", self.domain.name, one.name, error)
        else:
            log.info("%s: libvirt had lost checkpoint %s; it is redefined", self.domain.name, one.name)
            live.add(one.name)


def _base(name: str, xml: str, *, pruned: bool = False) -> Base:
    # The name that was looked at is the list's; what stands in the XML is not to become a path.
    return Base(replace(domainxml.parse_checkpoint(xml), name=name), xml, pruned)


def new_checkpoint(
    name: str, instant: int, disks: Collection[domainxml.Disk], why_not: Mapping[str, domainxml.Reason]
) -> tuple[Mark, str]:
    """Return the mark of a checkpoint to be made with the point *instant*, and its XML."""
    mark = Mark(instant, secrets.token_hex(16))
    tracked = [disk.target for disk in disks if disk.target not in why_not]
    return mark, render_checkpoint(name, render_mark(mark), disks, tracked)
