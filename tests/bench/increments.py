# SPDX-License-Identifier: GPL-3.0-or-later
"""What increments cost: bytes and time beside the whole copy, and the begin with many checkpoints.

thin 64 GiB   |#······#······#······#···|   1 GiB of data in pieces of 1 MiB
changed       |#····················#···|   one piece of a hundred, written again
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lab import Disk, Guest, open_guest

from tests.bench import meters
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.images import GIB, MIB, iter_pieces, make_dense, make_thin
from tests.bench.meters import MB
from tests.bench.rivals import Backupfs, open_backupfs
from tests.bench.stage import Bench, Groups, Stage

CHECKPOINTS: Final = 30
PER_CHECKPOINT: Final = 150.0  # ms
STEADY: Final = 500.0  # ms


@dataclass(eq=False)
class Increments:
    """The stage: a mount whose point knows what changed since `base`."""

    ours: Backupfs
    copies: Path

    @property
    def increment(self) -> Path:
        return self.ours.path / "checkpoints/base/vda.inc.qcow2"

    @property
    def whole(self) -> Path:
        return self.ours.path / "qcow2/vda.qcow2"

    def copy(self, source: Path) -> float:
        """Copy a file into memory; return how many seconds that took."""
        copy = self.copies / "copy"
        meters.forget(source)
        try:
            return meters.seconds(f"cp {source} {copy}")
        finally:
            copy.unlink(missing_ok=True)

    def costs(self) -> list[Figure]:
        """Compare an increment of 1 % of the data with the whole."""
        return [
            Figure("increment-bytes", "the whole", "MB", lambda: self.whole.stat().st_size / MB),
            Figure(
                "increment-bytes",
                "1 % changed",
                "MB",
                lambda: self.increment.stat().st_size / MB,
                (at_most(0.015, "the whole"),),
            ),
        ]

    def times(self) -> list[Figure]:
        return [
            Figure("increment-time", "the whole", "s", lambda: self.copy(self.whole)),
            Figure(
                "increment-time", "1 % changed", "s", lambda: self.copy(self.increment), (at_most(0.05, "the whole"),)
            ),
        ]

    def reads(self) -> list[Figure]:
        """Compare reading the dense disk in both forms."""

        def speed(path: Path) -> float:
            meters.forget(path)
            return path.stat().st_size / meters.seconds(f"dd if={path} of=/dev/null bs=1M status=none") / MB

        dense = self.ours.path / "qcow2/vdb.qcow2"
        return [
            Figure("qcow2-reads", "raw", "MB/s", lambda: speed(self.ours.image("vdb"))),
            Figure("qcow2-reads", "qcow2", "MB/s", lambda: speed(dense), (at_least(0.8, "raw"),)),
        ]


@dataclass(eq=False)
class Begins:
    """The stage: a guest with 30 checkpoints, of which a mount with a state of its own knows nothing."""

    bench: Bench
    guest: Guest
    _counts: Iterator[int] = field(default_factory=itertools.count)

    def begins(self) -> list[Figure]:
        """Begin with 30 older checkpoints, for the first time, with a state of its own, and then again."""

        def begin(times: int) -> float:
            folder = self.bench.folder / f"state{next(self._counts)}"
            folder.mkdir()
            with open_backupfs(folder, self.guest, "idle=0") as fresh:
                fresh.image().stat()
                took = fresh.took()
                for _ in range(times - 1):
                    took = fresh.begin()
                return took * 1000

        return [
            Figure("begin-30", "first, for each", "ms", lambda: begin(1) / CHECKPOINTS, (at_most(PER_CHECKPOINT),)),
            Figure("begin-30", "steady", "ms", lambda: begin(2), (at_most(STEADY),)),
        ]


@contextlib.contextmanager
def open_increments(bench: Bench) -> Iterator[Groups]:
    pieces = bench.scaled(1024)
    size = bench.scaled(64 * GIB)
    disks = [
        Disk("vda", path=make_thin(bench.folder / "vda.qcow2", size, pieces)),
        Disk("vdb", path=make_dense(bench.folder / "vdb.qcow2", bench.scaled(GIB))),
    ]
    with contextlib.ExitStack() as stack:
        copies = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bfb", dir="/dev/shm")))
        guest = stack.enter_context(open_guest(bench.lab, disks))
        ours = stack.enter_context(open_backupfs(bench.folder, guest, "idle=0"))
        os.mkdir(ours.path / "checkpoints/base")
        for start, _ in itertools.islice(iter_pieces(size, pieces), 0, None, 100):
            guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M seek={start // MIB} count=1 conv=notrunc")
        guest.run("sync")
        guest.pause()
        ours.release()
        made = Increments(ours, copies)
        yield {
            "increment-bytes": made.costs,
            "increment-time": made.times,
            "qcow2-reads": made.reads,
        }


@contextlib.contextmanager
def open_begins(bench: Bench) -> Iterator[Groups]:
    disks = [Disk("vda", path=make_thin(bench.folder / "vda.qcow2", bench.scaled(64 * GIB), bench.scaled(1024)))]
    with open_guest(bench.lab, disks) as guest:
        for number in range(CHECKPOINTS):
            guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M seek={number * 7} count=1 conv=notrunc; sync")
            bench.lab.virsh("checkpoint-create-as", guest.uuid, f"c{number}")
        guest.pause()
        yield {"begin-30": Begins(bench, guest).begins}


STAGES: Final = (
    Stage(("increment-bytes", "increment-time", "qcow2-reads"), open_increments),
    Stage(("begin-30",), open_begins),
)
