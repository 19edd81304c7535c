# SPDX-License-Identifier: GPL-3.0-or-later
"""Copying what is mostly not there: a thin disk of 1 TiB must cost what its data cost.

    dense  1 GiB   |################|              the same tool, the same data,
    thin   1 TiB   |#······#······#······#···|     pieces of 1 MiB, a GiB apart

Copies go to memory (/dev/shm) and are held against the image that the disk was made from. A
tool that reads all the holes would need minutes; it is stopped, and what it took is a lower bound.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import meters
from tests.bench.figures import Figure, at_least, at_most
from tests.bench.images import GIB, MIB, TIB, iter_pieces, make_dense, make_thin, raw_of, size_text
from tests.bench.meters import MB
from tests.bench.rivals import Backupfs, open_backupfs
from tests.bench.stage import Bench, Groups, Stage

LIMIT: Final = 20.0  # seconds; a dense copy takes one to three
TOOLS: Final = {
    "cp": "cp {0} {1}",
    "tar-S": "tar -cSPf - {0} | cat",
    "bsdtar": "bsdtar -cPf - {0} | cat",
    "qemu-img": "qemu-img convert -f raw -O raw {0} {1}",
}


class NotTheSame(Exception):
    """A copy differs from what was copied; no figure is worth anything then."""


def check_copy(copy: Path, truth: Path, pieces: int) -> None:
    """See that a copy is as long, as sparse, and has the same bytes as the thin image *truth*."""
    size = truth.stat().st_size
    wanted = list(iter_pieces(size, pieces))
    found = list(iter_data(copy))
    if copy.stat().st_size != size:
        raise NotTheSame(f"{copy} has {copy.stat().st_size} bytes, not {size}")
    if copy.stat().st_blocks * 512 > pieces * MIB * 1.02 + 2 * MIB:
        raise NotTheSame(f"{copy} takes {copy.stat().st_blocks * 512} bytes, its data are {pieces * MIB}")
    with open(copy, "rb") as ours, open(truth, "rb") as theirs:
        # Equal where either has data, so equal everywhere.
        for start, stop in (*wanted, *found):
            for position in range(start, stop, MIB):
                ours.seek(position)
                theirs.seek(position)
                if ours.read(min(MIB, stop - position)) != theirs.read(min(MIB, stop - position)):
                    raise NotTheSame(f"{copy} differs from {truth} in the MiB at {position}")


def iter_data(path: Path) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) of a file's data."""
    with open(path, "rb") as file:
        stop = 0
        while True:
            try:
                start = os.lseek(file.fileno(), stop, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            stop = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, stop


@dataclass(frozen=True, slots=True)
class Holes:
    """The stage: one mount with a dense, a thin and a small thin disk."""

    ours: Backupfs
    copies: Path  # a folder in memory
    truth: Path
    pieces: int
    small_truth: Path
    small_pieces: int
    quick: bool

    def _copy(self, command: str, source: Path, truth: Path | None, pieces: int) -> float:
        copy = self.copies / "copy"
        meters.forget(source)
        try:
            took = meters.seconds(command.format(source, copy), LIMIT)
            if truth is not None and copy.exists():
                check_copy(copy, truth, pieces)
        finally:
            copy.unlink(missing_ok=True)
        return took

    def tool(self, name: str) -> list[Figure]:
        """Measure one tool on the thin disk, beside itself on the dense one."""
        command, dense, thin = TOOLS[name], self.ours.image("vdb"), self.ours.image("vda")
        dense_label = f"backupfs {size_text(dense.stat().st_size)} dense"
        thin_label = f"backupfs {size_text(thin.stat().st_size)} thin"
        return [
            Figure(name, dense_label, "s", lambda: self._copy(command, dense, None, 0)),
            Figure(
                name,
                thin_label,
                "s",
                lambda: self._copy(command, thin, self.truth, self.pieces),
                (at_most(1.3, dense_label),),
            ),
        ]

    def rsync(self) -> list[Figure]:
        """Measure rsync, which never seeks, beside itself on an equally sparse local file."""
        size = self.small_truth.stat().st_size
        thin = f"{size_text(size)} thin"

        def speed(source: Path) -> float:
            return size / self._copy("rsync -S {0} {1}", source, self.small_truth, self.small_pieces) / MB

        return [
            Figure("rsync-S", f"{thin}, local file", "MB/s", lambda: speed(self.small_truth)),
            Figure(
                "rsync-S",
                f"backupfs {thin}",
                "MB/s",
                lambda: speed(self.ours.image("vdc")),
                (at_least(0.7, f"{thin}, local file"),),
            ),
        ]

    def seeks(self) -> list[Figure]:
        thin = self.ours.image("vda")
        size = thin.stat().st_size
        runtime = 0.3 if self.quick else 2.0
        return [
            Figure(
                "seeks", f"backupfs {size_text(size)} thin", "1/s", lambda: meters.seeks_a_second(thin, size, runtime)
            )
        ]


@contextlib.contextmanager
def open_holes(bench: Bench) -> Iterator[Groups]:
    """One guest, three disks; the copies' folder goes whatever happens."""
    pieces = bench.scaled(1024)
    small_pieces = max(2, bench.scaled(8))
    disks = {
        "vda": make_thin(bench.folder / "vda.qcow2", bench.scaled(TIB), pieces),
        "vdb": make_dense(bench.folder / "vdb.qcow2", bench.scaled(GIB)),
        "vdc": make_thin(bench.folder / "vdc.qcow2", bench.scaled(8 * GIB), small_pieces),
    }
    with contextlib.ExitStack() as stack:
        copies = stack.enter_context(_folder_in_memory())
        guest = stack.enter_context(bench.guest(disks))
        ours = stack.enter_context(open_backupfs(bench.folder, guest, "idle=0"))
        ours.image().stat()
        holes = Holes(ours, copies, raw_of(disks["vda"]), pieces, raw_of(disks["vdc"]), small_pieces, bench.quick)

        def of(name: str) -> Callable[[], list[Figure]]:
            return lambda: holes.tool(name)

        yield {**{name: of(name) for name in TOOLS}, "rsync-S": holes.rsync, "seeks": holes.seeks}


@contextlib.contextmanager
def _folder_in_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bfb", dir="/dev/shm") as folder:
        yield Path(folder)


STAGES: Final = (Stage((*TOOLS, "rsync-S", "seeks"), open_holes),)
