# SPDX-License-Identifier: GPL-3.0-or-later
"""A backup job of ours, from its record to its end: the real one, and each short one before it.

    record ─► watchdog ─► begin ─► (used) ─► abort ─► wait until libvirt has ended it ─► record gone

Law: the job's record is on disk before the job begins and goes only after the job is gone, so
whatever kills this process, the watchdog and the next mount know which job is ours. A job that is
not in the record is never touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from backupfs import domainxml
from backupfs.domain import Domain
from backupfs.errors import LibvirtRefused
from backupfs.keeper import Keeper
from backupfs.leftover import end_job
from backupfs.options import Options
from backupfs.state import JobRecord, State

log = logging.getLogger("backupfs.launch")

LONGEST_SOCKET_PATH: Final = 107  # bytes in sockaddr_un.sun_path, less the closing NUL


@dataclass(frozen=True, slots=True)
class Survey:
    """What the domain has and what of it takes part; made before anything begins."""

    domain: domainxml.DomainFacts
    disks: tuple[domainxml.Disk, ...]
    selection: domainxml.Selection


@dataclass(frozen=True, slots=True)
class Backup:
    """A running job. *bitmap* is what the bitmap of each disk's base is called over NBD."""

    job_id: str
    socket: str
    bitmap: str
    scratches: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Launcher:
    """Begins and ends the jobs of one mount."""

    domain: Domain
    state: State
    options: Options
    keeper: Keeper

    def scratch_folders(self, disks: tuple[domainxml.Disk, ...]) -> set[str]:
        """Return the folders where QEMU would save the old blocks of *disks*."""
        return {os.path.dirname(path) for path in self._scratches(disks, "").values()}

    def _scratches(self, disks: tuple[domainxml.Disk, ...], job_id: str) -> dict[str, str]:
        return {
            disk.target: domainxml.scratch_path(disk, job_id, self.options.scratch, self.domain.name) for disk in disks
        }

    @contextlib.asynccontextmanager
    async def open(
        self,
        seen: Survey,
        disks: tuple[domainxml.Disk, ...],
        begin: Callable[[str], Awaitable[None]],
        *,
        bases: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Backup]:
        """Begin a job on *disks* of *seen* by *begin*, which is handed its XML; end it on the way out.

        *bases* are the checkpoints that each disk's changes are counted from. Raises WatchdogGone and
        what *begin* raises.
        """
        job_id = secrets.token_hex(8)
        scratches = self._scratches(disks, job_id)
        socket = _socket_path(self.domain, self.state, seen.domain, job_id)
        backup = Backup(job_id, socket, f"backupfs-{job_id}", scratches)
        record = JobRecord(
            job_id=job_id,
            socket=socket,
            scratches=tuple(scratches.values()),
            domain_id=seen.domain.id,
            began=time.time(),
        )
        xml = domainxml.render_backup(
            seen.disks, disks, socket=socket, scratches=scratches, bases=bases, bitmap=backup.bitmap
        )
        self.state.record_job(record)
        try:
            await self.keeper.begin(record)
            log.debug("%s: a backup job begins, on %s", self.domain.name, socket)
            await begin(xml)
            self.keeper.began()
            yield backup
        finally:
            await end_job(self.domain, self.state, record)
            self.keeper.ended()


def _socket_path(domain: Domain, state: State, facts: domainxml.DomainFacts, job_id: str) -> str:
    """Choose where QEMU shall listen: its own folder, which no other user can enter.

    AppArmor and SELinux let QEMU write there, which they do of few other places. Where that
    folder is not to be seen, a folder of ours, opened to the domain's QEMU alone.
    """
    for base in _libvirt_folders(domain.uri):
        for folder in sorted(base.glob(f"domain-{facts.id}-*")):
            path = str(folder / f"backupfs-{job_id}.sock")
            if folder.is_dir() and len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
                return path
    folder = Path("/run/backupfs", domain.uuid) if os.geteuid() == 0 else state.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)  # whatever an older one was
    if os.geteuid() == 0:
        folder.parent.chmod(0o711)
        if facts.qemu_user is not None:
            os.chown(folder, *facts.qemu_user)
    path = str(folder / f"backupfs-{job_id}.sock")
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise LibvirtRefused(domain.name, "begin a backup", f"the socket's path {path} is too long for a socket")
    return path


def _libvirt_folders(uri: str) -> list[Path]:
    if "/session" not in uri:
        return [Path("/var/lib/libvirt/qemu")]
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return [Path(config, "libvirt/qemu/lib")]
