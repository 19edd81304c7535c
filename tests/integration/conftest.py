# SPDX-License-Identifier: GPL-3.0-or-later
"""Real parts: a libvirt of the tests' own, guests, and mounts by the installed command."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lab import Disk, Guest, Libvirt, open_guest, open_libvirt

COMMAND = Path(sys.executable).with_name("backupfs")
MIB = 2**20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a file's tests run in one process, for they share a guest."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session")
def lab() -> Iterator[Libvirt]:
    """A libvirtd of this process's own."""
    # /tmp, because a socket's path must be short and QEMU is another user.
    folder = Path(tempfile.mkdtemp(prefix="bl", dir="/tmp"))
    folder.rmdir()
    with open_libvirt(folder) as libvirt:
        yield libvirt


@pytest.fixture(scope="module")
def guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest with one ext4 disk, mounted on /mnt; shared by a file's tests."""
    with open_guest(lab, [Disk("vda", ext4=True, size=96 * MIB)]) as found:
        found.run("mount -t ext4 /dev/vda /mnt")
        yield found


@pytest.fixture
def own_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest for one test, which may break it; its disk has no file system."""
    with open_guest(lab, [Disk("vda", size=32 * MIB)]) as found:
        yield found


@dataclass(eq=False)
class Mounted:
    """A mount made by the installed command in the foreground, its log in hand."""

    guest: Guest
    path: Path
    process: subprocess.Popen[bytes]
    log_file: Path
    env: dict[str, str]

    @property
    def raw(self) -> Path:
        return self.path / "raw"

    @property
    def image(self) -> Path:
        return self.path / "raw/vda.raw"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def status(self) -> dict[str, Any]:
        found = json.loads((self.path / ".backupfs/status.json").read_text())
        assert isinstance(found, dict)
        return found

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `backupfs WORD MOUNTPOINT`."""
        return subprocess.run([COMMAND, *words, self.path], capture_output=True, text=True, env=self.env, check=False)

    def release(self) -> None:
        done = self.command("release")
        assert done.returncode == 0, done.stderr

    def wait_log(self, text: str, timeout: float = 30.0) -> None:
        """Wait until the log holds *text*."""
        wait_until(lambda: text in self.log, timeout, lambda: f"no {text!r} in: {self.log}")

    def unmount(self, within: float = 30.0) -> None:
        """Unmount as an administrator does, and see that nothing is left."""
        subprocess.run(["umount", self.path], check=True)
        assert self.process.wait(within) == 0, self.log
        assert watchdogs(self.path) == []
        assert_nothing_left(self.guest)


def watchdogs(path: Path) -> list[int]:
    """The watchdogs of the mount at *path*."""
    done = subprocess.run(["pgrep", "-f", f"backupfs.watchdog .* {path}$"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]


def wait_until(true: Callable[[], object], timeout: float = 30.0, why: Callable[[], str] = lambda: "") -> None:
    """Wait until *true* holds, by asking: for what no event tells a test."""
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, why()
        time.sleep(0.02)


def assert_nothing_left(guest: Guest) -> None:
    """No job, no socket, no scratch file."""
    with pytest.raises(RuntimeError, match=r"domain backup|no current backup"):
        guest.libvirt.virsh("backup-dumpxml", guest.uuid)
    left = [str(path) for path in guest.libvirt.folder.rglob("*backupfs-*")]
    assert left == []


@dataclass(eq=False)
class Mounter:
    """Makes mounts, and takes away what a test leaves."""

    folder: Path
    made: list[Mounted] = field(default_factory=list)

    def env(self, lab: Libvirt) -> dict[str, str]:
        return {**os.environ, **lab.env, "STATE_DIRECTORY": str(self.folder / "state")}

    def mount_point(self) -> Path:
        path = self.folder / f"mnt{len(self.made)}"
        path.mkdir(exist_ok=True)
        return path

    def __call__(self, guest: Guest, options: str = "", *, path: Path | None = None) -> Mounted:
        path = path or self.mount_point()
        log = self.folder / f"log{len(self.made)}"
        words = ",".join(word for word in (f"uri={guest.libvirt.uri}", "debug", options) if word)
        env = self.env(guest.libvirt)
        with open(log, "wb") as file:
            process = subprocess.Popen([COMMAND, "-f", "-o", words, guest.name, path], env=env, stderr=file)
        mounted = Mounted(guest, path, process, log, env)
        self.made.append(mounted)
        wait_until(
            lambda: " mounted at " in mounted.log or process.poll() is not None, 30, lambda: f"no mount: {mounted.log}"
        )
        assert process.poll() is None, mounted.log
        return mounted

    def clean(self) -> None:
        for mounted in self.made:
            print(mounted.log)  # shown where the test fails
            if mounted.process.poll() is None:
                mounted.process.send_signal(signal.SIGCONT)
                mounted.process.terminate()
                try:
                    mounted.process.wait(30)
                except subprocess.TimeoutExpired:
                    mounted.process.kill()
                    mounted.process.wait()
            with contextlib.suppress(subprocess.CalledProcessError):
                # Lazily: the test has ended, nobody looks any more.
                subprocess.run(["umount", "-l", mounted.path], check=True, capture_output=True)


@pytest.fixture
def mount() -> Iterator[Mounter]:
    """Mount a guest: `mount(guest, "idle=2")`."""
    folder = Path(tempfile.mkdtemp(prefix="backupfs-test-", dir="/tmp"))
    folder.chmod(0o755)  # some tests look in as another user
    mounter = Mounter(folder)
    try:
        yield mounter
    finally:
        mounter.clean()
        shutil.rmtree(folder)
