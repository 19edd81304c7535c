# SPDX-License-Identifier: GPL-3.0-or-later
"""contrib/udev: what raises the read-ahead of an ordinary user's mount, run as its service runs it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import Guest

from .conftest import MIB, Mounter, wait_until

SCRIPT = Path(__file__).parents[2] / "contrib/udev/backupfs-read-ahead"
NOBODY = 65534
INIT = 26


@dataclass
class Young:
    """A mount whose INIT nobody has answered yet; the test is the file system."""

    path: Path
    fuse: int

    @property
    def device(self) -> str:
        number = next(
            line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(self.path) in line
        )
        assert number.startswith("0:")
        return number

    @property
    def read_ahead(self) -> int:
        return int(Path(f"/sys/class/bdi/{self.device}/read_ahead_kb").read_text())

    def answer_init(self) -> None:
        """Do as libfuse: agree to what the kernel offers, which is what its read-ahead was when it asked."""
        request = os.read(self.fuse, 2**17)
        length, opcode, unique = struct.unpack_from("=IIQ", request)
        assert (length, opcode) == (len(request), INIT)
        major, minor, read_ahead, _flags = struct.unpack_from("=IIII", request, 40)
        answer = struct.pack("=IIIIHHIIHHII24x", major, minor, read_ahead, 0, 12, 9, 131072, 1, 0, 0, 0, 0)
        os.write(self.fuse, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)


@contextlib.contextmanager
def open_young(kind: str) -> Iterator[Young]:
    """Mount as fusermount3 does for an ordinary user."""
    libc = ctypes.CDLL(None, use_errno=True)
    with tempfile.TemporaryDirectory(prefix="backupfs-test-", dir="/tmp") as folder:
        path = Path(folder)
        fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            words = f"fd={fuse},rootmode=40000,user_id={NOBODY},group_id={NOBODY}".encode()
            assert libc.mount(b"young", os.fsencode(path), kind.encode(), 6, words) == 0, os.strerror(
                ctypes.get_errno()
            )
            try:
                yield Young(path, fuse)
            finally:
                libc.umount2(os.fsencode(path), 2)  # lazily, if the test has not done it
        finally:
            os.close(fuse)


@contextlib.contextmanager
def running(device: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([SCRIPT, device], stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        _, told = process.communicate()
        assert told == b""


def test_read_ahead_is_raised_again_after_the_answer_to_init_has_set_it_back() -> None:
    with open_young("fuse.backupfs") as young:
        assert young.read_ahead == 128
        with running(young.device) as process:
            wait_until(lambda: young.read_ahead == 1024)
            young.answer_init()  # by now the kernel has set it back, and with bad luck it is up again
            wait_until(lambda: young.read_ahead == 1024)
            # The user mounts the next one on the same number while the service still runs.
            Path(f"/sys/class/bdi/{young.device}/read_ahead_kb").write_text("128")
            wait_until(lambda: young.read_ahead == 1024)
            subprocess.run(["umount", "-i", young.path], check=True)
            assert process.wait(30) == 0


def test_answer_to_init_sets_the_read_ahead_back() -> None:
    with open_young("fuse.backupfs") as young:
        Path(f"/sys/class/bdi/{young.device}/read_ahead_kb").write_text("1024")
        young.answer_init()
        assert young.read_ahead == 128


@pytest.mark.parametrize("kind", ["fuse", "fuse.sshfs", "fuse.backupfs2"])
def test_other_file_systems_are_left_alone(kind: str) -> None:
    with open_young(kind) as young, running(young.device) as process:
        assert process.wait(5) == 0
        assert young.read_ahead == 128


def test_device_that_is_gone_is_no_failure() -> None:
    with running("0:99999") as process:
        assert process.wait(5) == 0


def test_status_of_a_mount_tells_what_was_raised_later(guest: Guest, mount: Mounter) -> None:
    mounted = mount(guest)
    os.listdir(mounted.path)
    number = mounted.path.stat().st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    kernel = Path(f"/sys/class/bdi/{device}/read_ahead_kb")
    kernel.write_text("128")  # as it is for an ordinary user
    assert mounted.status()["read_ahead"] == MIB // 8
    assert "read-ahead: 128.0 KiB; sequential reads are faster" in mounted.command("status").stdout
    with running(device):
        wait_until(lambda: kernel.read_text() == "1024\n")
    assert mounted.status()["read_ahead"] == MIB
    assert "read-ahead" not in mounted.command("status").stdout
