# SPDX-License-Identifier: GPL-3.0-or-later
"""A store whose process is killed at any system call: each file is the old or the new, and none is mixed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backupfs.changes import BLOCK, everything
from backupfs.history import Record
from backupfs.labels import uniform
from backupfs.lineage import Mark
from backupfs.store import OwnCheckpoint, Store, open_store

DISKS = ("vda", "vdb")


class _KilledError(BaseException):
    """The process is gone at this system call."""


def record(disk: str, instant: int) -> Record:
    labels = uniform(2 * BLOCK, instant - 1).relabel(everything(2 * BLOCK), instant)
    return Record(disk, "/" + disk, None, 2 * BLOCK, instant, 1, labels, (), BLOCK, 1)


class Killed(RuleBasedStateMachine):
    """Points that are saved, and checkpoints that are pruned after them."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="backupfs-store-"))
        self.instant = 1
        self.records: dict[str, list[Record | None]] = {disk: [None] for disk in DISKS}
        self.lists: list[dict[str, OwnCheckpoint]] = [{}]
        self.live: set[str] = set()  # what libvirt has

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def opened(self) -> Store:
        return open_store(self.folder, "host", "domain")

    def run_until(self, calls: int, deed: Callable[[], None]) -> bool:
        """Do *deed*; killed before its system call number *calls*. Whether it came to its end."""
        left = [calls]

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **named: object) -> object:
                if left[0] == 0:
                    raise _KilledError
                left[0] -= 1
                return real(*arguments, **named)

            return call

        names = ("open", "fsync", "replace", "unlink")
        with mock.patch.multiple(os, **{name: counted(getattr(os, name)) for name in names}):
            try:
                deed()
            except _KilledError:
                return False
        return True

    def change(self, calls: int, deed: Callable[[], None], after: dict[str, OwnCheckpoint]) -> bool:
        done = self.run_until(calls, deed)
        self.lists = [after] if done else [*self.lists, after]
        return done

    @rule(calls=st.integers(0, 12), prune=st.integers(0, 12))
    def point(self, calls: int, prune: int) -> None:
        store = self.opened()
        self.instant += 1
        name = f"own{self.instant}"
        own = OwnCheckpoint(name, self.instant, Mark(self.instant, "0" * 32), "<xml/>")
        self.live.add(name)
        if not self.change(prune, lambda: store.keep(own), {**store.checkpoints, name: own}):
            return
        fresh = {disk: record(disk, self.instant) for disk in DISKS}
        for disk in DISKS:
            self.records[disk].append(fresh[disk])
        if not self.run_until(calls, lambda: store.save(list(fresh.values()))):
            return
        self.records = {disk: [fresh[disk]] for disk in DISKS}
        # Saved: only now may an older one go, and first it is marked.
        for older in sorted(set(store.checkpoints) & self.live - {name}):
            after = dict(store.checkpoints)
            after[older] = OwnCheckpoint(older, after[older].creation_time, after[older].mark, "<xml/>", pruned=True)
            if not self.change(prune, lambda older=older: store.mark_pruned(older), after):  # type: ignore[misc]
                return
            self.live.discard(older)

    @rule(calls=st.integers(0, 6))
    def forget(self, calls: int) -> None:
        store = self.opened()
        for disk in DISKS:
            self.records[disk].append(None)
        self.lists.append({})
        if self.run_until(calls, store.forget):
            self.records = {disk: [None] for disk in DISKS}
            self.lists = [{}]

    @invariant()
    def nothing_is_half_done(self) -> None:
        if not hasattr(self, "folder"):
            return
        store = self.opened()
        for disk in DISKS:
            found = store.load(disk, "/" + disk)
            assert found in self.records[disk]
            self.records[disk] = [found]
        assert dict(store.checkpoints) in self.lists
        self.lists = [dict(store.checkpoints)]
        # Whatever was deleted from libvirt is known to have been pruned, unless all is forgotten.
        gone = {name for name in store.checkpoints if name not in self.live}
        assert all(store.checkpoints[name].pruned for name in gone)


TestKilled = Killed.TestCase
TestKilled.settings = settings(max_examples=50, stateful_step_count=12, deadline=None)
