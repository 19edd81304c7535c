# SPDX-License-Identifier: GPL-3.0-or-later
"""One point in time: a backup job, its exports, and what a restore needs besides the disks.

    clear left-overs ─► survey ─► scratch room ─► older bitmaps ─► probe the agent ─► nvram
      ─► launch: freeze ─► backupBegin ─► thaw ─► connect NBD ─► extent maps, bitmaps ─► label
      ─► records written ─► serve ─► close NBD ─► end the job

The job itself is begun and ended in `launch`; what changed since earlier ones is found in `tracking`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from backupfs import domainxml
from backupfs.bases import Bases
from backupfs.checkpoints import Checkpoints, new_checkpoint
from backupfs.domain import Domain
from backupfs.errors import (
    BackupfsError,
    CheckpointUnusable,
    DomainNotRunning,
    ForeignJob,
    LibvirtRefused,
    LibvirtUnavailable,
    NoBitmap,
)
from backupfs.export import Export, open_export
from backupfs.forms import Forms
from backupfs.image import RawImage
from backupfs.launch import Backup, Launcher, Survey
from backupfs.leftover import clear_left_over
from backupfs.lineage import Mark
from backupfs.link import in_thread
from backupfs.nbdclient import Address
from backupfs.options import Options
from backupfs.preflight import check_scratch
from backupfs.quiesce import AGENT_SECONDS, LIBVIRT_SECONDS, Freezer, Quiesced, open_freezer
from backupfs.rate import Bucket
from backupfs.state import next_instant
from backupfs.tracking import Tracking, look_for_bitmap, track
from backupfs.window import BLOCK

log = logging.getLogger("backupfs.point")

HEADROOM_SECONDS: Final = 0.5  # from the choice of a label to the end of the begin, which takes 60 ms
NVRAM_ATTEMPTS: Final = 5


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
    newest: Mapping[str, int]  # the label of each, which its whole images have as their time
    forms: Forms[Export]
    bases: Bases[Export]
    exports: Mapping[str, Export]
    scratches: Mapping[str, str]
    left_out: Mapping[str, domainxml.Reason]
    checkpoint: str | None = None  # the one that was made with it
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


async def preflight(launcher: Launcher, checkpoint: str | None, checkpoints: Checkpoints) -> Survey:
    """See whether a point could begin, as far as can be seen while another of ours is held.

    Raises DomainNotRunning, DiskUnusable, LibvirtRefused, ScratchFull, ScratchUnusable; for a
    *checkpoint* that is to be made, BadCheckpointName, CheckpointExists, NoBitmap.
    """
    domain, options = launcher.domain, launcher.options
    if not await domain.is_alive():
        raise DomainNotRunning(domain.name, await domain.state())
    seen = await survey(domain, options)
    taking = seen.selection.taking
    if not taking:
        raise LibvirtRefused(domain.name, "begin a backup", "no disk of the domain can take part")
    await in_thread(
        functools.partial(
            check_scratch,
            launcher.scratch_folders(taking),
            options.scratch_reserve,
            domain=domain.name,
            uuid=domain.uuid,
            uri=domain.uri,
        )
    )
    if checkpoint is not None:
        await checkpoints.check_name(checkpoint)
        why_not = {disk.target: look_for_bitmap(disk, domain.is_local) for disk in taking}
        if None not in why_not.values():
            reasons = "; ".join(f"{target}: {reason.text}" for target, reason in why_not.items() if reason is not None)
            raise NoBitmap(domain.name, reasons)
    return seen


@contextlib.asynccontextmanager
async def open_point(
    launcher: Launcher,
    checkpoints: Checkpoints,
    *,
    checkpoint: str | None,
    generation: int,
    on_lost: Callable[[str], None],
) -> AsyncIterator[Point]:
    """Begin a point in time and serve it; end its job on the way out.

    *checkpoint* is the name of one to be made with it. *on_lost* is called, in the trio thread, with the reason
    when the exports are found dead. Raises what `preflight` raises, ForeignJob, WatchdogGone, NotQuiesced,
    LibvirtRefused, StateFolderError and what NBD can raise.
    """
    started = trio.current_time()
    domain, state, options = launcher.domain, launcher.state, launcher.options
    if not await domain.is_alive():
        raise DomainNotRunning(domain.name, await domain.state())
    await clear_left_over(domain, state)
    if (job := await domain.job_statistics()) is not None:
        raise ForeignJob(domain.name, f"a {job.operation} job")
    seen = await preflight(launcher, checkpoint, checkpoints)
    if (other := await domain.block_job([disk.target for disk in seen.selection.taking])) is not None:
        raise ForeignJob(domain.name, other)
    tracking = await track(launcher, checkpoints, seen)
    new = await _plan_checkpoint(tracking, checkpoint)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(new.discard)
        async with open_freezer(domain, state, options.quiesce) as freezer:
            nvram, nvram_reason = await _read_nvram(domain, seen.domain.nvram)
            restore_xml = await domain.restore_xml()
            new.reserve(AGENT_SECONDS + LIBVIRT_SECONDS if freezer.will_freeze else 0.0)
            backup, quiesced = await _begin(stack, freezer, tracking, new)
        began = time.time()
        nvram, nvram_reason = await _settle_nvram(domain, seen.domain.nvram, nvram, nvram_reason)

        async def allow_reconnect() -> bool:
            return await _is_ours(domain, backup.socket, on_lost)

        bucket = Bucket(options.rate, BLOCK) if options.rate is not None else None
        exports: dict[str, Export] = {}
        for disk in seen.selection.taking:
            exports[disk.target] = await stack.enter_async_context(
                open_export(
                    Address(backup.socket, disk.target),
                    connections=options.connections,
                    timeout=options.timeout,
                    allow_reconnect=allow_reconnect,
                    bucket=bucket,
                )
            )
        if bucket is not None:
            stack.callback(bucket.close)
        instant = new.label(began)
        sizes = {target: export.size for target, export in exports.items()}
        concluded = await tracking.conclude(backup, sizes, instant, new.mark)
        files = {}
        left_out = dict(seen.selection.left_out)
        if nvram is not None:
            files["nvram.fd"] = nvram
        elif nvram_reason is not None:
            left_out["nvram"] = nvram_reason
        images = {target: RawImage(export, export.extents) for target, export in exports.items()}
        maps = {target: export.extents for target, export in exports.items()}
        took = trio.current_time() - started
        await _wait_until(domain.name, instant)
        new.is_served = True
        if options.keep is not None:
            await checkpoints.prune(options.keep)
        yield Point(
            generation=generation,
            domain=domain.name,
            job_id=backup.job_id,
            socket=backup.socket,
            began=began,
            took=took,
            instant=instant,
            checkpoint=new.name,
            images=images,
            newest={target: one.record.labels.newest for target, one in concluded.disks.items()},
            forms=Forms(domain.name, domain.uuid, instant, restore_xml, files, images, maps),
            bases=Bases(domain.name, domain.uuid, instant, options.backing, images, maps, tracking.why_not, concluded),
            exports=exports,
            scratches=backup.scratches,
            left_out=left_out,
            quiesced=quiesced,
        )


async def _begin(
    stack: contextlib.AsyncExitStack, freezer: Freezer, tracking: Tracking, new: NewCheckpoint
) -> tuple[Backup, Quiesced]:
    """Begin the real job, anew without a base that libvirt refuses."""
    launcher, seen = tracking.launcher, tracking.seen
    quiesced = Quiesced()

    async def begin(xml: str) -> None:
        nonlocal quiesced
        quiesced = await freezer.begin(lambda: launcher.domain.begin_backup(xml, new.render()))

    while True:
        job = launcher.open(seen, seen.selection.taking, begin, bases=tracking.bases)
        try:
            return await stack.enter_async_context(job), quiesced
        except CheckpointUnusable as error:
            await tracking.refuse_bases(error)


async def _plan_checkpoint(tracking: Tracking, name: str | None) -> NewCheckpoint:
    """Say which checkpoint is to be made with the point: *name*, or what `checkpoint=` says, or none."""
    launcher = tracking.launcher
    if name is None and (template := launcher.options.checkpoint) is not None:
        if all(disk.target in tracking.why_not for disk in tracking.seen.selection.taking):
            log.info("%s: no checkpoint is made: no disk can hold its bitmap", launcher.domain.name)
        else:
            name = await tracking.checkpoints.name(template)
    return NewCheckpoint(tracking, name)


@dataclass(eq=False)
class NewCheckpoint:
    """The checkpoint to be made with a point, or none (without a *name*), and the point's label.

    Without one the label is taken after the job began, so nothing in the point is younger than it says.
    The mark of a checkpoint carries it, so then it must be known before. It is taken when nothing but
    libvirt's call is left, with some headroom for that; to be durable before, without a write while
    the guest is frozen, as many as the freeze may take are reserved.
    """

    tracking: Tracking
    name: str | None
    mark: Mark | None = None
    is_served: bool = False

    def reserve(self, seconds: float) -> None:
        """Reserve the labels of so many seconds."""
        if self.name is not None:
            state = self.tracking.launcher.state
            state.reserve(next_instant(time.time() + seconds + 2 * HEADROOM_SECONDS, state.last_instant))

    def render(self) -> str | None:
        """Take a label; return the checkpoint's XML."""
        if self.name is None:
            return None
        state = self.tracking.launcher.state
        instant = next_instant(time.time() + HEADROOM_SECONDS, state.last_instant)
        state.take(instant)
        self.mark, xml = new_checkpoint(self.name, instant, self.tracking.seen.disks, self.tracking.why_not)
        return xml

    def label(self, began: float) -> int:
        """Return the point's label, noted durably."""
        state = self.tracking.launcher.state
        if self.mark is None:
            state.advance_to(next_instant(time.time(), state.last_instant))
            return state.last_instant
        state.settle()
        if (late := began - self.mark.instant) > 0:
            log.info(
                "%s: the begin took long: what the guest wrote in the last %.1f s may be younger than the label says",
                self.tracking.launcher.domain.name,
                late,
            )
        return self.mark.instant

    async def discard(self) -> None:
        """Delete it unless the point has come to be served."""
        if self.mark is not None and not self.is_served:
            with trio.CancelScope(shield=True):
                await self.tracking.checkpoints.discard(self.mark)


async def _wait_until(domain: str, instant: int) -> None:
    """Wait until the clock has reached the label; rsync and its like compare whole seconds."""
    ahead = instant - time.time()
    if ahead > 1.0 + HEADROOM_SECONDS:
        log.warning(
            "%s: the clock is %.0f s behind the last point in time; labels run ahead of it until it has caught up",
            domain,
            math.ceil(ahead),
        )
    else:
        await trio.sleep(max(0.0, ahead))


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
