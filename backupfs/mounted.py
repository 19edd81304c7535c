# SPDX-License-Identifier: GPL-3.0-or-later
"""What all nodes of one mounted domain share: its job, and what libvirt told of it a moment ago."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import trio

from backupfs import domainxml
from backupfs.checkpoints import Base
from backupfs.errors import BackupfsError
from backupfs.job import Job

T = TypeVar("T")

FRESH_SECONDS: Final = 1.0  # for so long an answer of libvirt's serves the stats that follow it
STAT_SECONDS: Final = 2.0  # a stat waits for libvirt no longer than that


@dataclass(eq=False)
class Fresh(Generic[T]):
    """A value that is asked for again when it is older than FRESH_SECONDS."""

    ask: Callable[[], Awaitable[T]]
    _value: T | None = None
    _asked: float = float("-inf")

    async def get(self) -> T:
        """Return the value, a second old at most; raise what asking raises."""
        if self._value is None or trio.current_time() - self._asked > FRESH_SECONDS:
            self._value = await self.ask()
            self._asked = trio.current_time()
        return self._value

    def forget(self) -> None:
        """Have the next one who asks get an answer of its own."""
        self._asked = float("-inf")

    async def get_or_last(self, default: T) -> T:
        """Return the value, or the last known one where asking fails or takes long: for stat."""
        try:
            with trio.move_on_after(STAT_SECONDS):
                return await self.get()
        except BackupfsError:
            pass  # whoever opens the file is told
        # While libvirt is away not every stat of a listing shall wait for it anew.
        self._asked = trio.current_time()
        return default if self._value is None else self._value


@dataclass(eq=False)
class Mounted:
    """What all nodes of one mounted domain share."""

    job: Job
    inner: Mapping[str, Callable[[], bytes]]  # name in .backupfs/ -> its contents now
    started: int
    xml: Fresh[str] = field(init=False)
    checkpoints: Fresh[dict[str, Base]] = field(init=False)

    def __post_init__(self) -> None:
        self.xml = Fresh(self._shown_xml)
        self.checkpoints = Fresh(self.job.checkpoints.all)

    async def _shown_xml(self) -> str:
        return domainxml.strip_secrets(await self.job.domain.live_xml())

    @property
    def now(self) -> int:
        """The time of what belongs to no point: the latest point's instant, or the mount's."""
        return max(self.started, self.job.point.instant if self.job.point else 0)

    def xattrs(self) -> dict[str, str]:
        """What every node tells of its origin."""
        domain = self.job.domain
        return {"domain": domain.name, "uuid": domain.uuid, "uri": domain.uri}
