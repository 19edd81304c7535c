# SPDX-License-Identifier: GPL-3.0-or-later
"""The state folder: what must outlive the process that serves a domain.

    /var/lib/backupfs/HOST-UUID/DOMAIN-UUID/
        lock         flock: one mount for each domain; names its holder
        watchdog     flock: the mount, and its watchdog for as long as it lives, longer than a killed mount
        instant      the label of the latest point in time
        job          the backup job that runs, or was left over by a killed process

Each file is replaced whole: written beside, fsynced, renamed, and the folder fsynced, so a crash
leaves the old one or the new one. A checksum tells the rest. The label is in the file's mtime too,
which outlives damage to its contents.

Law: labels never go back, for a copy that saw a later one would miss changes. And what is read here
decides which files are deleted, so the folder must be ours and nobody else's to write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import pwd
import re
import stat
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from backupfs.errors import DomainInUse, StateFolderError

log = logging.getLogger("backupfs.state")

SYSTEM_FOLDER: Final = "/var/lib/backupfs"
_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job of ours: enough to recognise it, to end it, and to remove its files."""

    job_id: str
    socket: str
    scratches: tuple[str, ...]
    domain_id: int
    began: float
    frozen: bool = False  # the guest's file systems may be frozen, by us


def state_folder() -> Path:
    """Return the folder of this user's state; systemd's StateDirectory= comes first.

    A relative path in the environment is ignored, as XDG has it: it would be another folder, and
    another lock, for each working directory.
    """
    if (given := os.environ.get("STATE_DIRECTORY", "").split(":")[0]).startswith("/"):
        return Path(given)
    if os.geteuid() == 0:
        return Path(SYSTEM_FOLDER)
    if (given := os.environ.get("XDG_STATE_HOME", "")).startswith("/"):
        return Path(given, "backupfs")
    home = os.environ.get("HOME", "")
    if not home.startswith("/"):  # mount(8) leaves it unset
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            raise StateFolderError("~/.local/state", f"user {os.geteuid()} has no home; set XDG_STATE_HOME") from None
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
    _reserved: int = 0

    def reserve(self, instant: int) -> None:
        """Note, durably, that labels up to *instant* may be taken; after a crash they go on from there."""
        if instant > self.last_instant:
            self._write("instant", {"instant": instant}, mtime=instant)
            self._reserved = instant

    def take(self, instant: int) -> None:
        """Take a label for something that keeps it elsewhere, durably; of a reserved one nothing is written."""
        if instant > self._reserved:
            self.advance_to(instant)
        assert instant >= self.last_instant
        self.last_instant = instant

    def settle(self) -> None:
        """Note the label that was taken; what was reserved beyond it is free again."""
        self._write("instant", {"instant": self.last_instant}, mtime=self.last_instant)
        self._reserved = 0

    def advance_to(self, instant: int) -> None:
        """Note the label of a point, durably; only then may the point be served."""
        assert instant > self.last_instant
        self._write("instant", {"instant": instant}, mtime=instant)
        self.last_instant = instant

    def record_job(self, record: JobRecord) -> None:
        """Note a job, durably, before it begins."""
        self._write("job", asdict(record))
        self.job = record

    def forget_job(self) -> None:
        """Note that the job is gone."""
        try:
            with contextlib.suppress(FileNotFoundError):
                (self.folder / "job").unlink()
            self._sync()
        except OSError as error:
            raise StateFolderError(str(self.folder), f"cannot remove job: {error.strerror}") from error
        self.job = None

    def _load(self) -> None:
        found = self._read("instant")
        if found is not None:
            instant = _parse_instant(found)
            self.last_instant = self._guess_instant() if instant is None else instant
        self.reload_job()

    def reload_job(self) -> None:
        """Read the job's record again: the watchdog may have ended it, or the mount begun another."""
        self.job = None
        found = self._read("job")
        if found is not None:
            self.job = _parse_job(found)
            if self.job is None:
                log.warning(
                    "%s is damaged: a job that was left over is not known to be ours; end it with `virsh domjobabort`",
                    self.folder / "job",
                )
                self.forget_job()

    def _guess_instant(self) -> int:
        """Return a label that no point since has had, as far as a damaged file can tell."""
        damaged = self.folder / "instant"
        instant = math.ceil(max(damaged.stat().st_mtime, time.time()))
        log.warning("%s is damaged: labels go on from %d", damaged, instant)
        return instant

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateFolderError(str(self.folder), f"cannot read {name}: {error.strerror}") from error

    def _write(self, name: str, value: dict[str, Any], mtime: int | None = None) -> None:
        body = json.dumps(value).encode()
        fresh = self.folder / f"{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(fresh, flags, 0o600), "wb") as file:
                file.write(b"%08x " % zlib.crc32(body) + body)
                file.flush()
                if mtime is not None:
                    os.utime(file.fileno(), (mtime, mtime))
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


def _parse(contents: bytes) -> dict[str, Any] | None:
    """Return what `State._write` wrote; None if it is not whole."""
    checksum, _, body = contents.partition(b" ")
    try:
        value = json.loads(body) if int(checksum, 16) == zlib.crc32(body) else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _parse_instant(contents: bytes) -> int | None:
    instant = (_parse(contents) or {}).get("instant")
    return instant if type(instant) is int and instant >= 0 else None


def _parse_job(contents: bytes) -> JobRecord | None:
    """Return the record; None if it is not whole, or of a version that had other fields."""
    value = _parse(contents) or {}
    frozen = value.get("frozen", False)  # a record of version 0.1 says nothing of it
    match value:
        case {
            "job_id": str(job_id),
            "socket": str(socket),
            "scratches": list(scratches),
            "domain_id": int(domain_id),
            "began": int() | float() as began,
        } if job_id and isinstance(frozen, bool) and all(isinstance(path, str) for path in scratches):
            return JobRecord(job_id, socket, tuple(scratches), domain_id, float(began), frozen)
    return None


def _make_private(folder: Path) -> None:
    """Make *folder* unless it is there; raise StateFolderError unless it is ours alone to write."""
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise StateFolderError(str(folder), f"belongs to user {status.st_uid}; give it to {os.geteuid()}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StateFolderError(str(folder), f"others may write to it; run `chmod go-w {folder}`")


@contextlib.contextmanager
def open_state(host_uuid: str, domain_uuid: str, *, domain: str, holder: str) -> Iterator[State]:
    """Take hold of a domain's state; *holder* (the mount point) is told to whoever comes second.

    Raises DomainInUse, StateFolderError. The lock goes with the process, however it ends, and is
    not handed to programs that it starts; a child by fork would keep it.
    """
    base = state_folder()
    for key in (host_uuid, domain_uuid):
        if not _KEY.fullmatch(key):
            raise StateFolderError(str(base), f"{key[:100]!a} cannot be the name of a folder in it")
    folder = base / host_uuid / domain_uuid
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        for each in (base, folder.parent, folder):
            _make_private(each)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateFolderError(str(folder), error.strerror or str(error)) from error
    try:
        _take(lock, folder, domain, f"process {os.getpid()} at {holder}")
        state = State(folder)
        state._load()
        yield state
    finally:
        os.close(lock)


@dataclass(eq=False)
class WatchLock:
    """The lock of whoever may clean up after a mount. Got with `open_watch_lock`.

    It belongs to the open file, not to a process: the mount takes it and its watchdog inherits
    the file, so there is no moment at which neither has it.
    """

    folder: Path
    file: int

    def take(self) -> bool:
        """Take it, and leave word of who has; False if another has it."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StateFolderError(str(self.folder), f"cannot lock it: {error.strerror}") from error
        self.sign()
        return True

    def sign(self) -> None:
        """Leave word that this process has it."""
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, b"process %d" % os.getpid(), 0)

    @property
    def holder(self) -> str:
        """The word that was left."""
        return os.pread(self.file, 4096, 0).decode(errors="replace") or "another process"


@contextlib.contextmanager
def open_watch_lock(folder: Path) -> Iterator[WatchLock]:
    """Open the lock file; what is taken is held until every process that has the file has closed it."""
    try:
        file = os.open(folder / "watchdog", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateFolderError(str(folder), f"cannot open watchdog: {error.strerror}") from error
    try:
        yield WatchLock(folder, file)
    finally:
        os.close(file)


def _take(lock: int, folder: Path, domain: str, holder: str) -> None:
    """Lock, and leave word of who holds it; raise DomainInUse with the word that was left."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(lock, 0)
        os.pwrite(lock, holder.encode("utf-8", "surrogateescape"), 0)
    except BlockingIOError:
        raise DomainInUse(domain, os.pread(lock, 4096, 0).decode(errors="replace") or "another process") from None
    except OSError as error:
        raise StateFolderError(str(folder), f"cannot lock it: {error.strerror}") from error
