# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark's own arithmetic and what it prints; what it measures is measured by contrib/bench."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench import images
from tests.bench.figures import (
    Figure,
    Result,
    Stopped,
    Target,
    Unavailable,
    Verdict,
    at_least,
    at_most,
    measure,
)
from tests.bench.guestside import KINDS, GuestSide
from tests.bench.holes import NotTheSame, check_copy, iter_data
from tests.bench.images import GIB, MIB, TIB, iter_pieces, size_text
from tests.bench.meters import parse_fio
from tests.bench.report import number_text, render_chart, render_lines, render_table, verdict_text


def told(*values: float) -> Callable[[], float]:
    """Return what tells *values*, one a round."""
    rest = iter(values)
    return lambda: next(rest)


def refusing(error: Exception) -> Callable[[], float]:
    def how() -> float:
        raise error

    return how


# --- targets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "value", "verdict"),
    [
        (at_least(1.7, "them"), 340.0, Verdict("≥ 1.7 × them", 1.7, True)),
        (at_least(1.7, "them"), 339.0, Verdict("≥ 1.7 × them", 1.695, False)),
        (at_most(150), 150.0, Verdict("≤ 150", 150.0, True)),
        (at_most(150), 150.1, Verdict("≤ 150", 150.1, False)),
        (at_most(1.3, "nobody"), 1.0, Verdict("≤ 1.3 × nobody", None, None)),
        (at_least(1, "none at all"), 1.0, Verdict("≥ 1 × none at all", None, None)),
    ],
)
def test_target_is_judged_against_medians(target: Target, value: float, verdict: Verdict) -> None:
    assert target.judge(value, {"them": 200.0, "none at all": 0.0}) == verdict


def test_median_is_of_all_rounds_and_targets_are_of_the_same_group() -> None:
    results = measure(
        [
            Figure("a", "ours", "MB/s", told(1, 9, 5), (at_least(2, "theirs"),)),
            Figure("a", "theirs", "MB/s", told(2, 2, 3)),
            Figure("b", "theirs", "MB/s", told(100, 100, 100)),
        ],
        3,
    )
    assert [result.median for result in results] == [5, 2, 100]
    assert results[0].values == (1, 9, 5)
    assert results[0].verdicts == (Verdict("≥ 2 × theirs", 2.5, True),)


def test_every_other_round_goes_backwards() -> None:
    seen: list[str] = []
    measure([Figure("g", who, "s", told(1, 1, 1)) for who in "abc"], 3, seen.append)
    assert [line[2] for line in seen] == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]
    assert seen[-1] == "g/c, round 3 of 3"


def test_what_is_not_there_is_asked_for_once_and_told() -> None:
    asked: list[str] = []

    def how() -> float:
        asked.append("x")
        raise Unavailable("no such program")

    found, other = measure(
        [Figure("g", "them", "s", how), Figure("g", "us", "s", told(1, 1), (at_most(1, "them"),))], 2
    )
    assert asked == ["x"]
    assert (found.values, found.why, found.median) == ((), "no such program", None)
    assert other.verdicts == (Verdict("≤ 1 × them", None, None),)
    assert measure([Figure("g", "us", "s", how, (at_most(1),))], 1)[0].verdicts == (Verdict("≤ 1", None, None),)


def test_what_was_stopped_is_a_lower_bound_that_can_only_break_an_upper_one() -> None:
    stopped = refusing(Stopped(20))
    targets = (at_most(1.3, "dense"), at_most(30), at_least(10))
    found = measure([Figure("g", "thin", "s", stopped, targets), Figure("g", "dense", "s", told(2, 2))], 2)[0]
    assert (found.values, found.why) == ((20,), "stopped after 20 s")
    assert [verdict.met for verdict in found.verdicts] == [False, None, None]


def test_a_broken_measurement_ends_the_run() -> None:
    with pytest.raises(ValueError, match="really broken"):
        measure([Figure("g", "us", "s", refusing(ValueError("really broken")))], 1)


# --- what is printed -----------------------------------------------------------------------------

RESULTS = [
    Result("dd", "backupfs", "MB/s", (1000.0, 1200.0, 900.0), (Verdict("≥ 1.7 × nbdfuse", 2.0, True),)),
    Result("dd", "nbdfuse", "MB/s", (500.0,)),
    Result("cp", "backupfs <1 TiB> & thin", "s", (20.0,), (Verdict("≤ 1.3 × dense", 9.5, False),), "stopped after 9 s"),
    Result("cp", "backupfs 2", "s", (4.0,), (Verdict("≤ 5", 4.0, True), Verdict("≥ 1 × x", None, None))),
    Result("cp", "qsd", "s", (), (), "not here"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.123, "0.12"), (9.99, "9.99"), (12.34, "12.3"), (99.96, "100.0"), (123456.7, "123,457")],
)
def test_numbers_have_the_digits_that_count(value: float | None, text: str) -> None:
    assert number_text(value) == text


def test_verdict_in_words() -> None:
    assert [verdict_text(Verdict("", ratio, met)) for ratio, met in ((2.0, True), (0.5, False), (None, None))] == [
        "met (2.00)",
        "missed (0.50)",
        "not known",
    ]


def test_each_line_is_one_figure_in_json() -> None:
    lines = render_lines(RESULTS, {"cores": 2}).splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == len(RESULTS)
    assert found[0] == {
        "figure": "dd/backupfs",
        "unit": "MB/s",
        "median": 1000.0,
        "values": [1000.0, 1200.0, 900.0],
        "targets": [{"target": "≥ 1.7 × nbdfuse", "ratio": 2.0, "met": True}],
        "why": None,
        "machine": {"cores": 2},
    }
    assert (found[-1]["median"], found[-1]["why"]) == (None, "not here")


def test_table_tells_each_target_and_its_verdict() -> None:
    out = io.StringIO()
    Console(file=out, width=150).print(render_table(RESULTS))
    lines = [line.split() for line in out.getvalue().splitlines() if line.strip()]
    assert [
        "dd",
        "backupfs",
        "1,000",
        "900",
        "…",
        "1,200",
        "MB/s",
        "≥",
        "1.7",
        "×",
        "nbdfuse",
        "met",
        "(2.00)",
    ] in lines
    assert any(line[-6:] == ["missed", "(9.50);", "stopped", "after", "9", "s"] and ">" in line for line in lines)
    assert ["≥", "1", "×", "x", "not", "known"] in lines
    assert ["qsd", "–", "s", "not", "here"] in lines


def test_chart_is_xml_with_a_bar_for_each_figure_in_proportion() -> None:
    drawn = ET.fromstring(render_chart(RESULTS, "a & b"))
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width", "")) for bar in drawn.iter(f"{space}rect") if bar.get("class")]
    kinds = [bar.get("class") for bar in drawn.iter(f"{space}rect") if bar.get("class")]
    assert len(bars) == 4  # of what has a figure
    assert bars[0] == 2 * bars[1]
    assert kinds == ["ours", "rival", "ours", "ours"]
    assert [line.get("class") for line in drawn.iter(f"{space}line")] == ["met", "missed", "met"]
    stroke = next(drawn.iter(f"{space}line"))  # 1.7 × nbdfuse's bar
    bar = next(bar for bar in drawn.iter(f"{space}rect") if bar.get("class"))
    assert float(stroke.get("x1", "")) - float(bar.get("x", "")) == pytest.approx(1.7 * bars[1], abs=0.2)


def test_chart_of_nothing_is_empty() -> None:
    assert "<rect" in render_chart([Result("g", "us", "s", (0.0,))], "t")
    ET.fromstring(render_chart([], "t"))


def test_fio_may_warn_before_it_tells() -> None:
    assert parse_fio('fio: note\n{"jobs": []}') == {"jobs": []}


# --- images, and whether a copy is one -----------------------------------------------------------


@pytest.mark.parametrize("extents", [1, 2, 63, 64, 65, 20_001])
def test_striped_image_is_sound_and_has_so_many_extents(tmp_path: Path, extents: int) -> None:
    path = make(tmp_path, extents)
    subprocess.run(["qemu-img", "check", path], check=True, capture_output=True)
    asked = subprocess.run(["qemu-img", "map", "--output=json", path], check=True, capture_output=True, text=True)
    found = json.loads(asked.stdout)
    assert len(found) == extents
    assert [extent["data"] for extent in found[:3]] == [True, False, True][:extents]


def make(folder: Path, extents: int) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.shutil, "chown", lambda *_words: None)  # only root may
        return images.make_striped(folder / "striped.qcow2", extents)


@pytest.fixture
def truth(tmp_path: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images.shutil, "chown", lambda *_words: None)
        yield images.raw_of(images.make_thin(tmp_path / "t.qcow2", 64 * MIB, 4))


def test_pieces_lie_apart(truth: Path) -> None:
    assert list(iter_pieces(64 * MIB, 4)) == [(n * 16 * MIB, n * 16 * MIB + MIB) for n in range(4)]
    assert list(iter_data(truth)) == list(iter_pieces(64 * MIB, 4))


def test_true_copy_passes_and_others_do_not(truth: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "--sparse=always", truth, copy], check=True)
    check_copy(copy, truth, 4)
    with open(copy, "r+b") as file:
        file.seek(40 * MIB)
        file.write(b"x")
    with pytest.raises(NotTheSame, match="differs"):
        check_copy(copy, truth, 4)
    with open(copy, "r+b") as file:
        file.truncate(64 * MIB - 1)
    with pytest.raises(NotTheSame, match="bytes, not"):
        check_copy(copy, truth, 4)
    subprocess.run(["cp", "--sparse=never", truth, copy], check=True)
    with pytest.raises(NotTheSame, match="takes"):
        check_copy(copy, truth, 4)


@pytest.mark.parametrize(
    ("size", "text"),
    [(TIB, "1 TiB"), (TIB // 16, "64 GiB"), (GIB // 16, "64 MiB"), (1536 * MIB, "1536 MiB"), (1000, "1000 bytes")],
)
def test_label_tells_the_size_that_it_is(size: int, text: str) -> None:
    assert size_text(size) == text


def test_guest_is_run_once_a_round_in_each_state_and_all_kinds_are_of_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = 0

    def fio(_side: GuestSide) -> dict[str, float]:
        nonlocal runs
        runs += 1
        return {kind: float(runs) for kind, _ in KINDS}

    monkeypatch.setattr(GuestSide, "fio", fio)
    for state in ("held", "plain"):
        monkeypatch.setattr(GuestSide, state, lambda _side, *_words, **_more: contextlib.nullcontext())
    guest: Any = None  # nobody asks it
    results = measure(GuestSide(tmp_path, guest, 1).figures(), 3)
    by_state: dict[str, set[tuple[float, ...]]] = {}
    for result in results:
        assert len(set(result.values)) == 3
        by_state.setdefault(result.who, set()).add(result.values)
    assert all(len(values) == 1 for values in by_state.values())
    assert runs == 3 * len(by_state)
