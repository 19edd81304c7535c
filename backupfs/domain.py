# SPDX-License-Identifier: GPL-3.0-or-later
"""One libvirt domain, asked from trio: what can be asked of it, and what can be done to it.

How a call reaches libvirt, and what becomes of it when libvirt is away, is in `link`.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast
from urllib.parse import urlsplit

import trio

from backupfs import domainxml
from backupfs.errors import (
    AgentRefused,
    AgentUnavailable,
    CheckpointUnusable,
    DomainNotRunning,
    JobStuck,
    LibvirtUnavailable,
    MissingDependency,
    NoSuchDomain,
)
from backupfs.link import Connection, Happening, Link, connect_to, in_thread, refusal, sentence, start_event_loop

try:
    import libvirt  # type: ignore[import-untyped, unused-ignore]  # no stubs exist
except ImportError as error:  # pragma: no cover - proven in a bare tree, not here
    raise MissingDependency("libvirt's Python module", "python3-libvirt") from error

T = TypeVar("T")

_STATES: Final = {
    libvirt.VIR_DOMAIN_NOSTATE: "in no state",
    libvirt.VIR_DOMAIN_RUNNING: "running",
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "shutting down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended",
}
_ALIVE: Final = ("running", "blocked", "paused", "suspended")

_OPERATIONS: Final = {
    libvirt.VIR_DOMAIN_JOB_OPERATION_SAVE: "save",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN: "incoming migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT: "migration",
    libvirt.VIR_DOMAIN_JOB_OPERATION_SNAPSHOT: "snapshot",
    libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP: "dump",
    libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP: "backup",
}

_BLOCK_JOBS: Final = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "commit",
}


class AgentState(enum.Enum):
    """What the guest agent is like when it answers."""

    READY = "ready"
    FROZEN = "frozen"


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """What libvirt tells of the domain's job; sizes in bytes, None where it tells nothing."""

    operation: str
    scratch_used: int | None = None
    scratch_total: int | None = None


class Domain(Link):
    """A domain on a connection that heals itself. Got with `open_domain`."""

    # --- questions ---------------------------------------------------------------------------

    async def state(self) -> str:
        """Say in words what the domain does: "running", "paused", "shut off" …"""
        number, _reason = await self._ask("ask for the state", lambda d: d.state())
        return _STATES.get(number, f"in state {number}")

    async def is_alive(self) -> bool:
        """Whether there is a QEMU that could serve a backup job, paused or not."""
        return await self.state() in _ALIVE

    async def live_xml(self) -> str:
        """Return the definition as it is now, with backing chains, without secrets."""
        return cast(str, await self._ask("read the definition", lambda d: d.XMLDesc(0)))

    async def restore_xml(self) -> str:
        """Return the definition in the form that `virsh define` takes, without secrets.

        That is the migratable form: the devices of now, hot-plugged ones too, without what only
        belongs to this run of it (addresses of sockets, process labels, backing chains).
        """
        xml = cast(
            str,
            await self._ask("read the definition", lambda d: d.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)),
        )
        return domainxml.strip_secrets(xml)

    async def checkpoints(self) -> dict[str, str]:
        """Return the checkpoints' XML by name; without sizes, which would cost the guest a job."""

        def ask(d: Any) -> dict[str, str]:
            found = {}
            for checkpoint in d.listAllCheckpoints(0):
                try:
                    found[checkpoint.getName()] = checkpoint.getXMLDesc(0)
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                        raise  # else: deleted since it was listed
            return found

        return cast(dict[str, str], await self._ask("list the checkpoints", ask))

    async def backup_xml(self) -> str | None:
        """Return the running backup job's XML, or None. Answers also while QEMU is stopped."""

        def ask(d: Any) -> str | None:
            try:
                return cast(str, d.backupGetXMLDesc(0))
            except libvirt.libvirtError as error:
                if error.get_error_code() in (
                    libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
                    libvirt.VIR_ERR_OPERATION_INVALID,
                ):
                    return None
                raise

        return cast("str | None", await self._ask("look for a backup job", ask))

    async def job_statistics(self) -> JobStatistics | None:
        """Return what runs on the domain, or None. Waits for QEMU where the job is a backup.

        Raises JobStuck where a job runs of which libvirt knows nothing more.
        """

        def ask(d: Any) -> JobStatistics | None:
            try:
                found = d.jobStats(0)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                    return None  # not running
                if error.get_error_code() == libvirt.VIR_ERR_INTERNAL_ERROR and "backup job data" in str(error):
                    # The job is in the status that libvirt keeps on disk, what it does is not.
                    raise JobStuck(self.name) from error
                raise
            if found.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
                return None
            operation = _OPERATIONS.get(found.get("operation"), "other")
            return JobStatistics(operation, found.get("disk_temp_used"), found.get("disk_temp_total"))

        return cast("JobStatistics | None", await self._ask("ask for the running job", ask))

    async def block_job(self, targets: Collection[str]) -> str | None:
        """Say what block job runs on one of the disks *targets*: a copy of another program, say."""

        def ask(d: Any) -> str | None:
            for target in targets:
                if found := d.blockJobInfo(target, 0):
                    return f"a block {_BLOCK_JOBS.get(found['type'], 'job')} of {target}"
            return None

        return await self._ask("look for a block job", ask)

    async def is_paused_by_error(self) -> bool:
        """Whether the guest is paused, and an I/O error is the reason: nobody suspended it."""
        return cast(bool, await self._ask("ask for the state", _is_paused_by_error))

    async def set_threshold(self, node: str, size: int) -> None:
        """Have a SCRATCH_GREW, once, when *node* (`vda[2]`, see the backup XML) grows beyond *size*."""
        await self._ask("watch the scratch file", lambda d: d.setBlockThreshold(node, size))

    # --- the guest agent ---------------------------------------------------------------------

    async def agent_state(self) -> AgentState:
        """Ask the guest agent for a sign of life; raise AgentUnavailable."""

        def ask(d: Any) -> AgentState:
            try:
                self._agent(lambda d: d.getTime())(d)  # of what can be asked through libvirt, the least
            except AgentRefused as error:
                return AgentState.FROZEN if error.frozen else AgentState.READY
            return AgentState.READY

        return await self._ask("ask the guest agent", ask)

    async def mount_points(self) -> frozenset[str]:
        """Return where the guest has something mounted, as its agent says."""
        found = await self._ask(
            "ask the guest agent for its mounts", self._agent(lambda d: [entry[0] for entry in d.fsInfo()])
        )
        return frozenset(found)

    async def set_agent_timeout(self, seconds: int | None) -> None:
        """Have libvirt wait so long, and no longer, for what the agent is told; None: its default."""
        value = libvirt.VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_DEFAULT if seconds is None else seconds
        await self._ask("set the guest agent's time-out", lambda d: d.agentSetResponseTimeout(value, 0))

    async def freeze(self, mounts: tuple[str, ...]) -> int:
        """Freeze the guest's file systems at *mounts*, all if empty; return how many are.

        Raises AgentRefused if the agent says no (none is frozen then), AgentUnavailable and others
        where nobody knows.
        """
        action = "freeze the file systems"
        return await self._do(action, self._agent(lambda d: cast(int, d.fsFreeze(list(mounts) or None, 0))))

    async def thaw(self) -> int:
        """Thaw all of the guest's file systems; the agent cannot thaw some."""
        return await self._do("thaw the file systems", self._agent(lambda d: cast(int, d.fsThaw(None, 0))))

    def _agent(self, what: Callable[[Any], T]) -> Callable[[Any], T]:
        """Wrap a call that goes on to the guest agent, so that what it says and libvirt says can be told apart."""

        def call(d: Any) -> T:
            try:
                return what(d)
            except libvirt.libvirtError as error:
                code, action = error.get_error_code(), "reach the guest agent"
                if code == libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED:
                    raise AgentUnavailable(self.name, action, sentence(error), configured=False) from error
                if code == libvirt.VIR_ERR_AGENT_UNRESPONSIVE:
                    raise AgentUnavailable(self.name, action, sentence(error)) from error
                if code == libvirt.VIR_ERR_OPERATION_INVALID and d.isActive():
                    raise AgentUnavailable(self.name, action, "the guest is paused", configured=False) from error
                if code == libvirt.VIR_ERR_OPERATION_INVALID:
                    raise DomainNotRunning(self.name, "shut off") from error
                if code == libvirt.VIR_ERR_INTERNAL_ERROR and error.get_error_domain() == libvirt.VIR_FROM_QEMU:
                    # Only the agent's words tell why: "Command … has been disabled: the agent is in frozen state".
                    reason = sentence(error)
                    raise AgentRefused(
                        self.name, "have it done by the guest agent", reason, "frozen" in reason
                    ) from error
                raise

        return call

    # --- deeds -------------------------------------------------------------------------------

    async def begin_backup(self, backup_xml: str, checkpoint_xml: str | None = None) -> None:
        """Begin a backup job, and with it a checkpoint if one is wanted; when it returns, the instant is fixed.

        Raises CheckpointUnusable where the base of a disk is gone or broken.
        """
        action = "begin the backup job"
        await self._do(action, self._checkpoint(action, lambda d: d.backupBegin(backup_xml, checkpoint_xml, 0)))

    async def delete_checkpoint(self, name: str, *, metadata_only: bool = False) -> None:
        """Delete a checkpoint with its bitmaps, or have libvirt forget it; raise CheckpointUnusable if it is gone."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0
        action = f"delete the checkpoint {name}"
        await self._do(action, self._checkpoint(action, lambda d: d.checkpointLookupByName(name).delete(flags)))

    async def redefine_checkpoint(self, xml: str) -> None:
        """Tell libvirt of a checkpoint whose bitmaps are there; raise CheckpointUnusable if they are not.

        Of one that libvirt knows so already, only that is seen.
        """
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | libvirt.VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE
        action = "redefine a checkpoint"
        await self._do(action, self._checkpoint(action, lambda d: d.checkpointCreateXML(xml, flags)))

    def _checkpoint(self, action: str, what: Callable[[Any], T]) -> Callable[[Any], T]:
        def call(d: Any) -> T:
            try:
                return what(d)
            except libvirt.libvirtError as error:
                if error.get_error_code() in (
                    libvirt.VIR_ERR_CHECKPOINT_INCONSISTENT,
                    libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT,
                ):
                    raise CheckpointUnusable(self.name, action, sentence(error)) from error
                raise

        return call

    async def abort_backup(self, socket: str) -> bool:
        """End the backup job that serves on *socket*; False if another job runs, or none.

        abortJob names no job: it would stop whatever runs, a migration too. So what runs is
        compared right before, in the same thread.
        """

        def abort(d: Any) -> bool:
            try:
                if domainxml.parse_backup(d.backupGetXMLDesc(0)).socket != socket:
                    return False
                d.abortJob()
            except libvirt.libvirtError as error:
                if error.get_error_code() in (
                    libvirt.VIR_ERR_NO_DOMAIN_BACKUP,
                    libvirt.VIR_ERR_OPERATION_INVALID,
                    libvirt.VIR_ERR_NO_DOMAIN,
                ):
                    return False
                raise
            return True

        return cast(bool, await self._do("end the backup job", abort))

    async def resume_after_error(self) -> bool:
        """Let the guest run on if an I/O error has paused it; False if it runs, or was suspended by somebody.

        It is looked at right before, in the same thread, as for an abort.
        """

        def resume(d: Any) -> bool:
            if not _is_paused_by_error(d):
                return False
            d.resume()
            return True

        return cast(bool, await self._do("resume the guest", resume))


def _is_paused_by_error(domain: Any) -> bool:
    return tuple(domain.state()) == (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)


def _host(uri: str, connection: Connection) -> str:
    """Return what tells the domain's host from others, the same whenever it is asked.

    Libvirt's own identifier is another one after each start where the firmware gives none.
    """
    if urlsplit(uri).hostname:
        return domainxml.parse_host_uuid(connection.getCapabilities())
    with contextlib.suppress(OSError), open("/etc/machine-id", encoding="ascii", errors="replace") as file:
        if re.fullmatch(r"[0-9a-f]{32}", identity := file.read().strip()):
            return identity
    return "local"


def _find(connection: Connection, source: str) -> Any:
    """Find a domain by name, else by UUID, as virsh does; raise libvirtError."""
    try:
        return connection.lookupByName(source)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        try:
            return connection.lookupByUUIDString(source)
        except libvirt.libvirtError:
            raise error from None  # "no such UUID" would be wrong of a name


@contextlib.asynccontextmanager
async def open_domain(source: str, uri: str | None, *, timeout: float) -> AsyncIterator[Domain]:
    """Connect to libvirt at *uri* (None: libvirt's default) and find the domain *source*.

    Raises LibvirtUnavailable, NoSuchDomain, AccessRefused.
    """
    start_event_loop()

    def find() -> tuple[str, str, str, str]:
        connection = connect_to(uri)
        canonical = uri or ""
        try:
            canonical = connection.getURI()
            domain = _find(connection, source)
            return canonical, domain.name(), domain.UUIDString(), _host(canonical, connection)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NoSuchDomain(source, canonical) from error
            raise refusal(error, source, "find the domain") from error
        finally:
            connection.close()

    # An unreachable host can hold the call for minutes; nothing has begun, so it may be left.
    try:
        with trio.fail_after(timeout):
            canonical, name, uuid, host_uuid = await in_thread(find)
    except trio.TooSlowError:
        raise LibvirtUnavailable(uri or "", f"no answer for {timeout:g} s") from None
    send, receive = trio.open_memory_channel[Happening](2**16)
    domain = Domain(canonical, name, uuid, host_uuid, timeout, receive, uri, send)
    await domain._connect()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(domain._heal)
        try:
            yield domain
        finally:
            nursery.cancel_scope.cancel()
            await domain._disconnect()
