# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of faults: it says what was seen, the same in every run, and a run that sees something else fails."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests import faults
from tests.faults import Fault, normalise, render


def row(title: str, section: str = "NBD", **seen: list[str]) -> dict[str, Any]:
    fault = Fault(title, section)
    for column, values in seen.items():
        for value in values:
            fault.saw(column, value)
    return asdict(fault)


def fail(number: int) -> None:
    raise OSError(number, "x")


def test_rows_are_in_the_same_order_whatever_the_order_of_the_tests() -> None:
    rows = [row("b"), row("A", reader=["EIO"]), row("c", "Libvirt", log=["a|b"])]
    assert render(rows) == render(rows[::-1])
    assert [line for line in render(rows).splitlines() if line.startswith(("|", "#"))][1:] == [
        "## Libvirt",
        "| what was tried | the log |",
        "| --- | --- |",
        "| c | a\\|b |",
        "## NBD",
        "| what was tried | the reader sees |",
        "| --- | --- |",
        "| A | EIO |",
        "| b | – |",
    ]


def test_two_rows_of_one_title_are_refused() -> None:
    with pytest.raises(AssertionError, match="one title"):
        render([row("a"), row("a")])


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("2026-11-24 09:42:06,123 WARNING x", "WARNING x"),
        ("guest123-4: point in time 1795513326 is lost", "web01: point in time N is lost"),
        ("(job 0123456789abcdef, made in 73 ms)", "(job ID, made in N ms)"),
        ("/tmp/blx3/images/guest9-1/vda.qcow2", "DIR/vda.qcow2"),
        ("by process 77 at /tmp/backupfs-test-x/mnt0", "by process N at DIR/mnt0"),
        ("readers get EIO until nobody has asked for 60 s", "readers get EIO until nobody has asked for 60 s"),
        ("6b1bd0bc-1c4e-4a4b-9d55-0123456789ab", "UUID"),
    ],
)
def test_what_differs_from_run_to_run_is_normalised(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_a_cell_is_what_was_seen_and_nothing_else() -> None:
    tried = Fault("x", "NBD")
    tried.fails(errno.EIO, lambda: fail(errno.EIO))
    tried.fails(errno.EIO, lambda: fail(errno.EIO))
    tried.reads(lambda: b"abc", b"abc", when="later")
    assert tried.seen["reader"] == ["EIO", "later: the instant's bytes"]
    with pytest.raises(AssertionError, match="ENOENT"):
        tried.fails(errno.EIO, lambda: fail(errno.ENOENT))
    with pytest.raises(pytest.fail.Exception):
        tried.fails(errno.EIO, lambda: None)
    with pytest.raises(AssertionError, match="at 1"):
        tried.reads(lambda: b"axc", b"abc")
    with pytest.raises(AssertionError):
        tried.reads(lambda: b"ab", b"abc")
    assert len(tried.seen["reader"]) == 2


def test_what_libvirt_says_is_noted_by_its_last_sentence() -> None:
    tried = Fault("x", "NBD")

    def refuse() -> None:
        raise RuntimeError("virsh save web01: error: Failed\nerror: cannot acquire")

    tried.refused("save", refuse)
    tried.allowed("suspend", lambda: None)
    assert tried.seen["answer"] == ["save, at once: cannot acquire", "suspend: done"]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of one test, with the plugin."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").touch()
    shutil.copy(str(faults.__file__), tmp_path / "tests/faults.py")
    (tmp_path / "tests/conftest.py").write_text('pytest_plugins = ["tests.faults"]\n')
    (tmp_path / "tests/test_x.py").write_text(
        "import os\n"
        "def fail():\n    raise OSError(int(os.environ['NUMBER']), 'x')\n"
        "def test_x(fault):\n    fault('a wire is cut', 'NBD').fails(int(os.environ['NUMBER']), fail)\n"
        "def test_y(fault):\n    fault('two wires are cut', 'NBD').saw('log', 'two')\n"
        "def test_z():\n    assert 'BREAK' not in os.environ\n"
    )
    return tmp_path


def run(project: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words, "tests"],
        cwd=project, env={**os.environ, "NUMBER": "5", **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["in this process", "in two others"])
def test_a_run_that_sees_something_else_than_the_table_says_fails(project: Path, workers: list[str]) -> None:
    missing = run(project, "--faults=check", *workers)
    assert missing.returncode == 1
    assert "run `contrib/test faults` and commit it" in missing.stdout
    written = run(project, "--faults=write", "-m", "fault", *workers)
    assert written.returncode == 0, written.stdout
    assert "2 faults written" in written.stdout
    assert "| a wire is cut | EIO | – |" in (project / "docs/faults.md").read_text()
    assert run(project, "--faults=check", *workers).returncode == 0
    other = run(project, "--faults=check", *workers, NUMBER="2")
    assert other.returncode == 1
    assert "+| a wire is cut | ENOENT | – |" in other.stdout
    assert run(project, *workers, NUMBER="2").returncode == 0, "only where it is asked for"


def test_a_failed_run_leaves_the_table_as_it_was(project: Path) -> None:
    assert run(project, "--faults=write").returncode == 0
    before = (project / "docs/faults.md").read_text()
    failed = run(project, "--faults=write", NUMBER="2", BREAK="1")
    assert failed.returncode == 1
    assert "was not looked at" in failed.stdout
    assert (project / "docs/faults.md").read_text() == before
