# SPDX-License-Identifier: GPL-3.0-or-later
"""The watchdog: a small process that outlives a killed mount, and ends its backup job.

    mount says bye             ─► exits
    mount's end just closes    ─► thaws, ends the job that is recorded, removes socket and scratch, exits

While the mount lives, the scratch guard runs here (`guard.py`), for it must work also while the mount
is stopped. It has its own connection to libvirt, its own session, and the state folder's second lock, which
the next mount waits for. It never unmounts: a dead mount answers ENOTCONN, an unmounted one would
look empty, and `rsync --delete` would empty the copy.

A process manager that ends a whole group sends its signal here too. It is ignored: the mount has
it as well, ends its job in good order, and says bye.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from backupfs import domainxml
from backupfs.domain import Domain, open_domain
from backupfs.errors import BackupfsError, ForeignJob
from backupfs.guard import Guard
from backupfs.leftover import clear_left_over
from backupfs.logs import configure_logging
from backupfs.messages import Peer
from backupfs.quiesce import thaw_left_over
from backupfs.scratch import Reserve
from backupfs.state import JobRecord, State, WatchLock

log = logging.getLogger("backupfs.watchdog")

RETRY_SECONDS: Final = 0.5
BEGIN_SECONDS: Final = 3.0  # after so long, a begin that the killed mount asked for will not come any more
OOM_SCORE: Final = "-900"  # the mount is to be taken first, and the guest, which may hold more, is not ours


@dataclass(eq=False)
class Watchdog:
    """Watches over one mount's job."""

    uuid: str
    uri: str
    timeout: float
    state: State
    peer: Peer
    reserve: Reserve
    job: JobRecord | None = None
    began: bool = False
    _guards: dict[str, tuple[Guard, trio.CancelScope]] = field(default_factory=dict)  # by job
    _nursery: trio.Nursery | None = None
    domain: Domain = field(init=False)  # since ready
    _died: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Watch until the mount is gone; then do what it has left to do."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery.cancel_scope)
            async with self._open_domain() as domain, trio.open_nursery() as self._nursery:
                self.domain = domain
                self._nursery.start_soon(self._hear_domain)
                self.peer.tell("ready")
                await self._died.wait()
                await self._clean_up(domain)
                self._nursery.cancel_scope.cancel()
            nursery.cancel_scope.cancel()

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Listen to the mount; leave with it, unless it has died and left a job."""
        orderly = await self._listen()
        self.state.reload_job()
        if orderly or self.state.job is None:
            scope.cancel()
        else:
            self._died.set()

    @contextlib.asynccontextmanager
    async def _open_domain(self) -> AsyncIterator[Domain]:
        """Open the domain as soon as libvirt can be reached."""
        async with contextlib.AsyncExitStack() as stack:
            while True:
                try:
                    domain = await stack.enter_async_context(open_domain(self.uuid, self.uri, timeout=self.timeout))
                    break
                except BackupfsError as error:
                    log.debug("%s", error)
                    await trio.sleep(RETRY_SECONDS)
            assert domain.uuid == self.uuid  # a domain may be called like another's UUID
            yield domain

    async def _listen(self) -> bool:
        """Hear what the mount says, until it is gone; say whether it went in good order."""
        while (message := await self.peer.hear()) is not None:
            match message:
                case {"say": "begin", "record": dict(record)}:
                    self.job = JobRecord(**{**record, "scratches": tuple(record["scratches"])})
                    self.began = False
                    self._guard(self.job)
                    self.peer.tell("guarding", job_id=self.job.job_id)
                case {"say": "began"}:
                    self.began = True
                    if self.job is not None and self.job.job_id in self._guards:
                        self._guards[self.job.job_id][0].job_runs()
                case {"say": "ended"}:
                    self._unguard()
                    self.job = None
                case {"say": "bye"}:
                    return True
        return False

    # --- the guard ---------------------------------------------------------------------------

    def _guard(self, record: JobRecord) -> None:
        assert self._nursery is not None  # the mount waits until we are ready
        if record.job_id not in self._guards:
            guard = Guard(self.domain, record, self.reserve, self._say, self._lose)
            self._guards[record.job_id] = guard, trio.CancelScope()
            self._nursery.start_soon(self._run_guard, record.job_id)

    async def _run_guard(self, job_id: str) -> None:
        guard, scope = self._guards[job_id]
        with scope:
            await guard.watch()
        if scope.cancelled_caught:
            await guard.rescue()
        del self._guards[job_id]

    def _unguard(self) -> None:
        """Stop to guard the job: it is gone."""
        if self.job is not None and self.job.job_id in self._guards:
            guard, scope = self._guards[self.job.job_id]
            if not guard.is_ending:
                scope.cancel()

    async def _hear_domain(self) -> None:
        async for happening in self.domain.happenings:
            for guard, _scope in self._guards.values():
                guard.hear(happening)

    def _say(self, level: int, text: str) -> None:
        """Log in the mount, or, where that is dead, here."""
        if not self.peer.tell("log", level=level, text=text):
            log.log(level, "%s", text)

    def _lose(self, job_id: str, reason: str) -> None:
        if not self.peer.tell("lost", job_id=job_id, reason=reason):
            log.warning("%s: the backup job is ended: %s", self.domain.name, reason)

    # --- after the mount ---------------------------------------------------------------------

    async def _clean_up(self, domain: Domain) -> None:
        """End the job that the mount has left."""
        record = self.state.job
        assert record is not None  # or else there was nothing to do
        log.warning("%s: the file system has gone without ending its backup job; ending it", domain.name)
        await thaw_left_over(domain, self.state, record)  # before all else: a frozen guest is a stopped one
        if self.job is not None and self.job.job_id == record.job_id and not self.began:
            await self._await_begin(domain, record)
        guard, _scope = self._guards.get(record.job_id, (None, None))
        aborting = guard.aborting if guard is not None else trio.Lock()
        while True:
            try:
                # However long it takes: an abort that waits behind a stopped QEMU must not be put
                # twice, for the second could hit another program's job.
                async with aborting:
                    await clear_left_over(domain, self.state, within=float("inf"))
            except ForeignJob as error:
                log.info("%s", error)
            except BackupfsError as error:
                log.debug("%s", error)
            if self.state.job is None:
                break
            await trio.sleep(RETRY_SECONDS)
        if guard is not None:
            await guard.rescue()
        log.info("%s: the backup job that the file system left is gone", domain.name)

    async def _await_begin(self, domain: Domain, record: JobRecord) -> None:
        """Wait for a job that the mount may have asked for right before it died.

        Libvirt goes on with a begin though the asker is gone, and does not show the job before it
        is complete; so "there is none" is not the last word at first.
        """
        deadline = trio.current_time() + BEGIN_SECONDS
        while trio.current_time() < deadline:
            with contextlib.suppress(BackupfsError):
                xml = await domain.backup_xml()
                if xml is not None and domainxml.parse_backup(xml).socket == record.socket:
                    return
                statistics = await domain.job_statistics()
                if xml is None and statistics is not None and statistics.operation == "backup":
                    deadline = trio.current_time() + BEGIN_SECONDS
            await trio.sleep(0.02)


def _settle_in() -> None:
    """Be deaf to signals that are meant for the mount, and small game for the OOM killer."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):  # only root may, and not in every container
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="ascii")


async def _run(peer: Peer, lock: WatchLock, words: dict[str, Any]) -> None:
    state = State(Path(words["folder"]))
    lock.folder = state.folder
    lock.sign()
    reserve = Reserve(**words["reserve"])
    await Watchdog(words["uuid"], words["uri"], words["timeout"], state, peer, reserve).run()


def main(arguments: list[str]) -> int:
    """Run the watchdog: its end of the pair and the lock are open files with these numbers."""
    _settle_in()
    peer = Peer(socket.socket(fileno=int(arguments[0])))
    lock = WatchLock(Path("/"), int(arguments[1]))
    os.set_inheritable(lock.file, False)

    async def run() -> None:
        words = await peer.hear()
        if words is None:
            return  # the mount is gone already, and nothing had begun
        configure_logging(foreground=words["foreground"], debug=words["debug"])
        # That libvirt went away and came back is said by the mount.
        logging.getLogger("backupfs.link").setLevel(logging.ERROR)
        await _run(peer, lock, words)

    try:
        trio.run(run, strict_exception_groups=True)  # trio 0.22 has another default
    except BaseException:
        log.exception("unexpected, in the watchdog")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
