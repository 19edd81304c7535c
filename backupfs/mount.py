# SPDX-License-Identifier: GPL-3.0-or-later
"""One mounted domain, from the first check to the last clean-up.

    checks ─► libvirt ─► domain ─► state folder's lock ─► watchdog ─► left-over job ─► job ─► FUSE mount ─► serve

Three ways lead out, and each ends the job:

    umount, fusermount3 -u        the mount is gone already
    SIGTERM, SIGINT, not in use   we take the mount off
    SIGTERM, SIGINT, in use       the mount stays, dead: ENOTCONN. Taken off, it would look like
                                  an empty directory to whoever is at work in it
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from backupfs.seeks import Seeks  # before pyfuse3: see there

# isort: split
import pyfuse3
import trio

from backupfs import mountpoint
from backupfs.checkpoints import Checkpoints
from backupfs.control import open_control
from backupfs.domain import Domain, open_domain
from backupfs.errors import LibvirtRefused, MountPointError
from backupfs.job import Job, open_job
from backupfs.keeper import open_keeper
from backupfs.leftover import clear_left_over
from backupfs.logs import RingLog
from backupfs.mounted import Mounted
from backupfs.operations import Operations
from backupfs.options import Options
from backupfs.point import survey
from backupfs.report import Reporter
from backupfs.state import State, open_state
from backupfs.status import render_json, render_metrics
from backupfs.store import open_store
from backupfs.tree import Root

log = logging.getLogger("backupfs.mount")

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def serve(source: str, mount_point: str, options: Options, ring: RingLog, *, ready: Callable[[], None]) -> None:
    """Mount *source* at *mount_point* and serve it until it is unmounted; then clean up.

    *ready* is called when requests are being answered. Raises BackupfsError for anything that
    stands in the way before that; nothing is left behind then.
    """
    mountpoint.check_tools()
    path = mountpoint.check_mount_point(mount_point)
    async with open_domain(source, options.uri, timeout=options.timeout) as domain:
        with open_state(domain.host_uuid, domain.uuid, domain=domain.name, holder=path) as state:
            foreground = ring.destination == "stderr"
            async with open_keeper(domain, state, options, mount_point=path, foreground=foreground) as keeper:
                await _check_domain(domain, state, options, path)
                checkpoints = Checkpoints(domain, open_store(state.folder, domain.host_uuid, domain.uuid))
                async with open_job(domain, state, options, keeper, checkpoints) as job:
                    await _serve_job(job, source, path, options, ring, ready)
        log.info("%s: no longer served; %s", domain.name, "no job is left" if state.job is None else "a job is left")


async def forget(source: str, options: Options) -> str:
    """Throw the history of the domain *source* away; raise DomainInUse while it is mounted."""
    async with open_domain(source, options.uri, timeout=options.timeout) as domain:
        with open_state(domain.host_uuid, domain.uuid, domain=domain.name, holder="forget") as state:
            open_store(state.folder, domain.host_uuid, domain.uuid).forget()
        return f"{domain.name}: its history is forgotten; everything counts as changed at the next point in time"


async def _check_domain(domain: Domain, state: State, options: Options, path: str) -> None:
    """See what would go wrong at the first look, while somebody still reads the answer."""
    if not domain.is_local:
        raise LibvirtRefused(domain.name, "mount it", f"{domain.uri} is another host; mount it there")
    if options.scratch is not None:
        mountpoint.check_overlap(path, [options.scratch])
    if state.job is not None:
        await clear_left_over(domain, state)
    found = await survey(domain, options)
    if domain.is_local:
        mountpoint.check_overlap(path, (image for disk in found.disks for image in disk.chain))


async def _serve_job(
    job: Job, source: str, path: str, options: Options, ring: RingLog, ready: Callable[[], None]
) -> None:
    control = job.record.folder / "control"
    reporter = Reporter(job, path, str(control), ring.destination)
    tree = Mounted(
        job,
        {
            "status.json": lambda: render_json(reporter.snapshot()),
            "metrics.prom": lambda: render_metrics(reporter.snapshot()),
            "log": ring.render,
        },
        started=int(time.time()),
    )
    operations = Operations(
        Root(tree),
        size=reporter.total_size,
        owner=(options.uid, options.gid),
        modes=(options.folder_mode, options.file_mode),
    )

    seeks = Seeks(operations.lseek)

    async def release() -> str:
        cut_off = await job.release()
        return f"released; {cut_off} open files were cut off" if cut_off else "released"

    async def begin() -> str:
        return f"point in time {(await job.begin()).instant}"

    async with (
        open_control(control, {"release": release, "begin": begin}),
        _open_fuse(operations, seeks, path, _fuse_options(source, options)) as fuse,
    ):
        reporter.why_no_seeks = seeks.why_not
        if reporter.why_no_seeks is not None:
            log.info("%s: tools that ask for holes are told that all is data: %s", job.domain.name, seeks.why_not)

        reporter.read_ahead = lambda: mountpoint.read_ahead(fuse.device)

        def settle_read_ahead() -> None:
            # Not before: answering the kernel's INIT sets it back.
            mountpoint.raise_read_ahead(fuse.device)

        operations.at_first_request = settle_read_ahead
        async with trio.open_nursery() as nursery:
            await nursery.start(seeks.run)
            nursery.start_soon(_run_fuse, nursery)
            nursery.start_soon(_await_unmount, job, fuse.device, nursery)
            nursery.start_soon(_await_signal, job, fuse, nursery)
            nursery.start_soon(reporter.watch)
            log.info(
                "%s: mounted at %s (backupfs %s)",
                job.domain.name,
                path,
                importlib.metadata.version("backupfs"),
            )
            ready()


class _Fuse:
    """The FUSE session: there is one for a process."""

    def __init__(self, path: str, device: str) -> None:
        self.path = path
        self.device = device


@contextlib.asynccontextmanager
async def _open_fuse(operations: Operations, seeks: Seeks, path: str, words: set[str]) -> AsyncIterator[_Fuse]:
    seeks.listen()
    try:
        pyfuse3.init(operations, path, words)
    except RuntimeError as error:
        # libfuse has said why on stderr already.
        raise MountPointError(path, f"the kernel or fusermount3 refused the mount ({error})") from error
    try:
        mounted = mountpoint.mount_at(path)
        if mounted is None:
            raise MountPointError(path, "mounted, but not to be seen in /proc/self/mountinfo")
        yield _Fuse(path, mounted.device)
    finally:
        seeks.end()
        # Never unmounts: pyfuse3 would do it lazily, and that hides the mount from who is in it.
        pyfuse3.close(unmount=False)


def _fuse_options(source: str, options: Options) -> set[str]:
    """Return libfuse's words. It can only take ASCII; such a name stays unnamed in findmnt."""
    name = source.replace("\\", "\\\\").replace(",", "\\,")
    words = {"default_permissions", "subtype=backupfs", f"fsname={name}", *options.kernel_words}
    return {word for word in words if word.isascii()}


async def _run_fuse(nursery: trio.Nursery) -> None:
    await pyfuse3.main()
    nursery.cancel_scope.cancel()  # the kernel says that the file system is gone


async def _await_unmount(job: Job, device: str, nursery: trio.Nursery) -> None:
    """End when the mount is gone from our namespace, though another one holds a copy of it."""
    await mountpoint.wait_unmounted(device)
    # `umount -l`: who has a file open keeps it until he closes it.
    await job.holders.wait_no_open_files()
    nursery.cancel_scope.cancel()


async def _await_signal(job: Job, fuse: _Fuse, nursery: trio.Nursery) -> None:
    with trio.open_signal_receiver(*SIGNALS) as arriving:
        async for number in arriving:
            name = signal.Signals(number).name
            busy = "a point in time is in use" if await job.holders.settle() else await mountpoint.unmount(fuse.path)
            if busy is None:
                log.info("%s: %s: unmounting", job.domain.name, name)
            else:
                log.warning(
                    "%s: %s, but %s: readers get EIO; the mount point stays dead until `umount %s`",
                    job.domain.name,
                    name,
                    busy,
                    fuse.path,
                )
                await job.shut()
            nursery.cancel_scope.cancel()
