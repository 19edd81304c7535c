# SPDX-License-Identifier: GPL-3.0-or-later
"""Ten thousand steps of history against disks that are plain bytearrays.

A world of two disks, their guest, libvirt, other people, and time. The world keeps QEMU's bitmaps as
QEMU does, and remembers all contents and who each checkpoint really is; backupfs is told only what
libvirt would tell. After every point: no change is missed, increments and labels are exactly
what the rules say, and no more than needed was read.

BACKUPFS_HISTORY_STEPS makes the run longer.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from backupfs.changes import BLOCK, Changes, from_extents
from backupfs.domainxml import Checkpoint, Reason
from backupfs.extents import DIRTY, Builder
from backupfs.history import Damaged, ImageIdentity, Record, decode, encode
from backupfs.increments import (
    DOUBTFUL,
    GONE,
    UNSETTLED,
    VOID,
    Conclusion,
    DiskNow,
    Plan,
    conclude,
    plan,
)
from backupfs.labels import Labels
from backupfs.lineage import Identity, Mark, identify, libvirt_clock, prunable, render_mark
from backupfs.state import next_instant

STEPS = int(os.environ.get("BACKUPFS_HISTORY_STEPS", "10000"))
SEEDS = 10
CELL = BLOCK // 4  # the granularity of the world's bitmaps; a byte of the model stands for so much
CELLS = 60
OWNER = "host/domain"
CHUNK = 4 * BLOCK


@dataclass
class Live:
    """A checkpoint as libvirt knows it, and who it really is."""

    checkpoint: Checkpoint
    incarnation: int


@dataclass
class Image:
    """An image file: its contents and the bitmaps inside. *real* says whose bitmap each is."""

    path: str
    identity: ImageIdentity
    cells: bytearray
    bitmaps: dict[str, bytearray]
    real: dict[str, int]
    broken: set[str] = field(default_factory=set)  # cannot be read; what they should say is still known

    @property
    def size(self) -> int:
        return len(self.cells) * CELL


def as_set(dirty: bytearray) -> Changes:
    builder = Builder(len(dirty) * CELL)
    for flag in dirty:
        builder.append(CELL, DIRTY if flag else 0)
    return from_extents(builder.finish())


def blocks_of(changes: Changes) -> set[int]:
    return {block for start, stop in changes for block in range(start // BLOCK, -(-stop // BLOCK))}


def per_block(labels: Labels) -> list[int]:
    return [labels.newest_in(start, min(start + BLOCK, labels.size)) for start in range(0, labels.size, BLOCK)]


@dataclass
class Known:
    """What the test itself remembers of a disk's last recorded point."""

    path: str
    size: int
    instant: int
    labels: list[int]
    existed: set[int]  # incarnations of which the increment was known
    void: set[str]  # names that may be from before a resize, or an image put back
    doubtful: bool = False  # something was done to the disk that must, or may, cost all labels


class Interrupted(Exception):
    """The process was killed."""


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = itertools.count(1)
        self.clock = 1_000_000.0  # libvirtd's
        self.offset = 0.0  # ours is ahead by so much
        self.local = True
        self.last_instant = 0
        self.live: dict[str, Live] = {}
        self.newest: str | None = None
        self.linear = True  # parents tell the order of all
        self.images = {
            disk: Image(f"/{disk}.qcow2", self.new_identity(), bytearray(CELLS - tail), {}, {})
            for disk, tail in (("vda", 0), ("vdb", 2))
        }
        self.sizes = {len(image.cells) for image in self.images.values()}
        self.copies: list[tuple[str, Image]] = []
        self.files: dict[str, bytes] = {}
        self.known: dict[str, Known] = {}
        self.at_point: dict[tuple[str, str], dict[int, bytes]] = {}  # contents of points, by disk and path
        self.at_checkpoint: dict[int, dict[str, tuple[str, bytes]]] = {}  # by incarnation and disk
        self.own: dict[str, Identity] = {}
        self.pruned: dict[str, Mark] = {}
        self.served = self.refused = self.short_jobs = self.doubts = self.bases = 0

    def new_identity(self) -> ImageIdentity:
        return ImageIdentity(1, next(self.numbers), next(self.numbers))

    # --- the guest and its administrators ------------------------------------------------------

    def pick(self) -> Image:
        return self.images[self.random.choice(sorted(self.images))]

    def write(self) -> None:
        image = self.pick()
        length = self.random.choice((1, 1, 2, 7))
        start = self.random.randrange(len(image.cells))
        kind = self.random.choice(("write", "write", "zero", "discard"))
        for cell in range(start, min(start + length, len(image.cells))):
            image.cells[cell] = self.random.randrange(1, 256) if kind == "write" else 0
            for dirty in image.bitmaps.values():
                dirty[cell] = 1

    def tick(self) -> None:
        self.clock += self.random.choice((0.01, 0.3, 0.9, 2.5, 60))

    def step_clock(self) -> None:
        self.offset = self.random.choice((0.0, -3600.0, 3600.0, 0.4))
        self.local = self.offset == 0.0 and self.random.random() < 0.8

    def create(self, name: str, description: str = "", disks: tuple[str, ...] | None = None) -> None:
        incarnation = next(self.numbers)
        if disks is None:
            disks = self.random.choice((("vda", "vdb"), ("vda", "vdb"), ("vda",), ("vdb",)))
        self.live[name] = Live(Checkpoint(name, int(self.clock), self.newest, description, disks), incarnation)
        self.newest = name
        for disk in disks:
            image = self.images[disk]
            image.bitmaps[name] = bytearray(len(image.cells))
            image.broken.discard(name)
            image.real[name] = incarnation
        self.at_checkpoint[incarnation] = {
            disk: (image.path, bytes(image.cells)) for disk, image in self.images.items()
        }

    def delete(self, name: str) -> None:
        gone = self.live.pop(name)
        for other in self.live.values():
            if other.checkpoint.parent == name:
                other.checkpoint = replace(other.checkpoint, parent=gone.checkpoint.parent)
        if self.newest == name:
            self.newest = gone.checkpoint.parent
        for image in self.images.values():
            image.bitmaps.pop(name, None)

    def any_live(self) -> str | None:
        return self.random.choice(sorted(self.live)) if self.live else None

    def foreign_or_new(self) -> None:
        name = f"foreign{self.random.randrange(6)}"
        if name not in self.live and len(self.live) < 6:
            self.create(name)

    def remove(self) -> None:
        if (name := self.any_live()) is not None:
            self.delete(name)

    def remake(self) -> None:
        """Delete a foreign checkpoint and make one of that name, again and again in the same second."""
        names = [name for name in sorted(self.live) if name.startswith("foreign")]
        if names:
            name = self.random.choice(names)
            for _ in range(self.random.randrange(1, 3)):
                self.delete(name)
                self.write()
                self.create(name)

    def redefine(self) -> None:
        """Change what libvirt says of a checkpoint; its bitmap stays."""
        if (name := self.any_live()) is not None:
            one = self.live[name]
            facts = one.checkpoint
            match self.random.randrange(3):
                case 0:
                    facts = replace(facts, creation_time=self.random.randrange(2_000_000))
                case 1:
                    facts = replace(facts, description=self.random.choice(("", "mine", facts.description + " ")))
                case 2:
                    facts = replace(facts, parent=None)
                    self.linear = False
            if identify(facts) != identify(one.checkpoint):  # nobody can tell whose bitmap it is
                was, one.incarnation = one.incarnation, next(self.numbers)
                self.at_checkpoint[one.incarnation] = self.at_checkpoint[was]
                for image in (*self.images.values(), *(image for _, image in self.copies)):
                    image.real = {key: one.incarnation if real == was else real for key, real in image.real.items()}
            one.checkpoint = facts

    def break_bitmap(self) -> None:
        image = self.pick()
        if image.bitmaps:
            image.broken.add(self.random.choice(sorted(image.bitmaps)))

    def resize(self) -> None:
        disk = self.random.choice(sorted(self.images))
        image = self.images[disk]
        # Back to a size that it had before: if no point was in between, nothing can tell.
        size = self.random.choice(sorted(set(range(40, 200)) - self.sizes))
        self.sizes.add(size)
        for plain in (image.cells, *image.bitmaps.values()):
            plain[size:] = b""
            plain.extend(bytes(max(0, size - len(plain))))
        if disk in self.known:
            self.known[disk].doubtful = True

    def copy_image(self) -> None:
        disk = self.random.choice(sorted(self.images))
        self.copies.append((disk, copy.deepcopy(self.images[disk])))

    def put_back(self) -> None:
        """The guest is off for a moment, and an older image put in the place of the disk's."""
        if not self.copies:
            return
        disk, image = self.copies.pop(self.random.randrange(len(self.copies)))
        now = self.images[disk]
        image = replace(copy.deepcopy(image), path=now.path)
        # Copied over the file, nothing but its bitmaps can tell. One of another checkpoint by the same
        # name would pass for the right one: that must be seen by the file.
        same = all(self.live[name].incarnation == image.real[name] for name in image.bitmaps if name in self.live)
        if not same or len(image.cells) != len(now.cells) or self.random.random() < 0.4:
            image.identity = self.new_identity()
        else:
            image.identity = now.identity
        self.images[disk] = image
        if disk in self.known and self.known[disk].path == image.path:
            self.known[disk].doubtful = True
        else:
            self.drop_aliens(image)

    def move_image(self) -> None:
        """A block job moves the disk to another path, bitmaps and all."""
        image = self.pick()
        self.drop_aliens(image)
        image.path = self.random.choice(("/a", "/b")) + f"/{next(self.numbers)}.qcow2"
        image.identity = self.new_identity()

    def drop_aliens(self, image: Image) -> None:
        """Take out of an image put back what only the history would know to be of other checkpoints."""
        for name in list(image.bitmaps):
            if name in self.live and self.live[name].incarnation != image.real[name]:
                del image.bitmaps[name]

    def lose_state(self) -> None:
        if not self.files:
            return
        disk = self.random.choice(sorted(self.files))
        if self.random.random() < 0.5:
            del self.files[disk]
        else:
            damaged = bytearray(self.files[disk])
            damaged[self.random.randrange(len(damaged))] ^= 1 << self.random.randrange(8)
            self.files[disk] = bytes(damaged)
            with pytest.raises(Damaged):
                decode(self.files[disk], OWNER)
            del self.files[disk]
        self.known.pop(disk, None)
        self.drop_aliens(self.images[disk])

    def prune(self) -> None:
        listed = [one.checkpoint for one in self.live.values()]
        for name in prunable(listed, self.random.choice((0, 1, 1, 2))):
            identity = identify(self.live[name].checkpoint)
            assert identity.mark is not None
            self.pruned[name] = identity.mark
            self.delete(name)

    def mischief(self) -> None:
        """What may happen while a point begins."""
        while self.random.random() < 0.3:
            self.random.choice((self.write, self.write, self.write, self.foreign_or_new, self.remake, self.tick))()

    # --- a point in time -------------------------------------------------------------------------

    def listing(self) -> list[Checkpoint]:
        listed = [one.checkpoint for one in self.live.values()]
        self.random.shuffle(listed)
        return listed

    def recall(self) -> dict[str, Record]:
        """As after a restart: nothing is known but what is in the files."""
        return {disk: decode(contents, OWNER) for disk, contents in self.files.items()}

    def readable(self, name: str, disk: str) -> bool:
        if name not in self.live or disk not in self.live[name].checkpoint.disks:
            return False
        return name in self.images[disk].bitmaps and name not in self.images[disk].broken

    def make_plan(self) -> tuple[Plan, list[Checkpoint], dict[tuple[str, str], Reason]]:
        """Plan as a caller does: whatever libvirt refuses is left out of the next attempt."""
        refused: dict[tuple[str, str], Reason] = {}
        while True:
            listed = self.listing()
            clock = libvirt_clock(self.own.values(), self.clock + self.offset if self.local else None)
            now = {disk: DiskNow(image.path, image.identity) for disk, image in self.images.items()}
            planned = plan(
                listed, now, self.recall(), clock=clock, unreadable=refused, trusted=tuple(self.own.values())
            )
            wanted = {(job.checkpoint, disk) for job in planned.short for disk in job.disks}
            wanted |= {(name, disk) for disk, name in planned.base.items()}
            missing = {key for key in wanted if not self.readable(*key)}
            if not missing:
                return planned, listed, refused
            refused |= dict.fromkeys(missing, Reason("its bitmap is inconsistent", "make a new checkpoint"))

    def point(self) -> None:
        planned, listed, refused = self.make_plan()
        believed = {one.name: self.live[one.name].incarnation for one in listed}
        clock = libvirt_clock(self.own.values(), self.clock if self.local else None)
        readings: dict[tuple[str, str], Changes | Reason] = {}
        for job in planned.short:
            self.mischief()
            for disk in job.disks:
                readings[job.checkpoint, disk] = self.read(job.checkpoint, disk)
        self.mischief()
        # The label is taken, and noted, before the job begins: the checkpoint carries it.
        instant = self.last_instant = next_instant(self.clock + self.offset, self.last_instant)
        contents = {disk: bytes(image.cells) for disk, image in self.images.items()}
        truth = {
            (disk, name): as_set(dirty) for disk, image in self.images.items() for name, dirty in image.bitmaps.items()
        }
        for disk, name in planned.base.items():
            readings[name, disk] = self.read(name, disk)
        mark = None
        if self.random.random() < 0.6:
            mark = Mark(instant, f"{next(self.numbers):032x}")
            name = f"own{next(self.numbers)}"
            self.create(name, render_mark(mark), ("vda", "vdb"))
            self.own[name] = identify(self.live[name].checkpoint)
        incarnations = {name: one.incarnation for name, one in self.live.items()}
        self.mischief()
        after = self.listing()
        concluded = conclude(
            planned,
            readings,
            after,
            {disk: len(plain) * CELL for disk, plain in contents.items()},
            instant=instant,
            chunk=CHUNK,
            made=mark,
        )
        killed = self.random.random() < 0.07
        trouble = bool(refused) or any(isinstance(found, Reason) for found in readings.values())
        for disk in sorted(concluded):
            if killed and self.random.random() < 0.6:
                break
            self.check(
                disk,
                concluded[disk],
                contents=contents[disk],
                truth=truth,
                believed=believed,
                incarnations=incarnations,
                listed={one.name: one for one in listed},
                after={one.name: one for one in after},
                clock=clock,
                made=None if mark is None else name,
                later={one.name for one in after if disk in one.disks},
                trouble=trouble,
            )
            self.files[disk] = encode(concluded[disk].record, OWNER)
        self.short_jobs += len(planned.short)
        self.served += 1
        if not killed:
            for disk, image in self.images.items():
                seen = self.at_point.setdefault((disk, image.path), {})
                seen[instant] = contents[disk]
                if len(seen) > 40:
                    del seen[self.random.choice(sorted(seen))]
            if self.random.random() < 0.6:
                self.prune()

    def read(self, name: str, disk: str) -> Changes | Reason:
        if not self.readable(name, disk) or self.random.random() < 0.01:
            return Reason("its bitmap is inconsistent", "make a new checkpoint")
        return as_set(self.images[disk].bitmaps[name])

    # --- what must hold --------------------------------------------------------------------------

    def check(
        self,
        disk: str,
        found: Conclusion,
        *,
        contents: bytes,
        truth: Mapping[tuple[str, str], Changes],
        believed: Mapping[str, int],
        incarnations: Mapping[str, int],
        listed: Mapping[str, Checkpoint],
        after: Mapping[str, Checkpoint],
        clock: float | None,
        made: str | None,
        later: set[str],
        trouble: bool,
    ) -> None:
        record, image = found.record, self.images[disk]
        instant, size = record.instant, len(contents) * CELL
        assert (record.size, record.labels.size, record.path) == (size, size, image.path)
        labels = per_block(record.labels)

        # 1. Nothing is missed, between this point and any earlier one of the same path.
        for earlier, then in self.at_point.get((disk, image.path), {}).items():
            since = record.changed_since(earlier)
            changed = None if since is None else blocks_of(since)
            for cell, byte in enumerate(contents):
                if cell >= len(then) or then[cell] != byte:
                    block = cell * CELL // BLOCK
                    assert labels[block] > earlier, f"{disk}: block {block} changed since {earlier}"
                    assert changed is None or block in changed

        # 2. Each increment is what QEMU's bitmap says, and on top of its base gives this state.
        for name, changes in found.increments.items():
            assert incarnations[name] == believed[name]
            path, base = self.at_checkpoint[incarnations[name]][disk]
            exact = truth[disk, name]
            assert changes.covers(exact)
            if self.linear:
                assert changes == exact, name
            if len(base) == len(contents) and path == image.path:
                restored = bytearray(base)
                for start, stop in changes:
                    restored[start // CELL : stop // CELL] = contents[start // CELL : stop // CELL]
                assert bytes(restored) == contents

        # 3. Labels are what the rules say: no older than they were, no newer than they must.
        known = self.known.get(disk)
        comparable = known is not None and known.path == image.path and known.size == size
        if known is not None and comparable:
            assert all(new >= old for new, old in zip(labels, known.labels, strict=True))
        witnesses = [name for name in found.increments if known is not None and incarnations[name] in known.existed]
        if known is not None and comparable and not known.doubtful and witnesses and self.linear:
            assert found.doubt is None
            least = min((blocks_of(found.increments[name]) for name in witnesses), key=len)
            expected = [instant if block in least else old for block, old in enumerate(known.labels)]
            assert labels == expected
        if found.doubt is not None:
            self.doubts += 1
            assert set(labels) == {instant}

        # 4. What has no increment has a reason, and the reason is true.
        void_now = known is not None and known.path == image.path and known.doubtful
        lost = [name for name, one in listed.items() if after.get(name) != one and disk in one.disks]
        for name in sorted(believed):
            one = listed[name]
            if disk not in one.disks or name in found.increments:
                continue
            reason = found.left_out[name]
            gone = name not in after or after[name] != one
            if reason is UNSETTLED:
                assert clock is None or one.creation_time + 2 > clock
                assert not any(believed[name] in each.existed for each in self.known.values()) or gone
            elif reason is GONE:
                assert gone
            elif reason is VOID:
                assert known is not None
                assert void_now or name in known.void
            elif reason is DOUBTFUL:
                assert found.doubt is not None or lost
            else:
                assert trouble or lost
        self.bases += bool(found.increments)
        existed = {incarnations[name] for name in found.increments}
        if made is not None:
            existed.add(incarnations[made])
        void = known.void & later if known is not None and known.path == image.path else set()
        if void_now and found.doubt is not None:
            void |= later
        self.known[disk] = Known(image.path, size, instant, labels, existed, void - {made})


DEEDS = (
    (World.write, 40),
    (World.tick, 14),
    (World.point, 24),
    (World.foreign_or_new, 7),
    (World.remove, 2),
    (World.remake, 3),
    (World.redefine, 0.5),
    (World.break_bitmap, 1),
    (World.resize, 0.7),
    (World.copy_image, 2),
    (World.put_back, 1),
    (World.move_image, 0.4),
    (World.lose_state, 0.7),
    (World.step_clock, 0.7),
)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_no_change_is_missed_and_none_invented(seed: int) -> None:
    world = World(seed)
    deeds, weights = [deed for deed, _ in DEEDS], [weight for _, weight in DEEDS]
    for deed in world.random.choices(deeds, weights, k=STEPS // SEEDS):
        if not world.live:
            world.linear = True
        deed(world)
    # The run has been where it should go.
    assert world.served > STEPS // SEEDS // 8
    assert world.bases > world.served // 3
    assert world.doubts < world.served
