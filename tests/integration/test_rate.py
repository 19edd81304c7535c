# SPDX-License-Identifier: GPL-3.0-or-later
"""`rate=` on a real mount: what is read from the guest's host takes its time, zeros take none."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounter

SIZE = 32 * MIB


@pytest.fixture(scope="module")
def two_disks(lab: Libvirt) -> Iterator[Guest]:
    """A guest with two disks of 32 MiB of data; the second has 512 MiB of nothing behind."""
    with tempfile.TemporaryDirectory(prefix="backupfs-rate-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        for target, size in (("vda", SIZE), ("vdb", SIZE + 512 * MIB)):
            path = folder / target
            path.write_bytes(os.urandom(SIZE))
            os.truncate(path, size)
            path.chmod(0o666)
        with open_guest(lab, [Disk(name, format="raw", path=folder / name) for name in ("vda", "vdb")]) as guest:
            yield guest


def start(path: Path, skip: int, count: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=256K", f"skip={skip * 4}", f"count={count * 4}"],
                            stderr=subprocess.DEVNULL)  # fmt: skip


@pytest.mark.parametrize("readers", [1, 4])
def test_reading_takes_as_long_as_the_rate_says(two_disks: Guest, mount: Mounter, readers: int) -> None:
    mounted = mount(two_disks, "rate=8M,exclude=vdb" if readers == 1 else "rate=8M")
    disks = [mounted.raw / "vda.raw", mounted.raw / "vdb.raw"][: 1 if readers == 1 else 2]
    assert all(path.exists() for path in disks)  # the point has begun
    status = mounted.status()
    assert status["rate_limit"] == 8 * MIB
    assert "rate limit:   8.0 MiB/s" in mounted.command("status").stdout
    begun = time.monotonic()
    if readers == 1:
        running = [start(disks[0], 0, 32)]
    else:
        # Two on each disk, 8 MiB each.
        running = [start(disks[number % 2], number // 2 * 16, 8) for number in range(4)]
    assert [process.wait() for process in running] == [0] * readers
    took = time.monotonic() - begun
    read = sum(disk["read"] for disk in mounted.status()["disks"].values())
    assert 32 * MIB <= read <= 32 * MIB * 1.25
    assert took == pytest.approx(4.0, rel=0.15) if readers == 1 else took == pytest.approx(read / (8 * MIB), rel=0.15)
    mounted.unmount()


def test_zeros_cost_nothing_and_time_outs_do_not_count_the_wait(two_disks: Guest, mount: Mounter) -> None:
    mounted = mount(two_disks, "rate=1M,timeout=2,exclude=vda")
    image = mounted.raw / "vdb.raw"
    begun = time.monotonic()
    with open(image, "rb", buffering=0) as file:
        file.seek(SIZE)
        while data := file.read(4 * MIB):
            assert not any(data)
    assert mounted.status()["disks"]["vdb"]["read"] == 0
    assert time.monotonic() - begun < 100  # of 512 s
    begun = time.monotonic()
    # Four at once wait for longer than the time-out, for the rate, and none fails.
    running = [start(image, number * 8, 2) for number in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert time.monotonic() - begun > 4
    mounted.unmount()


def test_reader_who_waits_for_his_turn_is_told_when_the_point_ends(two_disks: Guest, mount: Mounter) -> None:
    mounted = mount(two_disks, "rate=64K,exclude=vdb")
    assert (mounted.raw / "vda.raw").stat().st_size == SIZE
    process = start(mounted.raw / "vda.raw", 0, 8)
    # The first megabyte is in the bucket; for the next one 16 s would pass.
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1.5)
    begun = time.monotonic()
    mounted.release()  # ends the point, and with it the wait
    assert process.wait(20) != 0
    assert time.monotonic() - begun < 5
    mounted.unmount()
