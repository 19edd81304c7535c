# SPDX-License-Identifier: GPL-3.0-or-later
"""What figures are measured on: guests, and who serves their disks.

A stage is opened once for all the groups of figures that were asked for on it, and is taken
down whatever happens: everything on it is got by `with`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from lab import Disk, Guest, Libvirt, open_guest
from lab.guest import MEMORY

from tests.bench.figures import Figure, Target, Unavailable
from tests.bench.rivals import Served

Groups = Mapping[str, Callable[[], list[Figure]]]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where it happens, and whether quickly: then all sizes are a sixteenth and say nothing."""

    folder: Path
    lab: Libvirt
    quick: bool

    def scaled(self, size: int) -> int:
        return size // 16 if self.quick else size

    @contextlib.contextmanager
    def guest(self, images: Mapping[str, Path], *, awake: bool = False, memory: int = MEMORY) -> Iterator[Guest]:
        """Boot a guest with these qcow2 images; it stands still unless it is to be *awake*."""
        disks = [Disk(target, path=path) for target, path in images.items()]
        with open_guest(self.lab, disks, memory=memory) as guest:
            if not awake:
                guest.pause()
            yield guest


@dataclass(frozen=True, slots=True)
class Stage:
    """*names* are its groups of figures; *open* builds it up for those that are wanted."""

    names: tuple[str, ...]
    open: Callable[[Bench], AbstractContextManager[Groups]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """Somebody who serves a file, or why not."""

    who: str
    served: Served | None
    why: str = ""

    @property
    def needed(self) -> Served:
        """The file and who serves it; raise Unavailable."""
        if self.served is None:
            raise Unavailable(self.why)
        return self.served


def enter(stack: ExitStack, who: str, opening: AbstractContextManager[Served]) -> Contestant:
    """Open a rival, who may not be there."""
    try:
        return Contestant(who, stack.enter_context(opening))
    except Unavailable as unavailable:
        return Contestant(who, None, str(unavailable))


def compare(
    group: str,
    unit: str,
    contestants: Sequence[Contestant],
    how: Callable[[Served], float],
    targets: Mapping[str, tuple[Target, ...]],
) -> list[Figure]:
    """Make one figure for each contestant, all measured the same way."""

    def bound(contestant: Contestant) -> Callable[[], float]:
        return lambda: how(contestant.needed)

    return [Figure(group, c.who, unit, bound(c), targets.get(c.who, ())) for c in contestants]
