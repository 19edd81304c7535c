# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from backupfs.errors import PointOver
from backupfs.inodes import ROOT, Inodes


@dataclass(eq=False)
class Node:
    """Only its path matters here."""

    path: str


def table() -> tuple[Any, Inodes]:
    root: Any = Node("/")
    return root, Inodes(root)


def test_numbers_depend_on_the_path_alone() -> None:
    _, one = table()
    _, other = table()
    node: Any = Node("/raw/vda.raw")
    assert one.number(node) == other.number(node) > ROOT
    assert one.number(node) < 2**63


def test_the_latest_lookup_is_the_numbers_node_and_counts_run_over_all() -> None:
    _, inodes = table()
    first: Any = Node("/raw")
    second: Any = Node("/raw")
    number = inodes.remember(first)
    assert inodes.remember(second) == number
    assert inodes.node(number) is second
    inodes.forget(number, 1)
    assert inodes.node(number) is second
    inodes.forget(number, 1)
    with pytest.raises(PointOver):
        inodes.node(number)
    inodes.forget(number, 1)
    assert len(inodes) == 0


def test_root_is_never_forgotten() -> None:
    root, inodes = table()
    assert inodes.remember(root) == ROOT
    inodes.forget(ROOT, 5)
    assert inodes.node(ROOT) is root


def test_two_paths_that_meet_get_two_numbers() -> None:
    _, inodes = table()
    one: Any = Node("/a")
    number = inodes.remember(one)
    one.path = "/pretends-to-be-another"
    other: Any = Node("/a")
    assert inodes.number(other) == number + 1
