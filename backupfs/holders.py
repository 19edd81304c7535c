# SPDX-License-Identifier: GPL-3.0-or-later
"""Who holds a point in time: each open file, and each process that opened one, for as long as it lives.

    open(…) ──► Lease ─────release(…)──────────────────► one less ──► `on_less`
          └pid─► pidfd ──readable: it has ended────────►    │
                   └─────the point is over──► closed        └─► `settle` and others wait for it

Why not by the open files alone: a tool that is between two files, or was stopped for an hour by
a slow target, has none open, and still means to read on. A pidfd is of one process for good,
where a number goes to another one when the first has ended.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs.errors import PointLost, PointOver
from backupfs.point import Point

log = logging.getLogger("backupfs.holders")

GRACE_SECONDS: Final = 1.0


@dataclass(eq=False)
class Lease:
    """One open file's claim on a point in time. Got with `Holders.lease`."""

    point: Point
    _holders: Holders
    pid: int = 0  # of the process that opened it; 0: not known
    _released: bool = False

    def check(self) -> None:
        """Raise PointLost or PointOver unless the point is still being served."""
        if self.point.lost is not None:
            raise PointLost(self.point.domain, self.point.lost)
        if self.point.over:
            raise PointOver(self.point.domain, self.point.instant)
        self._holders.on_use()

    def release(self) -> None:
        """Give the claim back; a second time does nothing."""
        if not self._released:
            self._released = True
            self._holders._give_back(self)


@dataclass(eq=False)
class Holders:
    """Who holds the point. *on_use* is called when one of them asks, *on_less* when there are fewer."""

    on_use: Callable[[], None]
    on_less: Callable[[], None]
    _leases: set[Lease] = field(default_factory=set)
    _pidfds: dict[int, int] = field(default_factory=dict)
    _less: trio.Event = field(default_factory=trio.Event)

    @property
    def open_files(self) -> int:
        """How many files of points in time are open, of ended ones too."""
        return len(self._leases)

    @property
    def pids(self) -> tuple[int, ...]:
        """The living processes that opened a file of the point."""
        return tuple(sorted(self._pidfds))

    @property
    def is_held(self) -> bool:
        """Whether a file is open, or a process that opened one still lives."""
        return bool(self._leases or self._pidfds)

    def lease(self, point: Point, tid: int = 0) -> Lease:
        """Claim *point* on behalf of the thread *tid*; raise PointLost or PointOver."""
        lease = Lease(point, self, thread_group(tid) if tid > 0 else 0)
        lease.check()
        self._leases.add(lease)
        return lease

    def _give_back(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self.on_use()
        self._tell()

    def add(self, tid: int, nursery: trio.Nursery) -> None:
        """Count the process of the thread *tid* in until it ends; *nursery* waits for that."""
        # 0: the process is in another PID namespace; then only its open files count.
        if tid <= 0:
            return
        pid = thread_group(tid)
        if pid in self._pidfds:
            return
        try:
            # The process waits for our answer to its open, so the number is still its own.
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            log.debug("no pidfd of process %d: %s", pid, error)
            return
        self._pidfds[pid] = pidfd
        nursery.start_soon(self._await_death, pid, pidfd)

    async def _await_death(self, pid: int, pidfd: int) -> None:
        try:
            await trio.lowlevel.wait_readable(pidfd)
        except trio.ClosedResourceError:
            return  # the point ended first
        if self._pidfds.get(pid) == pidfd:
            del self._pidfds[pid]
            _close(pidfd)
            self._tell()

    def forget_processes(self) -> None:
        """Count no process any more: the point is over."""
        pidfds, self._pidfds = self._pidfds, {}
        for pidfd in pidfds.values():
            _close(pidfd)

    def _tell(self) -> None:
        """Wake up whoever waits until fewer hold the point."""
        self.on_less()
        self._less.set()
        self._less = trio.Event()

    async def settle(self) -> bool:
        """Say whether somebody holds the point, after a moment for news that is on its way.

        The kernel tells of a closed file, and of an ended process, a little after the fact.
        """
        with trio.move_on_after(GRACE_SECONDS):
            while self.is_held:
                await self._less.wait()
        return self.is_held

    async def others(self, point: Point, tid: int) -> str:
        """Say who else than the thread *tid* holds *point*, after a moment for news on its way; empty: nobody."""
        own = _ancestry(tid)

        def found() -> list[int]:
            # An ancestor that only lives on is the script that *tid* is run by; with a file open, it is a reader.
            open_files = {lease.pid for lease in self._leases if lease.point is point and lease.pid != own[0]}
            return sorted(open_files | (set(self._pidfds) - set(own)))

        with trio.move_on_after(GRACE_SECONDS):
            while found():
                await self._less.wait()
        return ", ".join(f"process {pid}" if pid > 0 else "a process that is not known" for pid in found())

    async def wait_no_open_files(self) -> None:
        """Wait until nobody has a file of a point open."""
        while self._leases:
            await self._less.wait()


def _close(pidfd: int) -> None:
    trio.lowlevel.notify_closing(pidfd)
    os.close(pidfd)


def thread_group(tid: int) -> int:
    """Return the process that the thread *tid* belongs to; FUSE tells threads."""
    try:
        with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith("Tgid:"):
                    return int(line.split()[1])
    except OSError:
        pass  # gone already: then no process holds anything
    return tid


def _ancestry(tid: int) -> list[int]:
    """Return the process that the thread *tid* belongs to, its parent, and so on."""
    found = [thread_group(tid)]
    try:
        while found[-1] > 1:
            with open(f"/proc/{found[-1]}/stat", encoding="utf-8", errors="replace") as file:
                found.append(int(file.read().rpartition(")")[2].split()[1]))
    except (OSError, ValueError):
        pass  # gone meanwhile
    return found
