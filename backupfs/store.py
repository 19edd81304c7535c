# SPDX-License-Identifier: GPL-3.0-or-later
"""The history on disk: a domain's records and its own checkpoints, in its state folder.

    /var/lib/backupfs/HOST-UUID/DOMAIN-UUID/history/
        vda-91b2….record     one for each disk and image path
        checkpoints          our own checkpoints, live and pruned, with their XML

A replica has the same domain UUID, and a disk's name is used again for another image; so a record
is the host's, the domain's, the disk's and the image path's, and says so inside. One writer,
which holds the lock of `state.open_state`.

What is atomic: one file. Each record is whole by itself, so a crash among several of them mixes
nothing: some disks then know of a point that was never served, the others of the one before.
The order makes the rest safe, and the caller keeps it:

    advance the instant ─► begin ─► write records ─► serve ─► mark as pruned ─► delete in libvirt

Killed before the records are written, the older checkpoints are all still there. Killed after
a checkpoint was marked, and before it was deleted: it is live, which is what counts, and pruned again.

Law: a file that is lost, damaged or in doubt is thrown away, with a line in the log. Then all counts
as changed. Pruned checkpoints have a file of their own, so they stay, without an increment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from backupfs.errors import StateFolderError
from backupfs.history import LARGEST_RECORD, Damaged, Record, decode, encode
from backupfs.lineage import Identity, Mark

log = logging.getLogger("backupfs.store")

FOLDER: Final = "history"
_CHECKPOINTS: Final = "checkpoints"
_SUFFIX: Final = ".record"
_FRESH: Final = ".new"


@dataclass(frozen=True, slots=True)
class OwnCheckpoint:
    """A checkpoint of ours: for libvirt, should it forget it, and as a base after it was pruned."""

    name: str
    creation_time: int
    mark: Mark
    xml: str
    pruned: bool = False

    @property
    def identity(self) -> Identity:
        """Return what tells it from all others."""
        return Identity(self.name, self.creation_time, self.mark)


@dataclass(eq=False)
class Store:
    """One domain's history. Made by `open_store`."""

    folder: Path
    owner: str
    _own: dict[str, OwnCheckpoint] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Mapping[str, OwnCheckpoint]:
        """Our own checkpoints by name, live and pruned; one that is live in libvirt is not pruned."""
        return MappingProxyType(self._own)

    def load(self, disk: str, path: str) -> Record | None:
        """Return what is known of *disk* on the image *path*; None: nothing, or nothing that can be trusted."""
        name = _file_name(disk, path)
        contents = self._read(name)
        if contents is None:
            return None
        try:
            record = decode(contents, self.owner)
            if (record.disk, record.path) != (disk, path):
                raise Damaged(f"it was written for {record.disk} on {record.path}")
        except Damaged as error:
            log.warning("%s: %s; it is thrown away, all of %s counts as changed", self.folder / name, error, disk)
            self._remove([name])
            return None
        return record

    def save(self, records: Collection[Record]) -> None:
        """Write the records of a point, durably; only then may it be served, or a checkpoint be pruned.

        What was known of these disks on other images goes first: by the time such an image comes
        back, it is no longer known who wrote to it.
        """
        names = {_file_name(record.disk, record.path): record for record in records}
        disks = tuple(_file_name(record.disk, None) for record in records)
        stale = [name for name in self._list() if name.startswith(disks) and name not in names]
        if stale:
            self._remove(stale)
        for name, record in names.items():
            self._write(name, encode(record, self.owner))

    def keep(self, checkpoint: OwnCheckpoint) -> None:
        """Note a checkpoint of ours, durably."""
        self._write_checkpoints({**self._own, checkpoint.name: checkpoint})

    def mark_pruned(self, name: str) -> None:
        """Note that a checkpoint of ours is about to be pruned; its directory stays."""
        self._write_checkpoints({**self._own, name: replace(self._own[name], pruned=True)})

    def drop(self, name: str) -> None:
        """Forget a checkpoint: it was deleted by somebody's wish."""
        self._write_checkpoints({key: one for key, one in self._own.items() if key != name})

    def forget(self) -> None:
        """Throw all of the history away."""
        self._remove(self._list())
        self._own = {}

    # --- files -----------------------------------------------------------------------------------

    def _write_checkpoints(self, own: dict[str, OwnCheckpoint]) -> None:
        body = json.dumps({"owner": self.owner, "checkpoints": [asdict(one) for one in own.values()]}).encode()
        self._write(_CHECKPOINTS, b"%08x " % zlib.crc32(body) + body)
        self._own = own

    def _load_checkpoints(self) -> None:
        contents = self._read(_CHECKPOINTS)
        if contents is None:
            return
        try:
            self._own = {one.name: one for one in _parse_checkpoints(contents, self.owner)}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            path = self.folder / _CHECKPOINTS
            log.warning("%s is damaged: %s; checkpoints that were pruned are forgotten", path, error)
            self._remove([_CHECKPOINTS])

    def _list(self) -> list[str]:
        with _errors(self.folder, "list it"):
            return sorted(os.listdir(self.folder))

    def _read(self, name: str) -> bytes | None:
        with _errors(self.folder, f"read {name}"):
            try:
                with open(self.folder / name, "rb") as file:
                    return file.read(LARGEST_RECORD)
            except FileNotFoundError:
                return None

    def _write(self, name: str, contents: bytes) -> None:
        fresh = self.folder / (name + _FRESH)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with _errors(self.folder, f"write {name}"):
            with open(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(contents)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, self.folder / name)
            self._sync()

    def _remove(self, names: Collection[str]) -> None:
        with _errors(self.folder, "remove what is thrown away"):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.folder / name)
            self._sync()

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors(folder: Path, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateFolderError(str(folder), f"cannot {action}: {error.strerror}") from error


def _file_name(disk: str, path: str | None) -> str:
    """Return the name of a record's file; without *path*, how those of the disk all begin.

    The disk's name stands there for people, as far as it can, and in the digest for sure.
    """
    readable = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in disk[:20])
    prefix = f"{readable}-{hashlib.sha256(disk.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}-"
    if path is None:
        return prefix
    return prefix + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16] + _SUFFIX


def _parse_checkpoints(contents: bytes, owner: str) -> list[OwnCheckpoint]:
    checksum, _, body = contents.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    value = json.loads(body)
    if value["owner"] != owner:
        raise ValueError(f"it was written for {value['owner']}")
    return [
        OwnCheckpoint(
            name=one["name"],
            creation_time=one["creation_time"],
            mark=Mark(one["mark"]["instant"], one["mark"]["nonce"]),
            xml=one["xml"],
            pruned=one["pruned"],
        )
        for one in value["checkpoints"]
    ]


def open_store(state_folder: Path, host_uuid: str, domain_uuid: str) -> Store:
    """Return the history in a domain's *state_folder*, whose lock the caller holds. Raises StateFolderError."""
    folder = state_folder / FOLDER
    with _errors(folder, "make it"):
        folder.mkdir(mode=0o700, exist_ok=True)
    store = Store(folder, f"{host_uuid}/{domain_uuid}")
    # What a kill left half written.
    store._remove([name for name in store._list() if name.endswith(_FRESH)])
    store._load_checkpoints()
    return store
