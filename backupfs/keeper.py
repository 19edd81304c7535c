# SPDX-License-Identifier: GPL-3.0-or-later
"""Keeps a watchdog running beside the mount.

    mount ──starts──► watchdog ──has died──► WARNING, another one is started, and told of the job that runs

Law: no job begins unless a watchdog has said that it guards it. What the watchdog does is in
`watchdog.py`; that it is another process, and knows nothing but what it is told, is the point.
"""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import trio

from backupfs.domain import Domain
from backupfs.errors import WatchdogBusy, WatchdogGone
from backupfs.messages import Peer, make_pair
from backupfs.options import Options
from backupfs.state import JobRecord, State, WatchLock, open_watch_lock

log = logging.getLogger("backupfs.keeper")

RETRY_SECONDS: Final = (0.0, 0.5, 2.0, 10.0)
STEADY_SECONDS: Final = 60.0  # one that has lived for so long did not die of its start
BYE_SECONDS: Final = 5.0


@dataclass(eq=False)
class Keeper:
    """The mount's hold on its watchdog. Got with `open_keeper`.

    *on_lost* is called, in the trio thread, with a job's identifier and the reason when the
    watchdog has ended that job.
    """

    domain: Domain
    options: Options
    mount_point: str
    foreground: bool
    lock: WatchLock
    state: State
    on_lost: Callable[[str, str], None] = lambda job_id, reason: None
    process: trio.Process | None = None
    _peer: Peer | None = None
    _guarded: dict[str, trio.Event] = field(default_factory=dict)
    _ready: trio.Event = field(default_factory=trio.Event)
    _record: JobRecord | None = None
    _began: bool = False
    _closing: bool = False

    @property
    def pid(self) -> int | None:
        """The watchdog's process; None while there is none."""
        return self.process.pid if self.process is not None else None

    async def begin(self, record: JobRecord) -> None:
        """Tell of a job that is about to begin; return when it is guarded. Raises WatchdogGone."""
        self._record, self._began = record, False
        guarded = self._guarded[record.job_id] = trio.Event()
        try:
            with trio.fail_after(self.options.timeout):
                await self._ready.wait()
                self._tell_job()
                await guarded.wait()
        except trio.TooSlowError:
            self._record = None
            why = f"none has answered for {self.options.timeout:g} s"
            raise WatchdogGone(self.domain.name, why) from None
        finally:
            del self._guarded[record.job_id]

    def began(self) -> None:
        """Tell that the job runs."""
        self._began = True
        if self._peer is not None:
            self._peer.tell("began")

    def ended(self) -> None:
        """Tell that the job is gone, with all that belonged to it; not where it is still recorded."""
        if self.state.job is None:
            self._record = None
            if self._peer is not None:
                self._peer.tell("ended")

    def _tell_job(self) -> None:
        if self._peer is not None and self._record is not None:
            self._peer.tell("begin", record=asdict(self._record))
            if self._began:
                self._peer.tell("began")

    # --- keeping it --------------------------------------------------------------------------

    async def _keep(self, task_status: trio.TaskStatus[None]) -> None:
        """Keep one running; the first must start, or WatchdogGone is raised."""
        process: trio.Process | None = await self._start()
        task_status.started()
        attempt = 0
        while True:
            since = trio.current_time()
            if process is not None:
                how = await self._attend(process)
                if self._closing:
                    return
                log.warning("%s: the watchdog (process %d) %s; starting another", self.domain.name, process.pid, how)
            attempt = 0 if trio.current_time() - since > STEADY_SECONDS else attempt + 1
            await trio.sleep(RETRY_SECONDS[min(attempt - 1, len(RETRY_SECONDS) - 1)] if attempt else 0)
            try:
                process = await self._start()
                log.info("%s: a watchdog is there again (process %d)", self.domain.name, process.pid)
            except WatchdogGone as error:
                process = None
                log.error("%s", error)

    async def _start(self) -> trio.Process:
        """Start one and wait until it is ready; raise WatchdogGone."""
        ours, theirs = make_pair()
        with theirs:
            words = [sys.executable, "-m", "backupfs.watchdog"]
            # The numbers are for it, the names for whoever looks at the list of processes.
            words += [str(theirs.fileno()), str(self.lock.file), self.domain.name, self.mount_point]
            try:
                process = await trio.lowlevel.open_process(
                    words,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=None if self.foreground else subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self.lock.file),
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                raise WatchdogGone(self.domain.name, f"it cannot be started: {error.strerror}") from error
        peer = Peer(ours)
        try:
            await self._greet(peer, process)
        except BaseException:
            peer.close()  # which ends it
            raise
        self.process, self._peer = process, peer
        self._ready.set()
        self._tell_job()
        return process

    async def _greet(self, peer: Peer, process: trio.Process) -> None:
        peer.tell(
            "watch",
            uuid=self.domain.uuid,
            uri=self.domain.uri,
            timeout=self.options.timeout,
            folder=str(self.state.folder),
            reserve=asdict(self.options.scratch_reserve),
            foreground=self.foreground,
            debug=self.options.debug,
        )
        try:
            with trio.fail_after(self.options.timeout):
                if await peer.hear() is None:
                    raise WatchdogGone(self.domain.name, f"it {_ending(await process.wait())} at once")
        except trio.TooSlowError:
            raise WatchdogGone(self.domain.name, f"it was not ready within {self.options.timeout:g} s") from None

    async def _attend(self, process: trio.Process) -> str:
        """Hear what it says until it ends; say how it ended."""
        peer = self._peer
        assert peer is not None
        try:
            while (message := await peer.hear()) is not None:
                self._hear(message)
            if self._closing and self.state.job is not None:
                return "was left to end the job"
            if self._closing:
                return _ending(await process.wait())  # so that with the mount all of it has gone
            # One that has closed its end and lives on is of no use.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return _ending(await process.wait())
        finally:
            self.process, self._peer = None, None
            self._ready = trio.Event()
            peer.close()

    def _hear(self, message: dict[str, Any]) -> None:
        match message:
            case {"say": "guarding", "job_id": job_id} if job_id in self._guarded:
                self._guarded[job_id].set()
            case {"say": "lost", "job_id": str(job_id), "reason": str(reason)}:
                self.on_lost(job_id, reason)
            case {"say": "log", "level": int(level), "text": str(text)}:
                log.log(level, "%s", text)

    async def _part(self, ended: trio.Event) -> None:
        """Part from it: in good order if no job is left, so that it has nothing to do any more."""
        self._closing = True
        if self._peer is None or self.process is None:
            return
        if self.state.job is not None:
            # QEMU is stopped, say. Nobody else would end the job when it goes on, nor guard it.
            log.warning(
                "%s: the watchdog (process %d) stays until the job has ended", self.domain.name, self.process.pid
            )
            self._peer.close()
            return
        self._peer.tell("bye")
        with trio.move_on_after(BYE_SECONDS):
            await ended.wait()
            return
        log.warning("%s: the watchdog (process %d) does not end; killing it", self.domain.name, self.process.pid)
        self.process.kill()
        await ended.wait()


def _ending(status: int) -> str:
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


async def _take(lock: WatchLock, domain: str, seconds: float) -> None:
    """Take the lock from the watchdog of a killed mount, as soon as it has cleaned up."""
    told = False
    with trio.move_on_after(seconds):
        while not lock.take():
            if not told:
                log.info("%s: waiting for the watchdog of the mount before (%s)", domain, lock.holder)
                told = True
            await trio.sleep(0.05)  # flock would wait in a thread that nothing can end
        return
    raise WatchdogBusy(domain, lock.holder)


@contextlib.asynccontextmanager
async def open_keeper(
    domain: Domain, state: State, options: Options, *, mount_point: str, foreground: bool
) -> AsyncIterator[Keeper]:
    """Wait until the watchdog of a mount before is gone, start our own, and keep one running.

    What is left over is in *state* then, and nobody else's to clear away. Raises WatchdogBusy,
    WatchdogGone.
    """
    with open_watch_lock(state.folder) as lock:
        await _take(lock, domain.name, options.timeout)
        state.reload_job()
        keeper = Keeper(domain, options, mount_point, foreground, lock, state)
        ended = trio.Event()

        async def keep(task_status: trio.TaskStatus[None]) -> None:
            try:
                await keeper._keep(task_status)
            finally:
                ended.set()

        async with trio.open_nursery() as nursery:
            await nursery.start(keep)
            try:
                yield keeper
            finally:
                with trio.CancelScope(shield=True):
                    await keeper._part(ended)
                nursery.cancel_scope.cancel()
