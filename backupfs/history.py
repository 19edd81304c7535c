# SPDX-License-Identifier: GPL-3.0-or-later
"""What is known of a disk from its last point in time: the record, and its form in a file. Pure.

    Record ── instant   P, the label of that point
           ├─ labels    of each block, up to P
           ├─ since     the first point that labels tell of
           └─ seen      the checkpoints that existed at P, each with changed(c → P) as read then

    file     backupfs history 1 CRC-32, newline, zlib( length, header as JSON, arrays as they lie in memory )

A record is one disk's and whole by itself: nothing in it refers to another disk's, so after
a crash that left the records of two points side by side, each is still right for its disk.

Law: what cannot be read to the last bit is no record. Then everything counts as changed, which
costs a copy, not data.
"""

from __future__ import annotations

import json
import sys
import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from backupfs import changes as changes_module
from backupfs import labels as labels_module
from backupfs.changes import Changes
from backupfs.labels import Labels
from backupfs.lineage import Identity, Mark

MAGIC: Final = b"backupfs history 1 "
LARGEST_RECORD: Final = 2**27  # bytes, unpacked
MOST_CACHED_RUNS: Final = 2**20  # of all sets of a record together: 8 MB
_LENGTH_BYTES: Final = 4
_PIECE: Final = 2**20


class Damaged(ValueError):
    """The file is no record, or none for this disk."""


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """Tells a local image from another one at the same path: device, inode, birth time (ns; 0: not known)."""

    device: int
    inode: int
    birth: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A checkpoint that existed at the last point, settled, with a bitmap of the disk.

    *changed* is changed(checkpoint → P); None: not known. *void* is set, for good, where the disk
    was resized or its image replaced, maybe since the checkpoint (then it need not have been settled).
    """

    identity: Identity
    changed: Changes | None
    void: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One disk at its last point in time; *seen* is oldest first.

    Chunk files of another size than before are other files: all of them are as new as
    *chunk_floor*, when that size was first used.
    """

    disk: str
    path: str
    image: ImageIdentity | None
    size: int
    instant: int
    since: int
    labels: Labels
    seen: tuple[Seen, ...]
    chunk: int
    chunk_floor: int

    def chunk_label(self, start: int, stop: int) -> int:
        """Return the label of the chunk file of the bytes [start, stop)."""
        return max(self.chunk_floor, self.labels.newest_in(start, stop))

    def changed_since(self, instant: int) -> Changes | None:
        """Return what changed between our point *instant* and this one; None if that is not known.

        With it a pruned checkpoint of ours is still a base. Exact as far as labels are: where a
        label is younger than the change, it has too much, never too little.
        """
        return None if instant < self.since else self.labels.changed_since(instant)


def bounded(seen: Sequence[Seen], most: int = MOST_CACHED_RUNS) -> tuple[Seen, ...]:
    """Return *seen*, the sets of the oldest left out where all together have more than *most* runs.

    What is left out is read again at the next point. The newest decides about labels, so it
    stays in any case.
    """
    kept: list[Seen] = []
    for one in reversed(seen):
        if one.changed is not None and kept:
            most -= len(one.changed)
            if most < 0:
                one = Seen(one.identity, None, one.void)
        kept.append(one)
    return tuple(reversed(kept))


# --- the file ----------------------------------------------------------------------------------


def encode(record: Record, owner: str) -> bytes:
    """Return the file's contents; *owner* says whose disk it is (host and domain)."""
    arrays = [record.labels.starts, record.labels.values]
    seen: list[dict[str, Any]] = []
    for one in record.seen:
        mark = one.identity.mark
        seen.append(
            {
                "name": one.identity.name,
                "creation_time": one.identity.creation_time,
                "mark": None if mark is None else [mark.instant, mark.nonce],
                "void": one.void,
                "bounds": None if one.changed is None else len(one.changed.bounds),
            }
        )
        if one.changed is not None:
            arrays.append(one.changed.bounds)
    header = json.dumps(
        {
            "owner": owner,
            "disk": record.disk,
            "path": record.path,
            "image": None if record.image is None else [record.image.device, record.image.inode, record.image.birth],
            "size": record.size,
            "instant": record.instant,
            "since": record.since,
            "chunk": record.chunk,
            "chunk_floor": record.chunk_floor,
            "byteorder": sys.byteorder,
            "labels": [len(record.labels), record.labels.values.typecode],
            "seen": seen,
        }
    ).encode()
    packer = zlib.compressobj(1)
    parts = [packer.compress(len(header).to_bytes(_LENGTH_BYTES, "big") + header)]
    # As they lie in memory: they are read again on the host that wrote them.
    parts += [packer.compress(memoryview(each)) for each in arrays]
    parts.append(packer.flush())
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((MAGIC, b"%08x\n" % checksum, *parts))


def decode(contents: bytes, owner: str) -> Record:
    """Return the record that `encode` wrote for *owner*; raise Damaged for anything else."""
    try:
        return _record(_Unpacked(contents), owner)
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise Damaged(f"it is not whole: {error}") from None


class _Unpacked:
    """What was packed, piece by piece: never all of it beside the arrays that are made of it."""

    def __init__(self, contents: bytes) -> None:
        if not contents.startswith(MAGIC):
            raise Damaged("it is of another version, or no history")
        stop = contents.find(b"\n")
        body = memoryview(contents)[stop + 1 :]
        if contents[len(MAGIC) : stop] != b"%08x" % zlib.crc32(body):
            raise Damaged("its checksum is wrong")
        self._unpacker = zlib.decompressobj()
        self._packed: bytes | memoryview = body

    def read(self, length: int) -> bytes:
        """Return the next *length* bytes, at most a piece of them; raise Damaged where there are none."""
        found = self._unpacker.decompress(self._packed, min(length, _PIECE))
        self._packed = self._unpacker.unconsumed_tail
        if not found:
            raise Damaged("it is shorter than it says")
        return found

    def take(self, count: int, fresh: array[int]) -> array[int]:
        """Return *fresh*, filled with *count* numbers."""
        left = _number(count) * fresh.itemsize
        if left > LARGEST_RECORD:
            raise Damaged("it is longer than a record can be")
        unaligned = b""
        while left:
            found = self.read(left)
            left -= len(found)
            found = unaligned + found
            whole = len(found) - len(found) % fresh.itemsize
            fresh.frombytes(found[:whole])
            unaligned = found[whole:]
        return fresh

    def at_end(self) -> bool:
        """Whether all has been read."""
        return not self._unpacker.decompress(self._packed, 1) and self._unpacker.eof


def _record(unpacked: _Unpacked, owner: str) -> Record:
    text = unpacked.take(int.from_bytes(unpacked.take(_LENGTH_BYTES, array("B")), "big"), array("B"))
    header: Mapping[str, Any] = json.loads(text.tobytes())
    if header["owner"] != owner or header["byteorder"] != sys.byteorder:
        raise Damaged(f"it was written for {header['owner']}")
    size = _number(header["size"])
    count, typecode = header["labels"]
    labels = labels_module.from_runs(
        size,
        unpacked.take(count, changes_module.numbers(size)),
        unpacked.take(count, array(typecode)),
    )
    seen = []
    for one in header["seen"]:
        mark = None if one["mark"] is None else Mark(_number(one["mark"][0]), str(one["mark"][1]))
        identity = Identity(str(one["name"]), _number(one["creation_time"]), mark)
        changed = None
        if one["bounds"] is not None:
            changed = changes_module.from_bounds(size, unpacked.take(one["bounds"], changes_module.numbers(size)))
        seen.append(Seen(identity, changed, one["void"] is not False))
    record = Record(
        disk=str(header["disk"]),
        path=str(header["path"]),
        image=None if header["image"] is None else ImageIdentity(*map(_number, header["image"])),
        size=size,
        instant=_number(header["instant"]),
        since=_number(header["since"]),
        labels=labels,
        seen=tuple(seen),
        chunk=_number(header["chunk"]),
        chunk_floor=_number(header["chunk_floor"]),
    )
    if not unpacked.at_end() or not max(labels.newest, record.since, record.chunk_floor) <= record.instant:
        raise Damaged("it contradicts itself")
    return record


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise Damaged(f"{value!r} is no number that can stand there")
    return value
