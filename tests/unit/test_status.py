# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from backupfs.status import (
    DiskStatus,
    Snapshot,
    duration_text,
    render_json,
    render_metrics,
    render_table,
    size_text,
)

DISK = DiskStatus(2**30, 2**20, 4096, 512.0, 3, 2, 1, 9, 2**30, None, "/i/s", 2**33, 2**30, "ext4")
SNAPSHOT = Snapshot(
    version="1", pid=7, mount_point="/mnt", domain='we"b\n1', uuid="u", uri="qemu:///system", source="live",
    state="running", instant=1700000000, age=75.0, point="j", socket="/s", why={"sda": "a cdrom; nothing"},
    open_files=2, holders=(5,), unused_for=3.0, idle=900.0, idle_max=43200.0, last_instant=1700000000,
    quiesced=True, frozen_ms=87.4, frozen_filesystems=2,
    scratch_used=2**21, disks={"vda": DISK}, rate_limit=2**20, read_ahead=131072, sparse_seeks=True, control="/c",
    log="syslog", watchdog=8,
)  # fmt: skip


def test_json_reads_back() -> None:
    found = json.loads(render_json(SNAPSHOT))
    assert found["schema"] == 1
    assert found["disks"]["vda"]["allocated"] == 2**20
    assert found["why"] == {"sda": "a cdrom; nothing"}
    assert {**found, "holders": tuple(found["holders"])} == {"schema": 1, **asdict(SNAPSHOT)}


def test_json_holds_any_name() -> None:
    odd = replace(SNAPSHOT, domain="\udc80\0\u2028", mount_point="/\udcff")
    assert json.loads(render_json(odd))["mount_point"] == "/\udcff"


LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)\{{({LABEL}(?:,{LABEL})*)?\}} (\S+)")
COMMENT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.+)")


def parse_metrics(text: bytes) -> dict[tuple[str, str], float]:
    """Read Prometheus' text format 0.0.4, strictly; return the values by name and labels."""
    assert text.endswith(b"\n")
    found: dict[tuple[str, str], float] = {}
    told: dict[str, dict[str, str]] = {}
    current = None
    for line in text.decode().removesuffix("\n").split("\n"):
        if comment := COMMENT.fullmatch(line):
            about = told.setdefault(comment[2], {})
            assert comment[1] not in about, f"told twice: {line}"
            about[comment[1]] = comment[3]
            assert comment[2] == current or comment[1] == "HELP", "HELP comes first"
            current = comment[2]
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] == current, f"not with its own: {line}"
        assert (sample[1], sample[2]) not in found, f"twice: {line}"
        found[sample[1], sample[2]] = float(sample[3])
    for name, about in told.items():
        assert set(about) == {"HELP", "TYPE"}
        assert about["TYPE"] in ("gauge", "counter")
        assert name.endswith("_total") == (about["TYPE"] == "counter")
    return found


def test_metrics_follow_the_text_format() -> None:
    found = parse_metrics(render_metrics(SNAPSHOT))
    own = r'domain="we\"b\n1",uuid="u"'
    assert found["backupfs_state", f'{own},state="running"'] == 1
    assert sum(value for (name, _), value in found.items() if name == "backupfs_state") == 1
    assert found["backupfs_disk_read_bytes_total", f'{own},disk="vda"'] == 4096
    assert found["backupfs_build_info", f'{own},version="1"'] == 1
    assert found["backupfs_point_failed", own] == 0
    assert found["backupfs_sparse_seeks", own] == 1
    lost = replace(SNAPSHOT, why={"point": "lost: guest crashed"})
    assert parse_metrics(render_metrics(lost))["backupfs_point_failed", own] == 1


def test_the_freeze_is_told_in_all_three() -> None:
    own = r'domain="we\"b\n1",uuid="u"'
    found = parse_metrics(render_metrics(SNAPSHOT))
    assert found["backupfs_quiesced", own] == 1
    assert found["backupfs_frozen_seconds", own] == pytest.approx(0.0874)
    assert "yes; 2 file systems were frozen for 87 ms" in shown(SNAPSHOT)
    late = replace(SNAPSHOT, quiesced=False)
    assert "no; 2 file systems were frozen for 87 ms" in shown(late)
    without = replace(SNAPSHOT, quiesced=False, frozen_ms=None, frozen_filesystems=0)
    found = parse_metrics(render_metrics(without))
    assert found["backupfs_quiesced", own] == 0
    assert ("backupfs_frozen_seconds", own) not in found
    assert re.search(r"^quiesced: +no$", shown(without), re.MULTILINE)


def test_metrics_hold_any_name_and_any_number() -> None:
    two = {"a\\": DISK, 'b"\n\r\udc80': replace(DISK, scratch_free=0)}
    odd = replace(SNAPSHOT, domain="}\udcff 1\\", disks=two, unused_for=math.inf)
    found = parse_metrics(render_metrics(odd))
    assert found["backupfs_unused_seconds", r'domain="}? 1\\",uuid="u"'] == math.inf
    assert [value for (name, _), value in found.items() if name == "backupfs_scratch_free_bytes"] == [2**33, 0]
    for number in (-math.inf, math.nan):
        assert str(number)[-3:].lower() in render_metrics(replace(SNAPSHOT, unused_for=number)).decode().lower()


def test_metrics_leave_out_what_is_not_known() -> None:
    idle = replace(SNAPSHOT, state="idle", instant=None, quiesced=None, frozen_ms=None, scratch_used=None, disks={})
    text = render_metrics(idle).decode()
    assert "instant_seconds" in text
    assert "backupfs_instant_seconds" not in text
    assert "disk" not in text
    assert "backupfs_quiesced" not in text


def shown(snapshot: Snapshot) -> str:
    out = io.StringIO()
    render_table(json.loads(render_json(snapshot)), Console(file=out, width=100))
    return out.getvalue()


def test_table_shows_the_figures_to_a_person() -> None:
    text = shown(SNAPSHOT)
    for word in ("running", "1 min 15 s old", "vda", "1.0 GiB", "1.0 MiB", "512 B/s", "8.0 GiB", "2.0 MiB", "a cdrom"):
        assert word in text
    assert "when unused for 15 min 0 s" in text
    assert "/i (ext4): 8.0 GiB free, the point ends at 1.0 GiB" in text
    assert "process 8" in text
    assert "by process 7, backupfs 1" in text
    assert "\x1b" not in text, "no colour where there is no terminal"


@pytest.fixture
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_instant_is_told_in_local_time(berlin: None) -> None:
    assert "2023-11-14 23:13:20+01:00 (1700000000)" in shown(SNAPSHOT)


def test_table_does_what_no_name_says() -> None:
    odd = replace(SNAPSHOT, domain="a\x1b[2Jb\n", disks={"[bold]x": DISK}, why={":smile:": "[red]\x9b2J"})
    text = shown(odd)
    for word in (r"a\x1b[2Jb\n", "[bold]x", r":smile:: [red]\x9b2J"):
        assert word in text
    assert "\x1b" not in text


def test_table_says_how_much_of_a_huge_map_there_is_and_what_the_rate_may_be() -> None:
    huge = replace(DISK, size=2**40, mapped=2**39)
    text = shown(replace(SNAPSHOT, disks={"vda": huge}))
    assert "vda: 512.0 GiB of 1.0 TiB are mapped" in text
    assert "rate limit:   1.0 MiB/s" in text
    assert "mapped" not in shown(SNAPSHOT)
    assert "rate limit" not in shown(replace(SNAPSHOT, rate_limit=None))


def test_table_says_why_holes_cost_time() -> None:
    lame = replace(DISK, why_no_extents="the server cannot tell")
    assert "vda: holes are read like data: the server cannot tell" in shown(replace(SNAPSHOT, disks={"vda": lame}))


def test_table_is_made_of_what_json_of_a_later_version_has() -> None:
    status = json.loads(render_json(replace(SNAPSHOT, idle=0.0)))
    status["new"] = status["disks"]["vda"]["new"] = 1
    out = io.StringIO()
    render_table(status, Console(file=out, width=100))
    assert "when unused" not in out.getvalue()


def test_the_process_that_serves_does_not_carry_rich() -> None:
    code = "import sys, backupfs.status; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_of_an_idle_mount_has_no_disks() -> None:
    text = shown(
        replace(
            SNAPSHOT, state="idle", instant=None, age=None, quiesced=None, frozen_ms=None, scratch_used=None, disks={}
        )
    )
    assert "instant" not in text
    assert "quiesced" not in text
    assert "scratch" not in text
    assert "vda" not in text


def test_table_tells_that_there_is_no_watchdog_and_leaves_out_what_is_not_known() -> None:
    text = shown(replace(SNAPSHOT, watchdog=None, disks={"vda": replace(DISK, scratch_file_system=None)}))
    assert re.search(r"watchdog: +none", text)
    assert "the point ends at" not in text
    old = json.loads(render_json(SNAPSHOT))
    del old["watchdog"]
    out = io.StringIO()
    render_table(old, Console(file=out, width=100))
    assert "watchdog" not in out.getvalue()


def test_disks_that_share_a_scratch_folder_have_one_line() -> None:
    two = {"vda": DISK, "vdb": replace(DISK, scratch="/i/t"), "vdc": replace(DISK, scratch="/j/t")}
    assert shown(replace(SNAPSHOT, disks=two)).count("the point ends at") == 2


def test_units() -> None:
    assert [size_text(n) for n in (None, 0, 1023, 1023.7, 2048, 2**20 - 1, 3 * 2**40, 2**52, 2**62)] == [
        "–", "0 B", "1023 B", "1.0 KiB", "2.0 KiB", "1.0 MiB", "3.0 TiB", "4.0 PiB", "4096.0 PiB",
    ]  # fmt: skip
    assert [duration_text(n) for n in (None, -3, 5.9, 61, 3700, 90000)] == [
        "–", "0 s", "5 s", "1 min 1 s", "1 h 1 min", "1 d 1 h",
    ]  # fmt: skip
