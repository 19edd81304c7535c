# SPDX-License-Identifier: GPL-3.0-or-later
"""The guest's file systems, frozen while the backup job begins.

    probe the agent ─► record ─► freeze ─► begin ─► thaw ─► record     all that can fail or wait
                                    └──── frozen ────┘                 stands outside

A frozen guest is a stopped guest, so the law is: nothing but the begin lies between freeze and
thaw; what we froze is thawed, whatever happens to the begin, to us or to the agent; and what
somebody else froze is not.

    the agent answers the freeze with a number   that many are frozen: thaw
    the agent refuses it                         it has thawed by itself what it had frozen
    no answer                                    it may have frozen them, or may yet: thaw
    the begin takes too long                     thaw; the begin goes on, unquiesced
    we are killed                                the record says so: whoever clears up thaws first
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import trio

from backupfs.domain import AgentState, Domain
from backupfs.domainxml import parse_domain
from backupfs.errors import (
    AgentRefused,
    AgentUnavailable,
    BackupfsError,
    DomainNotRunning,
    LibvirtRefused,
    NoSuchDomain,
    NotQuiesced,
    NotThawed,
    StateFolderError,
)
from backupfs.options import Quiesce
from backupfs.state import JobRecord, State

log = logging.getLogger("backupfs.quiesce")

AGENT_SECONDS: Final = 20  # a freeze writes out what the guest has in memory first
LIBVIRT_SECONDS: Final = 5.0  # what libvirt may add to that
FROZEN_SECONDS: Final = 10.0  # Windows' VSS thaws by itself after so long, and no guest shall wait longer
THAW_SECONDS: Final = 10.0  # then the job is ended, for without it more can be done
LAST_THAW_SECONDS: Final = 60.0  # an agent that died is started again by then, if somebody does
THAW_PAUSE: Final = 0.25
FOREIGN: Final = "somebody else has frozen the guest, and has to thaw it"


@dataclass(frozen=True, slots=True)
class Quiesced:
    """How the guest's file systems were when the job began.

    `frozen` is for how long they were frozen at most, from the call to the answer to the thaw; None
    where nothing was. `why_not` says why the copy may hold file systems that were in use, None
    where they were frozen, or nobody wanted it; `alarming` where a person should look after it.
    """

    frozen: float | None = None
    filesystems: int = 0
    why_not: str | None = None
    alarming: bool = False

    @property
    def is_sure(self) -> bool:
        """Whether what the agent could freeze was frozen when the job began."""
        return self.filesystems > 0 and self.why_not is None

    def __str__(self) -> str:
        if self.frozen is None:
            return f"not frozen: {self.why_not}" if self.why_not else "not frozen"
        count = f"{self.filesystems} file system{'s' * (self.filesystems != 1)}"
        told = f"{count} frozen for {self.frozen * 1000:.0f} ms"
        return f"{told}, but {self.why_not}" if self.why_not else told


def missing_mounts(wanted: Quiesce, mounted: frozenset[str]) -> str | None:
    """Say which of the mount points in `quiesce=` the guest does not have; None where it has them all.

    The agent would pass over them in silence.
    """
    missing = [path for path in wanted.mounts if path not in mounted]
    return f"nothing is mounted at {', '.join(missing)} in the guest" if missing else None


def shortfall(wanted: Quiesce, count: int) -> str | None:
    """Say what is wrong with *count* frozen file systems; None where it is enough."""
    if count == 0:
        return "the guest agent found no file system that it can freeze"
    if count < len(wanted.mounts):
        return f"the guest agent froze only {count} of the {len(wanted.mounts)} file systems"
    return None


@dataclass(eq=False)
class Freezer:
    """Freezes the guest around a begin, as `quiesce=` has it. Got with `open_freezer`.

    `why_not` is why it will not.
    """

    domain: Domain
    state: State
    wanted: Quiesce
    why_not: str | None = None
    alarming: bool = False

    @property
    def will_freeze(self) -> bool:
        """Whether a begin now would freeze the guest first."""
        return self.wanted.is_wanted and self.why_not is None

    def _give_up(self, why: str, *, alarming: bool = True) -> None:
        """Go on without a freeze; raise NotQuiesced where that is not allowed."""
        if self.wanted.is_required:
            raise NotQuiesced(self.domain.name, why)
        self.why_not, self.alarming = why, alarming

    async def _probe(self) -> None:
        """See whether the agent would freeze; give up if not."""
        try:
            # Libvirt itself would wait for ever, and cannot tell what the time-out was before.
            await self.domain.set_agent_timeout(AGENT_SECONDS)
            if await self.domain.agent_state() is AgentState.FROZEN:
                self._give_up(FOREIGN)
            elif self.wanted.mounts and (why := missing_mounts(self.wanted, await self.domain.mount_points())):
                self._give_up(why)
        except AgentUnavailable as error:
            self._give_up(error.reason, alarming=error.configured)
        except LibvirtRefused as error:  # not allowed, no answer
            self._give_up(error.reason)

    async def begin(self, deed: Callable[[], Awaitable[None]]) -> Quiesced:
        """Do *deed*, which begins the job, with the guest's file systems frozen.

        Call it when a job of ours is recorded and nothing else is left to do. Raises what *deed*
        raises, and NotQuiesced; thawed is the guest in any case, or an ERROR in the log says how.
        """
        if self.will_freeze:
            _note(self.state, True)
            called = trio.current_time()
            count = await self._freeze()
            if count:
                return await self._begin_frozen(deed, called, count)
        await deed()
        return Quiesced(why_not=self.why_not, alarming=self.alarming)

    async def _freeze(self) -> int:
        """Freeze, and return how many file systems are; 0: none is, and `why_not` says why."""
        try:
            with trio.fail_after(AGENT_SECONDS + LIBVIRT_SECONDS) as scope:
                scope.shield = True  # else nobody would know whether they are frozen
                count = await self.domain.freeze(self.wanted.mounts)
        except AgentRefused as error:
            # None of ours is frozen: an agent that fails half way thaws before it says so.
            _note_thawed(self.state)
            self._give_up(FOREIGN if error.frozen else error.reason)
            return 0
        except (BackupfsError, trio.TooSlowError) as error:
            await self._thaw()
            reason = error.reason if isinstance(error, LibvirtRefused) else str(error)
            self._give_up(reason or "libvirt has not answered the freeze")
            return 0
        if (why := shortfall(self.wanted, count)) is None:
            return count
        # An agent that has frozen none has nothing to thaw; by its thaw it would thaw what
        # somebody in the guest froze by hand.
        if count:
            await self._thaw()
        else:
            _note_thawed(self.state)
        self._give_up(why, alarming=False)
        return 0

    async def _thaw(self) -> None:
        """Thaw; raise NotThawed where that fails: whoever ends the job then tries again."""
        why = await _thaw(self.domain, self.state, THAW_SECONDS)
        if why is not None:
            raise self._not_thawed(why)

    def _not_thawed(self, why: str) -> NotThawed:
        """Return what to raise, and say it now: the job's end can take a minute, and the guest stands still."""
        error = NotThawed(self.domain.name, why)
        log.error("%s", error)
        return error

    async def _begin_frozen(self, deed: Callable[[], Awaitable[None]], called: float, count: int) -> Quiesced:
        begun = trio.Event()
        error: BackupfsError | None = None

        async def run() -> None:
            nonlocal error
            try:
                await deed()
            except BackupfsError as found:
                error = found
            finally:
                begun.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            try:
                with trio.move_on_after(FROZEN_SECONDS):
                    await begun.wait()
                in_time = begun.is_set()
            finally:
                # Not raised in here, where it would come in a group, or in place of a Cancelled.
                stuck = await _thaw(self.domain, self.state, THAW_SECONDS)
            frozen = trio.current_time() - called
        if stuck is not None:
            raise self._not_thawed(stuck)
        if error is not None:
            raise error
        if in_time:
            return Quiesced(frozen, count)
        self._give_up(f"the begin took more than {FROZEN_SECONDS:g} s, and the guest was thawed before its end")
        return Quiesced(frozen, count, self.why_not, alarming=True)


def _note(state: State, frozen: bool) -> None:
    """Have the job's record say, durably, whether the guest may be frozen by us."""
    assert state.job is not None
    state.record_job(replace(state.job, frozen=frozen))


def _note_thawed(state: State) -> None:
    """Have it say so no longer. Not being able to must not keep anybody from ending the job."""
    try:
        _note(state, False)
    except StateFolderError as error:
        log.error("%s", error)


async def _thaw(domain: Domain, state: State, patience: float) -> str | None:
    """Thaw what we have frozen, or may have; whatever else ends, not before that or *patience*.

    Returns why it may still be frozen, None if it is not; the record goes on saying so meanwhile.
    """
    why = "libvirt has not answered"
    with trio.move_on_after(patience) as scope:
        scope.shield = True
        while True:
            try:
                await domain.thaw()
                break
            except (NoSuchDomain, DomainNotRunning):
                break  # nothing runs, so nothing is frozen
            except LibvirtRefused as error:
                why = error.reason
            except BackupfsError as error:
                why = str(error)
            await trio.sleep(THAW_PAUSE)
    if scope.cancelled_caught:
        return why
    _note_thawed(state)
    return None


async def thaw_left_over(domain: Domain, state: State, record: JobRecord, *, last: bool = False) -> str | None:
    """Thaw the guest if *record* says that we have frozen it: we were killed, or its agent died.

    Never anything else: a guest that was started since is not the one that we froze. Returns why
    it may still be frozen, None if it is not; the record goes on saying so then. Call it before
    the job is ended, for a frozen guest is a stopped one; and, with *last*, once more
    after that, for while a job runs libvirt 9.0 does not see an agent come back; then an
    ERROR tells what is left to do.
    """
    if not record.frozen:
        return None
    try:
        same = await domain.is_alive() and parse_domain(await domain.live_xml()).id == record.domain_id
    except NoSuchDomain:
        same = False
    except BackupfsError as error:  # libvirt is slow, or away: it may be back for the thaw
        log.debug("%s: %s", domain.name, error)
        same = True
    if not same:
        _note_thawed(state)
        return None
    log.debug("%s: thawing the file systems that were left frozen", domain.name)
    why = await _thaw(domain, state, LAST_THAW_SECONDS if last else THAW_SECONDS)
    if why is None:
        log.info("%s: thawed the file systems that were left frozen", domain.name)
    elif last:
        log.error("%s", NotThawed(domain.name, why))
    await _reset_agent_timeout(domain)
    return why


async def _reset_agent_timeout(domain: Domain) -> None:
    with trio.move_on_after(LIBVIRT_SECONDS) as scope:
        scope.shield = True
        try:
            await domain.set_agent_timeout(None)
        except BackupfsError as error:
            log.debug("%s: %s", domain.name, error)  # the domain has gone, or libvirtd is away


@asynccontextmanager
async def open_freezer(domain: Domain, state: State, wanted: Quiesce) -> AsyncIterator[Freezer]:
    """Find out, before anything is frozen, whether the agent answers, and give it a time-out.

    Raises NotQuiesced where the freeze is required and will not be.
    """
    freezer = Freezer(domain, state, wanted)
    if not wanted.is_wanted:
        yield freezer
        return
    try:
        await freezer._probe()
        yield freezer
    finally:
        await _reset_agent_timeout(domain)
