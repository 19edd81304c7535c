# SPDX-License-Identifier: GPL-3.0-or-later
"""How it grows: with the disk's size, with the number of its extents, with the number of domains.

(With the number of readers: `dense`, for they read its disk.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.bench import meters
from tests.bench.figures import Figure
from tests.bench.images import GIB, MIB, TIB, make_dense, make_striped, make_thin, size_text
from tests.bench.meters import MB
from tests.bench.rivals import Backupfs, open_backupfs
from tests.bench.stage import Bench, Groups, Stage

SIZES: Final = (GIB, 32 * GIB, TIB)
PIECES: Final = 64  # of each, wherever they lie
EXTENTS: Final = (2_000, 200_000, 2_000_000)
DOMAINS: Final = 4


def _bind(how: Callable[[Backupfs], float], ours: Backupfs) -> Callable[[], float]:
    return lambda: how(ours)


def _milliseconds_to_begin(ours: Backupfs) -> float:
    return ours.begin() * 1000


def _peak(ours: Backupfs) -> float:
    ours.release()
    meters.forget_peak(ours.pid)
    ours.image().stat()
    return meters.peak_memory(ours.pid)


def _of_one(group: str, mounts: Mapping[str, Backupfs]) -> list[Figure]:
    """How long a begin takes with its map, and what memory it peaks at."""
    return [
        Figure(group, f"backupfs {what}, {name}", unit, _bind(how, ours))
        for what, unit, how in (("begin", "ms", _milliseconds_to_begin), ("memory", "MB", _peak))
        for name, ours in mounts.items()
    ]


@contextlib.contextmanager
def _mounted(bench: Bench, images: Mapping[str, Path]) -> Iterator[dict[str, Backupfs]]:
    """Boot a guest for each image, and mount them all."""
    with ExitStack() as stack:
        mounts = {}
        for name, image in images.items():
            guest = stack.enter_context(bench.guest({"vda": image}))
            mounts[name] = stack.enter_context(open_backupfs(bench.folder, guest, "idle=0"))
            mounts[name].image().stat()
        yield mounts


@contextlib.contextmanager
def open_sizes(bench: Bench) -> Iterator[Groups]:
    images = {
        size_text(size): make_thin(bench.folder / f"{size}.qcow2", size, max(4, bench.scaled(PIECES)))
        for size in map(bench.scaled, SIZES)
    }
    with _mounted(bench, images) as mounts:
        yield {"growth-size": lambda: _of_one("growth-size", mounts)}


@contextlib.contextmanager
def open_extents(bench: Bench) -> Iterator[Groups]:
    images = {
        f"{count:,} extents": make_striped(bench.folder / f"{count}.qcow2", count)
        for count in map(bench.scaled, EXTENTS)
    }
    with _mounted(bench, images) as mounts:

        def speed(ours: Backupfs) -> float:
            file = ours.image()
            meters.forget(file)
            return file.stat().st_size / meters.seconds(f"dd if={file} bs=1M status=none") / MB

        def figures() -> list[Figure]:
            dd = [
                Figure("growth-extents", f"backupfs dd, {name}", "MB/s", _bind(speed, ours))
                for name, ours in mounts.items()
            ]
            return [*_of_one("growth-extents", mounts), *dd]

        yield {"growth-extents": figures}


@contextlib.contextmanager
def open_domains(bench: Bench) -> Iterator[Groups]:
    size = bench.scaled(256 * MIB)
    images = {str(number): make_dense(bench.folder / f"{number}.qcow2", size) for number in range(DOMAINS)}
    with _mounted(bench, images) as mounts:

        def together(count: int) -> Callable[[], float]:
            def speed() -> float:
                files = [ours.image() for ours in list(mounts.values())[:count]]
                for file in files:
                    meters.forget(file)
                return count * size / meters.seconds_together([f"dd if={f} bs=1M status=none" for f in files]) / MB

            return speed

        def figures() -> list[Figure]:
            return [
                Figure("growth-domains", f"backupfs {count} domains", "MB/s", together(count))
                for count in range(1, DOMAINS + 1)
            ]

        yield {"growth-domains": figures}


STAGES: Final = (
    Stage(("growth-size",), open_sizes),
    Stage(("growth-extents",), open_extents),
    Stage(("growth-domains",), open_domains),
)
