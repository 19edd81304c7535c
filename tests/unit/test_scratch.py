# SPDX-License-Identifier: GPL-3.0-or-later
"""The scratch space's rules: the reserve, when to look again, when to end the job, who is to blame."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backupfs.scratch import (
    BURST,
    END_SECONDS,
    GIB,
    LONGEST,
    MIB,
    SHORTEST,
    Gauge,
    Reserve,
    Room,
    measure,
    parse_reserve,
    room_text,
)


@pytest.mark.parametrize(
    ("total", "reserve"),
    [
        (8 * MIB, 4 * MIB),
        (GIB, GIB // 2),
        (2 * GIB, GIB),
        (5 * GIB, GIB),
        (10 * GIB, GIB),
        (100 * GIB, 10 * GIB),
        (0, 0),
    ],
)
def test_usual_reserve_is_a_tenth_at_least_a_gib_or_half_of_a_smaller_one(total: int, reserve: int) -> None:
    assert Reserve().of(total) == reserve


@pytest.mark.parametrize(
    ("text", "reserve"),
    [
        ("0", Reserve(size=0)),
        ("512M", Reserve(size=512 * MIB)),
        ("5GiB", Reserve(size=5 * GIB)),
        ("1.5g", Reserve(size=3 * GIB // 2)),
        ("64kb", Reserve(size=65536)),
        ("1000", Reserve(size=1000)),
        ("10%", Reserve(percent=10)),
        ("2.5%", Reserve(percent=2.5)),
    ],
)
def test_reserve_is_parsed(text: str, reserve: Reserve) -> None:
    assert parse_reserve(text) == reserve


@pytest.mark.parametrize("text", ["", "G", "-1", "5 G", "100%", "%", "1e3", "5X", "9" * 16, "5%%", "٣G"])
def test_what_is_no_reserve_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        parse_reserve(text)


def test_percent_is_of_the_file_system() -> None:
    assert Reserve(percent=10).of(1001) == 101


def test_size_is_taken_as_it_is() -> None:
    assert Reserve(size=5 * GIB).of(GIB) == 5 * GIB


def room(free: int, total: int = 100 * GIB, device: int = 1) -> Room:
    return Room(device, total, free)


def test_below_the_reserve_the_job_ends() -> None:
    gauge = Gauge("/scratch", Reserve())
    assert gauge.look(0, room(10 * GIB)).why is None
    why = gauge.look(1, room(10 * GIB - 1)).why
    assert why is not None
    assert "/scratch" in why
    assert "10.0 GiB" in why


def test_what_fills_too_fast_to_wait_for_the_reserve_ends_before_it() -> None:
    gauge = Gauge("/scratch", Reserve(size=MIB))
    assert gauge.look(0.0, room(32 * MIB, 64 * MIB)).why is None
    why = gauge.look(0.05, room(16 * MIB, 64 * MIB)).why
    assert why is not None
    assert "320.0 MiB a second" in why


@pytest.mark.parametrize(("distance", "wait"), [(100 * GIB, LONGEST), (GIB // 4, 0.25), (0, SHORTEST), (MIB, SHORTEST)])
def test_a_quiet_guest_is_looked_at_before_a_burst_could_reach_the_reserve(distance: int, wait: float) -> None:
    gauge = Gauge("/scratch", Reserve(size=0))
    assert gauge.look(0, room(distance)).wait == wait


def test_rate_falls_slowly_and_never_below_zero() -> None:
    gauge = Gauge("/scratch", Reserve(size=0))
    gauge.look(0, room(30 * GIB))
    assert gauge.look(1, room(26 * GIB)).wait == LONGEST  # 4 GiB/s
    assert gauge.look(2, room(4 * GIB)).wait == pytest.approx(4 / 44)
    assert gauge.look(2.001, room(3 * GIB)).why is None, "in no time: no rate to go by"
    # Room was made: the last gust still counts, by half.
    assert gauge.look(3, room(11 * GIB)).wait == pytest.approx(11 / 22)


def test_one_write_between_two_looks_in_a_row_is_no_gale() -> None:
    gauge = Gauge("/scratch", Reserve(size=0))
    gauge.look(0, room(500 * MIB))
    assert gauge.look(0.0002, room(499 * MIB)).why is None
    assert gauge.look(0.0101, room(498 * MIB)).wait == pytest.approx(498 / 1024)


@given(
    st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 10**12)), min_size=1, max_size=20),
    st.integers(0, 10**11),
)
def test_a_look_either_ends_the_job_or_comes_back_in_time(steps: list[tuple[float, int]], reserve: int) -> None:
    gauge, now = Gauge("/scratch", Reserve(size=reserve)), 0.0
    for passed, free in steps:
        now += passed
        look = gauge.look(now, room(free, 10**13))
        assert SHORTEST <= look.wait <= LONGEST
        if free < reserve:
            assert look.why is not None
        if look.why is None:
            assert look.wait == SHORTEST or free - look.wait * BURST >= reserve - 1
            assert free >= gauge._rate * END_SECONDS


def test_measure_is_what_df_says(tmp_path: Path) -> None:
    found, there = measure(str(tmp_path)), os.statvfs(tmp_path)
    assert found.total == there.f_blocks * there.f_frsize
    assert 0 < found.free <= found.total
    assert found.device == tmp_path.stat().st_dev
    with pytest.raises(FileNotFoundError):
        measure(str(tmp_path / "gone"))


def test_room_is_written_for_people() -> None:
    assert room_text(8 * MIB) == "8.0 MiB"
    assert room_text(15 * GIB) == "15.0 GiB"
