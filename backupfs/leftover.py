# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a job of ours, and of one that a killed process has left.

    abort, if it is ours ─► wait until libvirt has ended it ─► remove socket and scratch ─► forget the record

Law: a job is ours if it serves on the socket in our record, which no two jobs share; that is
compared right before the abort. No other job is ever touched.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

import trio

from backupfs import domainxml
from backupfs.domain import Domain
from backupfs.errors import BackupfsError, ForeignJob, LibvirtTimeout, NoSuchDomain, NotThawed
from backupfs.quiesce import thaw_left_over
from backupfs.state import JobRecord, State

log = logging.getLogger("backupfs.leftover")

ABORT_SECONDS: Final = 20.0  # an abort takes 20 ms; more means that QEMU is stopped
# Then the job is gone within a second. But each time the guest has opened or closed a virtio port while
# the job ran (it was reset, or its agent restarted), libvirt 9.0 waits 30 s for a lock that the backup
# holds, and handles the job's end only after that: up to a minute for each port at a reset (measured).
GONE_SECONDS: Final = 185.0


async def clear_left_over(domain: Domain, state: State, *, within: float = ABORT_SECONDS) -> None:
    """End the job that a killed process of ours has left, and remove its files.

    Called by the one who has the watchdog's lock, so nobody else does it at the same time.
    Raises LibvirtTimeout where our job does not end, NotThawed where the guest stays frozen, too,
    ForeignJob where another program's runs.
    """
    if (record := state.job) is not None:
        stuck = await thaw_left_over(domain, state, record)  # first: a frozen guest is a stopped one
        if stuck is not None and not await _runs(domain, record.socket):
            raise NotThawed(domain.name, stuck)  # the job ended long ago
        log.info("%s: ending the backup job that was left over, on %s", domain.name, record.socket)
        await end_job(domain, state, record, within=within)
        if stuck is not None and state.job is not None:
            raise NotThawed(domain.name, stuck)
        if state.job is not None:
            raise LibvirtTimeout(domain.name, "begin a backup", f"the job left over on {record.socket} does not end")
    if (xml := await domain.backup_xml()) is not None:
        where = domainxml.parse_backup(xml).socket or "another transport"
        raise ForeignJob(domain.name, f"a backup job that serves on {where}")


async def end_job(domain: Domain, state: State, record: JobRecord, *, within: float = ABORT_SECONDS) -> None:
    """End our job, wait until libvirt says that it is gone, and remove what it left.

    Its record goes last, and stays where the job does not end, or the guest is still frozen.
    """
    try:
        with trio.CancelScope(shield=True):
            with contextlib.suppress(NoSuchDomain):  # undefined, or a transient one that stopped
                with trio.fail_after(within):
                    await domain.abort_backup(record.socket)
                with trio.fail_after(max(within, GONE_SECONDS)):
                    await _wait_until_gone(domain, record.socket)
            await trio.to_thread.run_sync(_remove_files, domain, record)
    except (BackupfsError, trio.TooSlowError) as error:
        # A stopped QEMU, say. Kept in the record: the next point, or the next mount, ends it.
        why = error if isinstance(error, BackupfsError) else "libvirt does not end it"
        log.error("%s: the backup job on %s: %s; the next mount will end it", domain.name, record.socket, why)
    else:
        with trio.CancelScope(shield=True):
            stuck = state.job and await thaw_left_over(domain, state, state.job, last=True)
        if stuck is None:
            state.forget_job()


async def _wait_until_gone(domain: Domain, socket: str) -> None:
    # No event tells reliably: the one for the job's end comes before its files are removed.
    while await _runs(domain, socket):  # noqa: ASYNC110
        await trio.sleep(0.02)


async def _runs(domain: Domain, socket: str) -> bool:
    xml = await domain.backup_xml()
    return xml is not None and domainxml.parse_backup(xml).socket == socket


def _remove_files(domain: Domain, record: JobRecord) -> None:
    """Remove the job's socket and scratch files where they are still there (QEMU was killed).

    Each name is made up of the job's random number, so nobody else's file can have it.
    """
    if not domain.is_local:
        return
    for path in (record.socket, *record.scratches):
        if record.job_id not in os.path.basename(path):
            continue
        with contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except PermissionError as error:
                log.warning("%s: cannot remove %s: %s; remove it by hand", domain.name, path, error.strerror)
