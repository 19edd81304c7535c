# SPDX-License-Identifier: GPL-3.0-or-later
"""The state folder: what must outlive the process that serves a domain.

    /var/lib/backupfs/HOST-UUID/DOMAIN-UUID/
        lock         flock: one mount for each domain; names its holder
        instant      the label of the latest point in time
        job          the backup job that runs, or was left over by a killed process

Each file is replaced whole: written beside, fsynced, renamed, and the folder fsynced, so a crash
leaves the old one or the new one. A checksum tells the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import pwd
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from backupfs.errors import DomainInUse, StateFolderError

log = logging.getLogger("backupfs.state")

SYSTEM_FOLDER: Final = "/var/lib/backupfs"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job of ours: enough to recognise it, to end it, and to remove its files."""

    job_id: str
    socket: str
    scratches: tuple[str, ...]
    domain_id: int
    began: float


def state_folder() -> Path:
    """Return the folder of this user's state; systemd's StateDirectory= comes first."""
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if os.geteuid() == 0:
        return Path(SYSTEM_FOLDER)
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given, "backupfs")
    # mount(8) leaves HOME unset.
    home = os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir
    return Path(home, ".local/state/backupfs")


def next_instant(now: float, last: int) -> int:
    """Return the label of a point that began at *now*: not before it, and after *last*."""
    return max(math.ceil(now), last + 1)


@dataclass(eq=False)
class State:
    """One domain's state. Got with `open_state`, by one process at a time."""

    folder: Path
    last_instant: int = 0
    job: JobRecord | None = None

    def advance_to(self, instant: int) -> None:
        """Note the label of a point, durably; only then may the point be served."""
        assert instant > self.last_instant
        self._write("instant", {"instant": instant})
        self.last_instant = instant

    def record_job(self, record: JobRecord) -> None:
        """Note a job, durably, before it begins."""
        self._write("job", asdict(record))
        self.job = record

    def forget_job(self) -> None:
        """Note that the job is gone."""
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "job").unlink()
        self._sync()
        self.job = None

    def _load(self) -> None:
        instant = self._read("instant")
        if instant is not None:
            self.last_instant = int(instant["instant"])
        elif (damaged := self.folder / "instant").exists():
            # The label was of before the file was written last, or of soon after.
            self.last_instant = math.ceil(max(damaged.stat().st_mtime, time.time())) + 1
            log.warning("%s is damaged: labels go on from %d", damaged, self.last_instant)
        job = self._read("job")
        if job is not None:
            job["scratches"] = tuple(job["scratches"])
            self.job = JobRecord(**job)
        elif (self.folder / "job").exists():
            log.warning(
                "%s is damaged: a job that was left over is not known to be ours; end it with `virsh domjobabort`",
                self.folder / "job",
            )
            self.forget_job()

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            checksum, _, body = (self.folder / name).read_bytes().partition(b" ")
            if int(checksum, 16) != zlib.crc32(body):
                return None
            value = json.loads(body)
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        fresh = self.folder / f"{name}.new"
        try:
            with open(fresh, "wb") as file:
                file.write(b"%08x " % zlib.crc32(body) + body)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self.folder / name)
            self._sync()
        except OSError as error:
            raise StateFolderError(str(self.folder), f"cannot write {name}: {error.strerror}") from error

    def _sync(self) -> None:
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def open_state(host_uuid: str, domain_uuid: str, *, domain: str, holder: str) -> Iterator[State]:
    """Take hold of a domain's state; *holder* (the mount point) is told to whoever comes second.

    Raises DomainInUse, StateFolderError. The lock goes with the process, however it ends.
    """
    folder = state_folder() / host_uuid / domain_uuid
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateFolderError(str(folder), error.strerror or str(error)) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DomainInUse(domain, os.pread(lock, 4096, 0).decode(errors="replace") or "another process") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} at {holder}".encode("utf-8", "surrogateescape"), 0)
        state = State(folder)
        state._load()
        yield state
    finally:
        os.close(lock)
