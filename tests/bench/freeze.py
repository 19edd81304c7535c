# SPDX-License-Identifier: GPL-3.0-or-later
"""How long an idle guest's file systems stay frozen while a point begins."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Final

from lab import Disk, open_guest

from tests.bench.figures import Figure, at_most
from tests.bench.images import MIB
from tests.bench.rivals import Backupfs, open_backupfs
from tests.bench.stage import Bench, Groups, Stage

BEGINS: Final = 5  # for a figure; the rounds make more of them
GOAL: Final = 200.0  # ms


def _frozen(ours: Backupfs) -> Iterator[float]:
    """Begin some points; yield how many ms each froze the guest."""
    for _ in range(BEGINS):
        ours.release()
        ours.image().stat()
        yield ours.status()["frozen_ms"]


@contextlib.contextmanager
def open_freeze(bench: Bench) -> Iterator[Groups]:
    with contextlib.ExitStack() as stack:
        mounts = {}
        for count in (1, 2):
            disks = [Disk(f"vd{letter}", ext4=True, size=64 * MIB) for letter in "ab"[:count]]
            guest = stack.enter_context(open_guest(bench.lab, disks, agent=True))
            for disk in disks:
                guest.run(f"mkdir /{disk.target} && mount -t ext4 /dev/{disk.target} /{disk.target}")
            guest.start_agent()
            mounts[count] = stack.enter_context(open_backupfs(bench.folder, guest, "idle=0,quiesce=require"))

        def bound(ours: Backupfs, kind: Callable[[Iterator[float]], float]) -> Callable[[], float]:
            return lambda: kind(_frozen(ours))

        yield {
            "freeze": lambda: [
                Figure("freeze", f"{count} ext4, {name} of {BEGINS}", "ms", bound(ours, kind), (at_most(GOAL),))
                for count, ours in mounts.items()
                for name, kind in (("median", statistics.median), ("worst", max))
            ]
        }


STAGES: Final = (Stage(("freeze",), open_freeze),)
