# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import random

import pytest

from backupfs.domainxml import Checkpoint
from backupfs.lineage import (
    Identity,
    Mark,
    ancestors,
    arrange,
    identify,
    is_settled,
    parse_mark,
    prunable,
    render_mark,
)

MARK = Mark(1764000000, "0123456789abcdef" * 2)
TEXT = "backupfs point 1764000000 (2025-11-24T16:00:00Z) nonce 0123456789abcdef0123456789abcdef"


def checkpoint(name: str, parent: str | None = None, at: int = 0, mark: Mark | None = None) -> Checkpoint:
    return Checkpoint(name, at, parent, "" if mark is None else render_mark(mark))


def test_description_is_for_people_and_comes_back() -> None:
    assert render_mark(MARK) == TEXT
    assert parse_mark(TEXT) == MARK


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mine",
        TEXT + "\n",
        " " + TEXT,
        TEXT.upper(),
        TEXT[:-1],
        TEXT + "0",
        TEXT.replace("16:00:00", "16:00:01"),
        TEXT.replace("point 1764000000", "point 01764000000"),
        TEXT.replace("1764000000 (2025-11-24T16:00:00Z)", "0764000000 (1994-03-18T14:40:00Z)"),
        TEXT.replace("1764000000 (2025-11-24T16:00:00Z)", "9999999999 (2286-11-20T17:46:39Z)"),
        TEXT.replace("1764000000", "١764000000"),
    ],
)
def test_only_our_own_description_is_read(text: str) -> None:
    assert parse_mark(text) is None


def test_identity_is_all_that_tells_a_checkpoint_from_another() -> None:
    assert identify(Checkpoint("a", 5, "p", TEXT, ("vda",))) == Identity("a", 5, MARK)
    assert identify(Checkpoint("a", 5, None, "x")) == Identity("a", 5, None)


def test_checkpoint_is_settled_two_seconds_after_its_creation_time() -> None:
    foreign = Identity("a", 5, None)
    assert not is_settled(foreign, None)
    assert not is_settled(foreign, 6.999)
    assert is_settled(foreign, 7)
    assert not is_settled(Identity("a", 5, MARK), 6)


def test_parents_tell_the_order_whatever_the_clock_said() -> None:
    chain = [checkpoint(name, parent, at) for name, parent, at in (("c", None, 9), ("a", "c", 5), ("b", "a", 1))]
    for seed in range(6):
        mixed = random.Random(seed).sample(chain, 3)
        assert [one.name for one in arrange(mixed)] == ["c", "a", "b"]
        assert ancestors(mixed) == {"c": frozenset(), "a": {"c"}, "b": {"a", "c"}}


def test_without_parents_order_is_guessed() -> None:
    loose = [
        checkpoint("z", at=1),
        checkpoint("own2", at=7, mark=Mark(12, "0" * 32)),
        checkpoint("own1", at=7, mark=Mark(11, "0" * 32)),
        checkpoint("y", "gone", at=3),
        checkpoint("x", at=3),
    ]
    assert [one.name for one in arrange(loose)] == ["z", "x", "y", "own1", "own2"]
    assert set(ancestors(loose).values()) == {frozenset()}


def test_parents_in_a_circle_are_survived() -> None:
    circle = [checkpoint("a", "b", 2), checkpoint("b", "a", 1), checkpoint("self", "self"), checkpoint("d", "a", 0)]
    assert [one.name for one in arrange([*circle, checkpoint("e", at=9)])] == ["d", "self", "b", "a", "e"]
    assert ancestors(circle) == {"a": {"b"}, "b": {"a"}, "self": frozenset(), "d": {"a", "b"}}


def test_only_our_own_are_pruned_and_the_oldest_first() -> None:
    live = [
        checkpoint("own1", None, 9, Mark(1, "0" * 32)),
        checkpoint("foreign1", "own1"),
        checkpoint("own2", "foreign1", 1, Mark(2, "0" * 32)),
        checkpoint("own3", "own2", 1, Mark(3, "0" * 32)),
        checkpoint("foreign2", "own3"),
    ]
    assert prunable(live[::-1], 1) == ("own1", "own2")
    assert prunable(live, 0) == ("own1", "own2", "own3")
    assert prunable(live, 3) == prunable(live, 4) == ()
