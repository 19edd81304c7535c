# SPDX-License-Identifier: GPL-3.0-or-later
"""The scratch space: how much of its file system must stay free, and how fast it fills. Pure but for `measure`.

    free  |-----------------------------|--------------|
          now                        reserve           0: QEMU pauses the guest
           '---- looked at again ----'  '-- room to end the job in --'
                after `Look.wait`

Law: a file system that runs full stops the guest, so the job ends at the reserve, above it where it
fills so fast that it would be full before the job is gone.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Final

MIB: Final = 2**20
GIB: Final = 2**30
SHORTEST: Final = 0.01  # seconds between two looks
LONGEST: Final = 1.0
BURST: Final = GIB  # bytes a second that a guest that was quiet may begin to write at any moment
END_SECONDS: Final = 0.1  # a job is gone so long after it was told to end (measured: 10 to 50 ms)
FULL: Final = 2 * MIB  # a file system with less room is full: a write needs whole clusters, and tables

_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_POWERS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True, slots=True)
class Reserve:
    """How much of a scratch file system must stay free: bytes, or percent of it, or what is usual."""

    size: int | None = None
    percent: float | None = None

    def of(self, total: int) -> int:
        """Return the bytes that must stay free in a file system of *total*.

        What is usual: a tenth of it, at least 1 GiB, but half of it where that is less.
        """
        if self.size is not None:
            return self.size
        if self.percent is not None:
            return math.ceil(total * self.percent / 100)
        return min(max(total // 10, GIB), total // 2)


def parse_reserve(text: str) -> Reserve:
    """Parse "5G", "512MiB", "10%"; raise ValueError."""
    if text.endswith("%"):
        if not re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?%", text):
            raise ValueError("is not a part of the file system; write 0% to 99%")
        return Reserve(percent=float(text[:-1]))
    match = _SIZE.fullmatch(text)
    if match is None or len(match[1]) > 15:
        raise ValueError("is neither a size nor a part; write 512M, 5G or 10%")
    return Reserve(size=int(float(match[1]) * 1024 ** _POWERS[match[2].lower()]))


def room_text(count: int) -> str:
    """Write bytes for a message."""
    return f"{count / GIB:.1f} GiB" if count >= 10 * GIB else f"{count / MIB:.1f} MiB"


@dataclass(frozen=True, slots=True)
class Room:
    """A file system's room; *device* tells it from others. Free is what an ordinary user may have."""

    device: int
    total: int
    free: int


def measure(folder: str) -> Room:
    """Look at the file system of *folder*; raise OSError. A network's may let one wait."""
    there = os.statvfs(folder)
    return Room(os.stat(folder).st_dev, there.f_blocks * there.f_frsize, there.f_bavail * there.f_frsize)


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a file system says: end the job (why), or look again after so many seconds."""

    why: str | None
    wait: float


@dataclass(eq=False)
class Gauge:
    """One scratch file system during one job."""

    folder: str
    reserve: Reserve
    _last: tuple[float, int] | None = None
    _rate: float = 0.0

    def look(self, now: float, room: Room) -> Look:
        """Judge *room* as it is *now*, on any clock that does not go back."""
        if self._last is None:
            self._last = now, room.free
        # Two looks right after each other would make a gale of a single write.
        elif (passed := now - self._last[0]) >= SHORTEST / 2:
            rate = max((self._last[1] - room.free) / passed, 0.0)
            self._rate = max(rate, self._rate / 2)  # it falls slowly: a guest writes in gusts
            self._last = now, room.free
        reserve = self.reserve.of(room.total)
        if room.free < reserve:
            return Look(
                f"only {room_text(room.free)} are free where QEMU saves old blocks ({self.folder}),"
                f" which is less than the reserve of {room_text(reserve)}",
                SHORTEST,
            )
        if self._rate * END_SECONDS > room.free:
            return Look(
                f"{room_text(room.free)} are free where QEMU saves old blocks ({self.folder}),"
                f" and it fills by {room_text(int(self._rate))} a second",
                SHORTEST,
            )
        wait = (room.free - reserve) / max(2 * self._rate, BURST)
        return Look(None, min(max(wait, SHORTEST), LONGEST))
