# SPDX-License-Identifier: GPL-3.0-or-later
"""One point in time: a backup job, its exports, and what a restore needs besides the disks.

    clear left-overs ─► survey ─► scratch room ─► probe the agent ─► nvram ─► record ─► watchdog
      ─► freeze ─► backupBegin ─► thaw ─► connect NBD ─► extent maps ─► label ─► serve
                        │
                        └─► end: close NBD                        in reverse, whatever happened on the way:
                      └─► abort the job ─► wait until libvirt has ended it ─► remove socket and scratch

Law: the job's record is on disk before the job begins and goes only after the job is gone, so
whatever kills this process, the next mount knows which job is ours. A job that is not in the
record is never touched.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from backupfs import domainxml
from backupfs.domain import Domain
from backupfs.errors import (
    BackupfsError,
    DomainNotRunning,
    ForeignJob,
    LibvirtRefused,
    LibvirtUnavailable,
)
from backupfs.export import Export, open_export
from backupfs.forms import Forms
from backupfs.image import RawImage
from backupfs.keeper import Keeper
from backupfs.leftover import clear_left_over, end_job
from backupfs.link import in_thread
from backupfs.nbdclient import Address
from backupfs.options import Options
from backupfs.preflight import check_scratch
from backupfs.quiesce import Quiesced, open_freezer
from backupfs.rate import Bucket
from backupfs.state import JobRecord, State, next_instant
from backupfs.window import BLOCK

log = logging.getLogger("backupfs.point")

LONGEST_SOCKET_PATH: Final = 107  # bytes in sockaddr_un.sun_path, less the closing NUL
NVRAM_ATTEMPTS: Final = 5


@dataclass(frozen=True, slots=True)
class Survey:
    """What the domain has and what of it takes part; made before anything begins."""

    domain: domainxml.DomainFacts
    disks: tuple[domainxml.Disk, ...]
    selection: domainxml.Selection


@dataclass(eq=False)
class Point:
    """One instant of a domain, being served. Got with `open_point`.

    `instant` is its label, in whole seconds since 1970; `generation` tells it from the other
    points of this mount; `took` is how many seconds its begin took, without the wait for
    its label. `over` is set before its job ends and never cleared.
    """

    generation: int
    domain: str
    job_id: str
    socket: str
    began: float
    took: float
    instant: int
    images: Mapping[str, RawImage[Export]]  # the disks, by target
    forms: Forms[Export]
    exports: Mapping[str, Export]
    scratches: Mapping[str, str]
    left_out: Mapping[str, domainxml.Reason]
    quiesced: Quiesced = field(default_factory=Quiesced)
    over: bool = False
    lost: str | None = field(default=None)


async def survey(domain: Domain, options: Options) -> Survey:
    """Look at the domain and decide which disks take part.

    Raises UsageError for a name in `disks=` or `exclude=` that the domain does not have, and
    DiskUnusable for a disk that belongs into the backup but cannot take part as things are.
    """
    xml = await domain.live_xml()
    disks = domainxml.parse_disks(xml)
    selection = domainxml.select_disks(
        disks, domain=domain.name, only=options.disks, exclude=options.exclude, scratch=options.scratch
    )
    return Survey(domainxml.parse_domain(xml), disks, selection)


@contextlib.asynccontextmanager
async def open_point(
    domain: Domain,
    state: State,
    options: Options,
    *,
    keeper: Keeper,
    generation: int,
    on_lost: Callable[[str], None],
) -> AsyncIterator[Point]:
    """Begin a point in time and serve it; end its job on the way out.

    *on_lost* is called, in the trio thread, with the reason when the exports are found dead.
    Raises DomainNotRunning, ForeignJob, DiskUnusable, ScratchFull, ScratchUnusable, WatchdogGone, NotQuiesced,
    LibvirtRefused and what NBD can raise.
    """
    started = trio.current_time()
    if not await domain.is_alive():
        raise DomainNotRunning(domain.name, await domain.state())
    await clear_left_over(domain, state)
    if (job := await domain.job_statistics()) is not None:
        raise ForeignJob(domain.name, f"a {job.operation} job")
    seen = await survey(domain, options)
    if not seen.selection.taking:
        raise LibvirtRefused(domain.name, "begin a backup", "no disk of the domain can take part")

    if (other := await domain.block_job([disk.target for disk in seen.selection.taking])) is not None:
        raise ForeignJob(domain.name, other)

    job_id = secrets.token_hex(8)
    scratches = {
        disk.target: domainxml.scratch_path(disk, job_id, options.scratch, domain.name)
        for disk in seen.selection.taking
    }
    await in_thread(
        functools.partial(
            check_scratch,
            {os.path.dirname(path) for path in scratches.values()},
            options.scratch_reserve,
            domain=domain.name,
            uuid=domain.uuid,
            uri=domain.uri,
        )
    )
    socket = _socket_path(domain, state, seen.domain, job_id)
    record = JobRecord(
        job_id=job_id,
        socket=socket,
        scratches=tuple(scratches.values()),
        domain_id=seen.domain.id,
        began=time.time(),
    )
    backup_xml = domainxml.render_backup(seen.disks, seen.selection.taking, socket=socket, scratches=scratches)
    async with contextlib.AsyncExitStack() as stack:
        async with open_freezer(domain, state, options.quiesce) as freezer:
            nvram, nvram_reason = await _read_nvram(domain, seen.domain.nvram)
            restore_xml = await domain.restore_xml()
            state.record_job(record)
            stack.callback(keeper.ended)
            stack.push_async_callback(end_job, domain, state, record)
            await keeper.begin(record)
            log.debug("%s: a backup job begins, on %s", domain.name, socket)
            quiesced = await freezer.begin(lambda: domain.begin_backup(backup_xml))
        keeper.began()
        began = time.time()
        nvram, nvram_reason = await _settle_nvram(domain, seen.domain.nvram, nvram, nvram_reason)

        async def allow_reconnect() -> bool:
            return await _is_ours(domain, socket, on_lost)

        bucket = Bucket(options.rate, BLOCK) if options.rate is not None else None
        exports: dict[str, Export] = {}
        for disk in seen.selection.taking:
            exports[disk.target] = await stack.enter_async_context(
                open_export(
                    Address(socket, disk.target),
                    connections=options.connections,
                    timeout=options.timeout,
                    allow_reconnect=allow_reconnect,
                    bucket=bucket,
                )
            )
        if bucket is not None:
            stack.callback(bucket.close)
        files = {}
        left_out = dict(seen.selection.left_out)
        if nvram is not None:
            files["nvram.fd"] = nvram
        elif nvram_reason is not None:
            left_out["nvram"] = nvram_reason
        images = {target: RawImage(export, export.extents) for target, export in exports.items()}
        maps = {target: export.extents for target, export in exports.items()}
        took = trio.current_time() - started
        instant = await _label(domain.name, state)
        yield Point(
            generation=generation,
            domain=domain.name,
            job_id=job_id,
            socket=socket,
            began=began,
            took=took,
            instant=instant,
            images=images,
            forms=Forms(domain.name, domain.uuid, instant, restore_xml, files, images, maps),
            exports=exports,
            scratches=scratches,
            left_out=left_out,
            quiesced=quiesced,
        )


async def _label(domain: str, state: State) -> int:
    """Give the point its label, durably, and wait until the clock has reached it.

    The label is taken after the job began, so nothing in the point is younger than it says.
    rsync and its like compare whole seconds, hence two points never share one.
    """
    instant = next_instant(time.time(), state.last_instant)
    ahead = instant - time.time()
    if ahead > 1.0:
        log.warning(
            "%s: the clock is %.0f s behind the last point in time; labels run ahead of it until it has caught up",
            domain,
            math.ceil(ahead),
        )
    else:
        await trio.sleep(ahead)
    state.advance_to(instant)
    return instant


async def _is_ours(domain: Domain, socket: str, on_lost: Callable[[str], None]) -> bool:
    """Whether the job on *socket* still runs, so that a broken NBD connection may be made again."""
    try:
        xml = await domain.backup_xml()
    except LibvirtUnavailable:
        # libvirtd is away too. The socket's name is that of one job only, so whatever
        # answers there is that job.
        return True
    except BackupfsError as error:
        on_lost(str(error))
        return False
    if xml is not None and domainxml.parse_backup(xml).socket == socket:
        return True
    on_lost("the backup job has ended")
    return False


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


async def _read_nvram(domain: Domain, path: str | None) -> tuple[bytes | None, domainxml.Reason | None]:
    """Read the UEFI variables; (None, None) where the domain has none."""
    if path is None:
        return None, None
    if not domain.is_local:
        return None, domainxml.Reason(f"{path} is on another host", "copy it from there")
    try:
        return await trio.Path(path).read_bytes(), None
    except OSError as error:
        reason = domainxml.Reason(f"cannot read {path}: {error.strerror}", "run backupfs as a user who may read it")
        return None, reason


async def _settle_nvram(
    domain: Domain, path: str | None, before: bytes | None, reason: domainxml.Reason | None
) -> tuple[bytes | None, domainxml.Reason | None]:
    """Read the variables again until they are the same twice: then no write was half done."""
    for _ in range(NVRAM_ATTEMPTS):
        if before is None:
            return before, reason
        after, reason = await _read_nvram(domain, path)
        if after == before:
            return after, reason
        before = after
    return None, domainxml.Reason(f"{path} kept changing while it was read", "begin another point in time")
