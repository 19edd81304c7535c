# SPDX-License-Identifier: GPL-3.0-or-later
"""What a figure is read from: the clock, /proc, fio."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.bench.figures import Stopped

MB: Final = 1e6
_TICK: Final = os.sysconf("SC_CLK_TCK")


def forget(path: Path) -> None:
    """Drop a file's pages from the page cache; those of other files stay."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def seconds(command: str, limit: float = 600.0) -> float:
    """Run a shell command, its output thrown away; return how long it took, or raise Stopped."""
    return seconds_together([command], limit)


def seconds_together(commands: Sequence[str], limit: float = 600.0) -> float:
    """Run shell commands side by side; return how long the last of them took."""
    begun = time.monotonic()
    running = [
        subprocess.Popen(
            ["sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for command in commands
    ]
    try:
        for process in running:
            try:
                _, errors = process.communicate(timeout=max(0.0, begun + limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Stopped(limit) from None
            if process.returncode:
                raise RuntimeError(f"{process.args!r}: {errors.decode()}")
        return time.monotonic() - begun
    finally:
        for process in running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used so far, in user and system mode, all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def forget_peak(pid: int) -> None:
    """Let the peak of resident memory begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory(pid: int) -> float:
    """Return the peak of resident memory since then, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / MB
    raise RuntimeError("no VmHWM")


def random_reads(path: Path, jobs: int, runtime: float) -> float:
    """Read 4 KiB at random places, past the page cache; return reads a second."""
    words = [
        "fio", "--name=random", f"--filename={path}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1",
        "--ioengine=psync", "--thread", f"--numjobs={jobs}", "--group_reporting", "--time_based",
        f"--runtime={runtime:g}", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(parse_fio(done.stdout)["jobs"][0]["read"]["iops"])


def parse_fio(text: str) -> dict[str, Any]:
    """Return fio's JSON, before which it may have warned."""
    found = json.loads(text[text.index("{") :])
    assert isinstance(found, dict)
    return found


def seeks_a_second(path: Path, size: int, runtime: float) -> float:
    """Ask for data and holes in turn, as tools do; return how many a second were answered."""
    fd = os.open(path, os.O_RDONLY)
    try:
        asked, position = 0, 0
        begun = time.monotonic()
        while (took := time.monotonic() - begun) < runtime:
            try:
                data = os.lseek(fd, position, os.SEEK_DATA)
                position = os.lseek(fd, data, os.SEEK_HOLE)
            except OSError:  # ENXIO: no more data
                position = 0
            if position >= size:
                position = 0
            asked += 2
        return asked / took
    finally:
        os.close(fd)
