# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading what must be read: a disk full of random bytes, through everybody who can serve it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from tests.bench import meters
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.images import GIB, MIB, make_dense
from tests.bench.meters import MB
from tests.bench.rivals import (
    Backupfs,
    Served,
    open_backupfs,
    open_memory,
    open_nbdfuse,
    open_storage_daemon,
    uri,
)
from tests.bench.stage import Bench, Contestant, Groups, Stage, compare, enter

# Each rival's name in the table; the targets refer to them.
OURS: Final = "backupfs"
DIRECT: Final = "backupfs direct_io"
NBDFUSE: Final = "nbdfuse"
RAISED: Final = "nbdfuse 1 MiB ahead"
DAEMON: Final = "qemu-storage-daemon"
MEMORY: Final = "pyfuse3 from memory"
NBDCOPY: Final = "nbdcopy"

FOUR: Final = ("vdb", "vdc", "vdd", "vde")
GROUPS: Final = ("dd", "cat", "tar", "readers", "cpu", "random1", "random16", "first", "memory", "growth-readers")


@dataclass(frozen=True, slots=True)
class Dense:
    """The stage: one disk that all serve, and four smaller ones that backupfs serves."""

    size: int
    quick: bool
    ours: Backupfs
    files: tuple[Contestant, ...]
    copy: str  # nbdcopy's command

    def read_all(self, served: Served, command: str) -> float:
        """Read the whole file; return MB a second."""
        meters.forget(served.file)
        before = self.ours.bytes_read()
        took = meters.seconds(command.format(served.file))
        # Ours can tell whether it was asked: from a page cache it would be too fast to be true.
        if served.pid == self.ours.pid and self.ours.bytes_read() - before < self.size * 0.98:
            raise RuntimeError("the page cache answered in place of backupfs")
        return self.size / took / MB

    def sequential(self, group: str, command: str, *, nbdcopy: bool, tar: bool = False) -> list[Figure]:
        pair = (at_least(1.7, NBDFUSE), at_least(1.0, RAISED), at_least(0.5, NBDCOPY))
        targets = {OURS: (at_least(1.1, NBDFUSE),)} if tar else {OURS: pair, DIRECT: (at_least(0.9, NBDCOPY),)}
        figures = compare(group, "MB/s", self.files, lambda served: self.read_all(served, command), targets)
        if nbdcopy:
            figures.append(Figure(group, NBDCOPY, "MB/s", lambda: self.size / meters.seconds(self.copy) / MB))
        return figures

    def cpu(self) -> list[Figure]:
        """CPU of the serving process for each GiB; nbdcopy's is its own, and it serves nothing."""

        def used(served: Served) -> float:
            before = meters.cpu_seconds(served.pid)
            self.read_all(served, "dd if={} bs=1M status=none")
            return (meters.cpu_seconds(served.pid) - before) * GIB / self.size

        return compare("cpu", "s/GiB", self.files, used, {OURS: (at_most(0.55),)})

    def random(self, jobs: int) -> list[Figure]:
        runtime = 0.3 if self.quick else 2.0
        wanted = (OURS, NBDFUSE, DAEMON, MEMORY)
        return compare(
            f"random{jobs}",
            "IOPS",
            [contestant for contestant in self.files if contestant.who in wanted],
            lambda served: meters.random_reads(served.file, jobs, runtime),
            {OURS: (at_least(0.8, NBDFUSE),)},
        )

    def _four(self, count: int) -> float:
        files = [self.ours.image(target) for target in FOUR[:count]]
        for file in files:
            meters.forget(file)
        took = meters.seconds_together([f"dd if={file} bs=1M status=none" for file in files])
        return count * self.size / len(FOUR) / took / MB

    def readers(self) -> list[Figure]:
        def many(count: int) -> Callable[[], float]:
            return lambda: self._four(count)

        return [
            Figure("readers", "backupfs 1 of 1 file", "MB/s", many(1)),
            Figure(
                "readers", "backupfs 4 of 4 files", "MB/s", many(4), (at_least(1.0, "backupfs 1 of 1 file"),)
            ),
        ]  # fmt: skip

    def memory(self) -> list[Figure]:
        def peak() -> float:
            meters.forget_peak(self.ours.pid)
            self._four(4)
            return meters.peak_memory(self.ours.pid)

        return [Figure("memory", "backupfs, 4 readers", "MB", peak, (at_most(120),))]

    def growth(self) -> list[Figure]:
        """Measure 1 to 16 readers of one file, each of his own part."""

        def many(count: int) -> float:
            file = self.ours.image()
            meters.forget(file)
            blocks = self.size // MIB // count
            took = meters.seconds_together([
                f"dd if={file} bs=1M status=none skip={number * blocks} count={blocks}" for number in range(count)
            ])  # fmt: skip
            return blocks * count * MIB / took / MB

        def bound(count: int) -> Callable[[], float]:
            return lambda: many(count)

        return [Figure("growth-readers", f"backupfs {n} readers", "MB/s", bound(n)) for n in (1, 2, 4, 8, 16)]


@contextlib.contextmanager
def open_dense(bench: Bench) -> Iterator[Groups]:
    """Two guests with the same disk: a domain can be mounted once, and direct_io is of a mount."""
    size = bench.scaled(GIB)
    folder = bench.folder
    disks = {"vda": make_dense(folder / "vda.qcow2", size)}
    disks |= {target: make_dense(folder / f"{target}.qcow2", size // len(FOUR)) for target in FOUR}
    with ExitStack() as stack:
        guest = stack.enter_context(bench.guest(disks))
        direct = stack.enter_context(bench.guest({"vda": make_dense(folder / "direct.qcow2", size)}))
        ours = stack.enter_context(open_backupfs(folder, guest, "idle=0"))
        past = stack.enter_context(open_backupfs(folder, direct, "idle=0,direct_io"))
        for mounted in (ours, past):
            mounted.image().stat()
        socket = ours.status()["socket"]
        files = (
            Contestant(OURS, Served(ours.image(), ours.pid)),
            Contestant(DIRECT, Served(past.image(), past.pid)),
            enter(stack, NBDFUSE, open_nbdfuse(folder, socket, "vda")),
            enter(stack, RAISED, open_nbdfuse(folder, socket, "vda", raised=True)),
            enter(stack, DAEMON, open_storage_daemon(folder, socket, "vda")),
            enter(stack, MEMORY, open_memory(folder, size)),
        )
        dense = Dense(size, bench.quick, ours, files, f"nbdcopy -- '{uri(socket, 'vda')}' null:")
        yield {
            "dd": lambda: dense.sequential("dd", "dd if={} bs=1M status=none", nbdcopy=True),
            "cat": lambda: dense.sequential("cat", "cat {}", nbdcopy=True),
            "tar": lambda: dense.sequential("tar", "tar -cPf - {} | cat", nbdcopy=False, tar=True),
            "readers": dense.readers,
            "cpu": dense.cpu,
            "random1": lambda: dense.random(1),
            "random16": lambda: dense.random(16),
            "memory": dense.memory,
            "growth-readers": dense.growth,
        }


@contextlib.contextmanager
def open_first(bench: Bench) -> Iterator[Groups]:
    """An idle guest, awake, and the first look inside raw/."""
    folder = bench.folder
    with (
        bench.guest({"vda": make_dense(folder / "vda.qcow2", 64 * MIB)}, awake=True) as guest,
        open_backupfs(folder, guest, "idle=0") as ours,
    ):
        yield {"first": lambda: first_byte(ours)}


def first_byte(ours: Backupfs) -> list[Figure]:
    """Time the first byte: as a reader sees it, and without the wait for the whole second that is the label."""
    waits: list[float] = []

    def seen() -> float:
        ours.release()
        begun = time.time()
        with open(ours.image(), "rb", buffering=0) as file:
            assert len(file.read(4096)) == 4096
        ended = time.time()
        # Served from the moment that the label names: what came before it was made, or waited.
        ready = begun + ours.took()
        waits.append(max(0.0, min(ended, float(ours.status()["instant"])) - ready))
        return (ended - begun) * 1000

    def without() -> float:
        total = seen()
        return total - waits[-1] * 1000

    return [
        Figure("first", "backupfs without the label's wait", "ms", without, (at_most(150),)),
        Figure("first", "backupfs as a reader sees it", "ms", seen),
    ]


STAGES: Final = (
    Stage(tuple(name for name in GROUPS if name != "first"), open_dense),
    Stage(("first",), open_first),
)
