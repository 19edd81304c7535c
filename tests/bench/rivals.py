# SPDX-License-Identifier: GPL-3.0-or-later
"""backupfs and its rivals, each a process that serves one export as a file.

Each is got with `with open_…`, which ends when the file is there, and takes it off on the way
out. They run in sessions of their own: a Ctrl-C is for us, who then end them in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lab import Guest

from tests.bench.figures import Unavailable

COMMAND: Final = Path(sys.executable).with_name("backupfs")
READ_AHEAD: Final = 1024  # KiB
START_SECONDS: Final = 30.0
_PR_SET_PDEATHSIG: Final = 1


def wait_until(true: Callable[[], object], seconds: float = START_SECONDS, what: str = "it") -> None:
    """Wait by asking, for what no event tells; raise TimeoutError."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.01)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def open_server(words: list[str | Path], log: Path, env: dict[str, str] | None = None) -> Iterator[Any]:
    """Run a server; on the way out wait for its end, and bring it about if it does not come."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            words, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=_die_with_parent,  # noqa: PLW1509  # no thread but ours
        )  # fmt: skip
    try:
        yield process
    finally:
        for seconds, end in ((0.0 if process.poll() is None else 5.0, process.terminate), (15.0, process.kill)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
            if process.poll() is None:
                end()
        process.wait()


@contextlib.contextmanager
def _mounted(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        if os.path.ismount(path) or str(path) in Path("/proc/self/mounts").read_text():
            subprocess.run(["umount", "-l", path], check=False, capture_output=True)


@dataclass(frozen=True, slots=True)
class Served:
    """A file, and the process that serves it."""

    file: Path
    pid: int


def raise_read_ahead(path: Path) -> None:
    """Let the kernel read as far ahead on this mount as backupfs has it."""
    device = os.stat(path).st_dev
    Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").write_text(str(READ_AHEAD))


def uri(socket: str, export: str) -> str:
    """Write the NBD URI of a job's export."""
    return f"nbd+unix:///{export}?socket={socket}"


@contextlib.contextmanager
def open_nbdfuse(folder: Path, socket: str, export: str, *, raised: bool = False) -> Iterator[Served]:
    """libnbd's own file system; read-ahead as the kernel has it, unless *raised*."""
    point = folder / f"nbdfuse{int(raised)}-{export}"
    point.mkdir()
    file = point / "nbd.raw"
    with open_server(["nbdfuse", "-r", file, uri(socket, export)], folder / "log") as process, _mounted(point):
        wait_until(lambda: os.path.ismount(point) and file.exists(), what="nbdfuse")
        if raised:
            raise_read_ahead(file)
        yield Served(file, process.pid)


@contextlib.contextmanager
def open_storage_daemon(folder: Path, socket: str, export: str) -> Iterator[Served]:
    """QEMU's FUSE export of the same NBD export."""
    if shutil.which("qemu-storage-daemon") is None:
        raise Unavailable("this distribution has no qemu-storage-daemon")
    file = folder / f"qsd-{export}"
    file.touch()
    log = folder / "qsd.log"
    words: list[str | Path] = [
        "qemu-storage-daemon",
        "--blockdev", f"driver=nbd,node-name=disk,read-only=on,server.type=unix,server.path={socket},export={export}",
        "--export", f"type=fuse,id=file,node-name=disk,mountpoint={file},writable=off",
    ]  # fmt: skip
    with open_server(words, log) as process, _mounted(file):
        wait_until(lambda: file.stat().st_size or process.poll() is not None, what="qemu-storage-daemon")
        if process.poll() is not None:
            raise Unavailable(f"qemu-storage-daemon has no FUSE export: {log.read_text().strip()}")
        yield Served(file, process.pid)


@contextlib.contextmanager
def open_memory(folder: Path, size: int) -> Iterator[Served]:
    """A pyfuse3 file system that answers from memory."""
    point = folder / "memory"
    point.mkdir()
    file = point / "memory.raw"
    words: list[str | Path] = [sys.executable, "-m", "tests.bench.memoryfs", point, str(size)]
    with open_server(words, folder / "log") as process, _mounted(point):
        wait_until(lambda: os.path.ismount(point) and file.exists(), what="the file system in memory")
        raise_read_ahead(file)
        yield Served(file, process.pid)


@dataclass(frozen=True, slots=True)
class Backupfs:
    """A mount of ours, served in the foreground."""

    path: Path
    pid: int
    log: Path
    env: dict[str, str]

    def image(self, target: str = "vda") -> Path:
        return self.path / f"raw/{target}.raw"

    def status(self) -> dict[str, Any]:
        found = json.loads((self.path / ".backupfs/status.json").read_text())
        assert isinstance(found, dict)
        return found

    def bytes_read(self) -> int:
        """How much has come over NBD in this point in time."""
        return sum(disk["read"] for disk in self.status()["disks"].values())

    def begin(self) -> float:
        """End the point, begin the next; return how many seconds its begin took, without the wait for its label."""
        self.release()
        os.stat(self.image())
        return self.took()

    def release(self) -> None:
        subprocess.run([COMMAND, "release", self.path], env=self.env, check=True, capture_output=True)

    def took(self) -> float:
        """How many seconds the latest begin took, as backupfs itself logs it."""
        return int(re.findall(r"made in (\d+) ms", self.log.read_text())[-1]) / 1000


@contextlib.contextmanager
def open_backupfs(folder: Path, guest: Guest, options: str = "") -> Iterator[Backupfs]:
    """Mount a guest's disks; what no such option is known for raises Unavailable."""
    point = folder / f"mnt-{guest.name}"
    point.mkdir(exist_ok=True)
    log = folder / f"log-{guest.name}"
    env = {**os.environ, **guest.libvirt.env, "STATE_DIRECTORY": str(folder / "state")}
    words = ",".join(word for word in (f"uri={guest.libvirt.uri}", options) if word)
    with open_server([COMMAND, "-f", "-o", words, guest.name, point], log, env) as process, _mounted(point):
        wait_until(lambda: " mounted at " in log.read_text() or process.poll() is not None, what="backupfs")
        if process.poll() is not None:
            if "unknown option" in log.read_text():
                raise Unavailable(log.read_text().strip().splitlines()[-1])
            raise RuntimeError(log.read_text())
        try:
            yield Backupfs(point, process.pid, log, env)
        except OSError as error:
            raise RuntimeError(f"{error}; {log.read_text()}") from error
