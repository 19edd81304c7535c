# SPDX-License-Identifier: GPL-3.0-or-later
"""Inode numbers, and which nodes the kernel knows.

A number is made from the node's path alone, so it is the same from mount to mount (borg and
restic compare it). The kernel keeps one *lookup count* for each number, over all generations:

    LOOKUP raw -> 7 (generation 1)   count 1   node: raw of point 1
    LOOKUP raw -> 7 (generation 2)   count 2   node: raw of point 2; the kernel's old inode is bad now
    FORGET 7, 2                      count 0   gone

A request names only the number. It gets the node of the *latest* lookup, which is the right one:
once the kernel has seen another generation it sends nothing more for the old inode; and until
then the old node is still the latest, and answers `EIO` by itself if its point is over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from backupfs.errors import PointOver
from backupfs.nodes import Node

ROOT: Final = 1
_MASK: Final = 2**63 - 1  # some tools keep it in a signed word


@dataclass(slots=True)
class _Known:
    node: Node
    lookups: int


@dataclass(eq=False, slots=True)
class Inodes:
    """The nodes that the kernel knows, by number."""

    root: Node
    _known: dict[int, _Known] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._known)

    def number(self, node: Node) -> int:
        """Return the node's number: the same for the same path, always; never 0 or 1."""
        if node is self.root:
            return ROOT
        digest = hashlib.blake2b(node.path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        number = int.from_bytes(digest, "little") & _MASK
        # Two of a million paths meet with a chance of 1 in 10^7; then the later one moves on.
        while number <= ROOT or (number in self._known and self._known[number].node.path != node.path):
            number = (number + 1) & _MASK
        return number

    def remember(self, node: Node) -> int:
        """Count a lookup that is answered with *node*, which is the number's node from now on."""
        number = self.number(node)
        if number == ROOT:
            return number
        known = self._known.get(number)
        if known is None:
            self._known[number] = _Known(node, 1)
        else:
            known.node = node
            known.lookups += 1
        return number

    def forget(self, number: int, lookups: int) -> None:
        """Take back *lookups* counts."""
        known = self._known.get(number)
        if known is None:
            return
        known.lookups -= lookups
        if known.lookups <= 0:
            del self._known[number]

    def node(self, number: int) -> Node:
        """Return the node of the number's latest lookup."""
        if number == ROOT:
            return self.root
        try:
            return self._known[number].node
        except KeyError:
            # The kernel names only what it has looked up; if not, EIO is all that can be right.
            raise PointOver("unknown inode", number) from None
