# SPDX-License-Identifier: GPL-3.0-or-later
"""What changed since each checkpoint: which bitmaps to read, and what follows from them. Pure.

    c1 < c2 < … < cN  checkpoints      P  the last point, recorded      T  this point

    list ─► plan ─► short jobs, one for each base in it ─► the real job ─► list again ─► conclude
                    begin, read bitmaps, abort: at T' < T    at T, base cN

A job counts from one base on each disk. So the older bases are read in short jobs, and

    changed(ci → T) = changed(ci → T') ∪ changed(cN → T)       exact, for cN existed at T'

What was read at P need not be read again: T' may be P. Where cN did not exist at P (somebody made a
checkpoint since), one short job with the newest that did, cK, carries all from P over to T'.

Labels: a block outside changed(c → T), for a checkpoint c that existed at P, keeps its label; all
others get T.

Law, in this order:
1. No change is missed. A checkpoint counts as the one it was only by its identity, and only if that
   was settled; one that is not is left out. What it contained at P it must contain at T, else
   an older image was put back. That one's bitmaps may be of other checkpoints by the same names, so
   then, and where the image is another file or the disk was resized, all checkpoints but the one
   that this very point is made with are void for the disk, for good.
2. An increment is exact, wherever libvirt's parents tell which checkpoint is older.
3. No bitmap is read twice.

What nothing can tell, and is missed: an image file overwritten in place by a copy whose bitmap is of
an earlier checkpoint by the same name; a disk resized there and back between two points; the
newest checkpoint deleted, made again, and redefined with every one of its old facts.

The caller's part:

- `plan` before anything begins. A job that libvirt refuses because of a base: `plan` again with that
  base in *unreadable*. For `Plan.unsettled` it may wait two seconds, list and plan again with what stayed *trusted*.
- A checkpoint of our own to be made with this point: its mark carries T, so T is chosen, and noted
  as the latest instant durably, before the job begins.
- After the real job has begun: list again, `conclude`, write every `Conclusion.record` durably, only
  then serve T, and only then prune.
- A reading that failed is a `Reason`, never an empty set.
- Everything here is work of the processor, seconds of it for a million runs: call it in a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from backupfs.changes import Changes, nothing, union
from backupfs.domainxml import Checkpoint, Reason
from backupfs.history import ImageIdentity, Record, Seen, bounded
from backupfs.labels import uniform
from backupfs.lineage import Identity, Mark, ancestors, arrange, identify, is_settled

VOID: Final = Reason("the disk was resized or its image replaced, maybe since this checkpoint", "make a new checkpoint")
UNSETTLED: Final = Reason("it was made just now, and could be made again unnoticed", "begin another point in time")
GONE: Final = Reason("it was deleted or made again while the point in time began", "begin another point in time")
DOUBTFUL: Final = Reason("what was read of it earlier is in doubt now", "begin another point in time")
NOT_READ: Final = Reason("its bitmap was not read", "begin another point in time")
ITSELF: Final = Reason("the point in time was made with it: nothing has changed since", "begin another point in time")


@dataclass(frozen=True, slots=True)
class DiskNow:
    """A disk as it is before the job: what its record must agree with. *image* is None if it is not local."""

    path: str
    image: ImageIdentity | None


@dataclass(frozen=True, slots=True)
class Job:
    """A short job: read, on each of *disks*, the bitmap of *checkpoint*."""

    checkpoint: str
    disks: tuple[str, ...]


@dataclass(slots=True)
class _DiskPlan:
    """What is to be done about one disk. Dictionaries are by name, oldest first."""

    now: DiskNow
    record: Record | None
    doubt: str | None
    replaced: bool = False
    candidates: dict[str, Identity] = field(default_factory=dict)
    existed: dict[str, Changes] = field(default_factory=dict)  # at P: changed(… → P)
    base: str | None = None
    bridge: str | None = None  # the newest that existed at P: carries `extended` over
    extended: tuple[str, ...] = ()
    ordered: frozenset[str] = frozenset()  # the base, and what libvirt's parents say is older
    left_out: dict[str, Reason] = field(default_factory=dict)

    def seen(self, identity: Identity) -> Seen | None:
        """Return what is known of a checkpoint from the last point."""
        known = () if self.record is None else self.record.seen
        return next((one for one in known if one.identity == identity), None)

    def void_names(self) -> set[str]:
        """Return the names whose bitmaps are void; by name, for a redefinition changes the identity."""
        return set() if self.record is None else {one.identity.name for one in self.record.seen if one.void}

    def short(self) -> tuple[str, ...]:
        """Return the checkpoints that need a short job."""
        return tuple(name for name in self.candidates if name not in self.extended and name != self.base)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to read: *short* jobs in this order, then the real job with *base* on each disk that has one."""

    short: tuple[Job, ...]
    base: Mapping[str, str]
    unsettled: tuple[str, ...]
    _disks: Mapping[str, _DiskPlan]


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What is known of one disk at T.

    *increments* are changed(checkpoint → T) by name, *left_out* says why others have none, *doubt*
    why all of the disk has the label T (None: it has not). *record* is to be written.
    """

    increments: Mapping[str, Changes]
    left_out: Mapping[str, Reason]
    doubt: str | None
    record: Record


# --- before the job ------------------------------------------------------------------------------


def plan(
    live: Sequence[Checkpoint],
    disks: Mapping[str, DiskNow],
    records: Mapping[str, Record],
    *,
    clock: float | None,
    unreadable: Mapping[tuple[str, str], Reason] | None = None,
    trusted: Collection[Identity] = (),
) -> Plan:
    """Decide which bitmaps to read, given the checkpoints that libvirt lists (in any order).

    *records* are of the last points, by disk, where there are any. *clock* is libvirtd's
    (`lineage.libvirt_clock`) when it listed them; *trusted* are known to be settled: made by us,
    as the store says, or listed the same two seconds before. *unreadable* says why the bitmap
    of (checkpoint, disk) cannot be had.
    """
    arranged = arrange(live)
    older = ancestors(live)
    unreadable = unreadable or {}
    # Once settled, settled for good, on whatever disk it was seen.
    settled = {
        *trusted,
        *(one.identity for record in records.values() for one in record.seen if not one.void),
    }
    plans = {disk: _recall(records.get(disk), now) for disk, now in disks.items()}
    unsettled: dict[str, None] = {}
    for disk, known in plans.items():
        for checkpoint in arranged:
            name, identity = checkpoint.name, identify(checkpoint)
            if disk not in checkpoint.disks:
                continue
            seen = known.seen(identity)
            if known.replaced or name in known.void_names():
                known.left_out[name] = VOID
            elif identity not in settled and not is_settled(identity, clock):
                known.left_out[name] = UNSETTLED
                unsettled[name] = None
            elif (name, disk) in unreadable:
                known.left_out[name] = unreadable[name, disk]
            else:
                known.candidates[name] = identity
                if seen is not None and seen.changed is not None:
                    known.existed[name] = seen.changed
        _forget_reversed(known, older)
        _choose(known, older)
    jobs = []
    for checkpoint in arranged:
        if needing := tuple(disk for disk, known in plans.items() if checkpoint.name in known.short()):
            jobs.append(Job(checkpoint.name, needing))
    bases = {disk: known.base for disk, known in plans.items() if known.base is not None}
    return Plan(tuple(jobs), bases, tuple(unsettled), plans)


def _recall(record: Record | None, now: DiskNow) -> _DiskPlan:
    """Take the record up, as far as it is of this image."""
    if record is None or record.path != now.path:
        return _DiskPlan(now, None, "nothing is known of it from an earlier point in time")
    if record.image != now.image:
        return _DiskPlan(now, record, "its image is another file than at the last point in time", replaced=True)
    return _DiskPlan(now, record, None)


def _forget_reversed(known: _DiskPlan, older: Mapping[str, frozenset[str]]) -> None:
    """Two checkpoints have changed places: one was made anew, then redefined with its old facts."""
    if known.record is None:
        return
    before = [one.identity.name for one in known.record.seen if one.identity.name in known.existed]
    for number, name in enumerate(before):
        for later in before[number + 1 :]:
            if later in older[name]:
                known.existed.pop(name, None)
                known.existed.pop(later, None)


def _choose(known: _DiskPlan, older: Mapping[str, frozenset[str]]) -> None:
    """Choose the base of the real job, and what is carried over from P."""
    known.base = next(reversed(known.candidates), None)
    if known.base is not None:
        known.ordered = older[known.base] | {known.base}
    known.bridge = next(reversed(known.existed), None)
    if known.bridge is not None:
        # Only what is older than the bridge: of a younger one, it has changes from before.
        known.extended = tuple(name for name in known.existed if name in older[known.bridge])


# --- after it has begun --------------------------------------------------------------------------


def conclude(
    plan: Plan,
    readings: Mapping[tuple[str, str], Changes | Reason],
    after: Sequence[Checkpoint],
    sizes: Mapping[str, int],
    *,
    instant: int,
    chunk: int,
    made: Mark | None = None,
) -> Mapping[str, Conclusion]:
    """Say what changed on each disk of *sizes*, given all that was read, by (checkpoint, disk).

    *after* are the checkpoints as listed after the real job began, *sizes* are those that it serves,
    *instant* is T, *chunk* the size of chunk files, *made* the mark of the checkpoint that was made
    with the job.
    """
    arranged = arrange(after)  # all of them: those without a disk link those with it
    return {
        disk: _conclude(
            plan._disks[disk],
            disk,
            {name: found for (name, of), found in readings.items() if of == disk},
            [one for one in arranged if disk in one.disks],
            size,
            instant=instant,
            chunk=chunk,
            made=made,
        )
        for disk, size in sizes.items()
    }


def _conclude(
    known: _DiskPlan,
    disk: str,
    readings: Mapping[str, Changes | Reason],
    after: Sequence[Checkpoint],
    size: int,
    *,
    instant: int,
    chunk: int,
    made: Mark | None,
) -> Conclusion:
    record = known.record
    left_out = dict(known.left_out)
    still = {identify(one) for one in after}
    read: dict[str, Changes] = {}
    for name, identity in known.candidates.items():
        found = readings.get(name, NOT_READ)
        if identity not in still:
            left_out[name] = GONE
        elif isinstance(found, Changes):
            read[name] = found
        elif name not in known.extended:
            left_out[name] = found

    doubt = known.doubt
    void = known.replaced
    if (reason := _find_replaced(known, read, size)) is not None:
        doubt, void = reason, True
    elif record is not None and record.instant >= instant and doubt is None:
        doubt = f"its last point in time, {record.instant}, is not before this one, {instant}"
    if void:
        left_out.update((name, VOID) for name in known.candidates if left_out.get(name) is not GONE)
    increments = _add_up(known, read, left_out, doubt)
    witness = next((name for name in reversed(known.existed) if name in increments), None)
    labels = uniform(size, instant)
    if doubt is None and witness is None:
        doubt = "no checkpoint of the last point in time is left to tell what has changed since"
    if record is not None and witness is not None and doubt is None:
        labels = record.labels.relabel(increments[witness], instant)

    seen = []
    for one in after:
        identity = identify(one)
        if identity.mark is not None and identity.mark == made:
            left_out[one.name] = ITSELF
            seen.append(Seen(identity, nothing(size)))
        elif void or one.name in known.void_names():
            seen.append(Seen(identity, None, void=True))
        elif one.name in increments:
            # Of one that may be younger than the base, it has changes from before: not to be built on.
            exact = one.name in known.ordered and (one.name not in known.extended or known.bridge in known.ordered)
            seen.append(Seen(identity, increments[one.name] if exact else None))
        elif known.candidates.get(one.name) == identity:
            seen.append(Seen(identity, None))  # settled, at least
    if record is not None and record.instant >= instant:
        record = None
    return Conclusion(
        increments,
        left_out,
        doubt,
        Record(
            disk=disk,
            path=known.now.path,
            image=known.now.image,
            size=size,
            instant=instant,
            since=instant if record is None else record.since,
            labels=labels,
            seen=bounded(seen),
            chunk=chunk,
            chunk_floor=instant if record is None or record.chunk != chunk else record.chunk_floor,
        ),
    )


def _find_replaced(known: _DiskPlan, read: Mapping[str, Changes], size: int) -> str | None:
    """Say by what the disk seems not to be the one that it was; None: nothing."""
    sizes = [found.size for found in read.values()] + ([] if known.record is None else [known.record.size])
    other = next((each for each in sizes if each != size), None)
    if other is not None:
        return f"it was resized from {other} to {size} bytes"
    for name, then in known.existed.items():
        if name in read and not read[name].covers(then):
            return f"changes since {name} are gone from its bitmap: an older image was put back, or {name} was remade"
    return None


def _add_up(
    known: _DiskPlan, read: Mapping[str, Changes], left_out: dict[str, Reason], doubt: str | None
) -> dict[str, Changes]:
    """Return changed(checkpoint → T) of all that have it; note why the others have not."""
    last = read.get(known.base or "")
    increments: dict[str, Changes] = {}
    for name in reversed(known.candidates):  # the bridge before what it carries
        if name in left_out:
            continue
        if last is None:
            left_out[name] = NOT_READ
        elif name == known.base:
            increments[name] = last
        elif name in read:
            increments[name] = union(read[name], last)
        elif doubt is None and known.bridge in increments:
            increments[name] = union(known.existed[name], increments[known.bridge])
        else:
            left_out[name] = DOUBTFUL
    return increments
