# SPDX-License-Identifier: GPL-3.0-or-later
"""Which checkpoint is which, and which is older. Pure.

A checkpoint's name tells little: it can be deleted and made again, even three times within one
second, and then carries the same creationTime too. What goes by the name alone counts changes
from the wrong moment, and loses some.

    Mark       in the description of our own: the label of the point it was made with, and a nonce
    Identity   name, creationTime, mark; equal ones are one checkpoint, if the first was settled
    settled    no other checkpoint can come to have this identity any more: its creationTime was
               2 s ago or more, by libvirtd's clock; or we made it, and its nonce tells it

    creationTime 7     |7·····deleted, remade·····|8············|9····
    read here                   ^ same identity, other bitmap      ^ settled: remade now, it says 9

creationTime is compared for being the same, nothing else. It does not order checkpoints (the host's
clock may be off, two may share a second, a redefinition sets it at will); libvirt's parents do.
Where those do not tell, `arrange` guesses, and nothing but the size of an increment hangs on it.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from backupfs.domainxml import LARGEST_NUMBER, Checkpoint

SETTLE_SECONDS: Final = 2
_MARK: Final = re.compile(r"backupfs point ([0-9]{1,10}) \(([0-9T:Z-]{20})\) nonce ([0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Mark:
    """What the description of a checkpoint of ours says.

    *instant* is the label of the point that it was made with, so of what it counts from; *nonce* is
    16 random bytes in hex (`secrets.token_hex(16)`).
    """

    instant: int
    nonce: str


def render_mark(mark: Mark) -> str:
    """Return the description: "backupfs point 1764000000 (2025-11-24T16:00:00Z) nonce 93b2…"."""
    return f"backupfs point {mark.instant} ({_date(mark.instant)}) nonce {mark.nonce}"


def _date(instant: int) -> str:
    return datetime.fromtimestamp(instant, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_mark(description: str) -> Mark | None:
    """Return what `render_mark` wrote, exactly; None for anything else."""
    match = _MARK.fullmatch(description)
    if match is None:
        return None
    mark = Mark(int(match[1]), match[3])
    return mark if mark.instant < LARGEST_NUMBER and render_mark(mark) == description else None


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells a checkpoint from all others, once it is settled."""

    name: str
    creation_time: int
    mark: Mark | None


def identify(checkpoint: Checkpoint) -> Identity:
    """Return the checkpoint's identity."""
    return Identity(checkpoint.name, checkpoint.creation_time, parse_mark(checkpoint.description))


def is_settled(identity: Identity, clock: float | None) -> bool:
    """Whether it was settled when libvirtd's clock showed *clock* (None: not known).

    A mark proves nothing: whoever copies our XML copies the nonce. It settles those that we
    know to have made.
    """
    return clock is not None and identity.creation_time + SETTLE_SECONDS <= clock


def libvirt_clock(made: Iterable[Identity], local: float | None) -> float | None:
    """Return a moment that libvirtd's clock has reached; None if none is known.

    *local* is this host's clock, read before the checkpoints were listed, if libvirtd runs on this
    host; else None. Of another host only the creationTimes are known that it gave to *made*, the
    checkpoints of ours as noted when they were made: a listed one may have been redefined.
    """
    if local is not None:
        return local
    return max((one.creation_time for one in made), default=None)


def ancestors(checkpoints: Sequence[Checkpoint]) -> Mapping[str, frozenset[str]]:
    """Return, for each checkpoint, those that libvirt's parents say are older."""
    parents = {one.name: one.parent for one in checkpoints}
    found: dict[str, frozenset[str]] = {}
    for name, parent in parents.items():
        older: set[str] = set()
        while parent in parents and parent not in older and parent is not None:
            older.add(parent)
            parent = parents[parent]
        found[name] = frozenset(older - {name})
    return found


def arrange(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Return the checkpoints, oldest first, as libvirt's parents have it.

    Where they do not tell (a redefinition has left no parent), by creationTime, which is a guess.
    """

    def guess(one: Checkpoint) -> tuple[int, int, str]:
        mark = parse_mark(one.description)
        return one.creation_time, 0 if mark is None else mark.instant, one.name

    children: dict[str, list[Checkpoint]] = {one.name: [] for one in checkpoints}
    ready = []
    for one in checkpoints:
        if one.parent in children and one.parent is not None:
            children[one.parent].append(one)
        else:
            ready.append((guess(one), one.name))
    heapq.heapify(ready)
    by_name = {one.name: one for one in checkpoints}
    arranged = []
    while ready:
        _, name = heapq.heappop(ready)
        arranged.append(by_name[name])
        for child in children[name]:
            heapq.heappush(ready, (guess(child), child.name))
    rest = set(by_name) - {one.name for one in arranged}  # parents in a circle: nobody's word for anything
    return (*sorted((by_name[name] for name in rest), key=guess), *arranged)


def prunable(checkpoints: Sequence[Checkpoint], keep: int) -> tuple[str, ...]:
    """Return the names of our own checkpoints beyond the newest *keep*, oldest first; never another's."""
    own = [one.name for one in arrange(checkpoints) if parse_mark(one.description) is not None]
    return tuple(own[: max(0, len(own) - keep)])
