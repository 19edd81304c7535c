# SPDX-License-Identifier: GPL-3.0-or-later
"""Of what an image is: told inside the image, for a restore to see whether a chain has a gap.

vda.qcow2                 from nothing  to Monday
vda.inc.qcow2             from Monday   to Tuesday     fits: begins where the one before ends
vda.inc.qcow2             from Thursday to Friday      does not
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """A disk at an instant, or what changed in it since another. Instants are seconds since 1970."""

    domain: str
    uuid: str
    disk: str
    to_instant: int
    from_instant: int | None = None  # None: the whole disk
    checkpoint: str | None = None  # the one that changes are counted from

    def facts(self) -> dict[str, str | int | None]:
        """Return what a file of ours tells of its origin."""
        return {
            "domain": self.domain,
            "uuid": self.uuid,
            "disk": self.disk,
            "checkpoint": self.checkpoint,
            "from": self.from_instant,
            "to": self.to_instant,
        }
