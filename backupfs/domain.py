# SPDX-License-Identifier: GPL-3.0-or-later
"""One libvirt domain, asked from trio: the only module that knows the `libvirt` module.

Libvirt's calls block, some of them (behind a stopped QEMU) for ever. So each runs in a thread.

    question   given up after `timeout`; the thread ends when libvirt does
    deed       begin, abort: not given up before the process ends, and recorded before it is done

What happens to the domain by itself (it stops, its job ends, libvirtd restarts) arrives through
libvirt's event loop, which runs in one daemon thread for the process, and is handed to the trio
thread as a `Happening`. A lost connection is made again for as long as the domain is open; a
question that comes meanwhile waits for it, up to `timeout`.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import trio

from backupfs import domainxml
from backupfs.errors import (
    AccessRefused,
    BackupfsError,
    LibvirtRefused,
    LibvirtTimeout,
    LibvirtUnavailable,
    MissingDependency,
    NoSuchDomain,
)

try:
    import libvirt  # type: ignore[import-untyped, unused-ignore]  # no stubs exist
except ImportError as error:  # pragma: no cover - proven in a bare tree, not here
    raise MissingDependency("libvirt's Python module", "python3-libvirt") from error

log = logging.getLogger("backupfs.domain")

T = TypeVar("T")

RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
KEEPALIVE: Final = (5, 3)  # seconds between probes, unanswered probes until the connection is dead

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

_SHUTDOWNS: Final = {
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_GUEST: "shut down by its guest",
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN_HOST: "shut down from the host",
}
_ENDS: Final = {
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN: "shut down",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED: "destroyed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_MIGRATED: "migrated away",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED: "saved",
    libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED: "stopped because QEMU failed",
}


class Kind(enum.Enum):
    """What kind of thing happened to the domain."""

    STOPPED = "stopped"
    JOB_ENDED = "job ended"
    RECONNECTED = "reconnected"


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happened to the domain by itself; *detail* completes "the domain was …"."""

    kind: Kind
    detail: str = ""


@dataclass(frozen=True, slots=True)
class JobStatistics:
    """What libvirt tells of the domain's job; sizes in bytes, None where it tells nothing."""

    operation: str
    scratch_used: int | None = None
    scratch_total: int | None = None


class _Connection(Protocol):
    """The part of virConnect that is used here; the module has no types."""

    def close(self) -> int: ...
    def isAlive(self) -> int: ...
    def getURI(self) -> str: ...
    def getCapabilities(self) -> str: ...
    def setKeepAlive(self, interval: int, count: int) -> int: ...
    def lookupByName(self, name: str) -> Any: ...
    def lookupByUUIDString(self, uuid: str) -> Any: ...
    def domainEventRegisterAny(self, dom: Any, eventID: int, cb: Any, opaque: Any) -> int: ...
    def domainEventDeregisterAny(self, callback: int) -> int: ...
    def registerCloseCallback(self, cb: Any, opaque: Any) -> int: ...
    def unregisterCloseCallback(self) -> int: ...


@functools.cache
def _start_event_loop() -> None:
    """Run libvirt's event loop in a daemon thread; once a process, before the first connection."""
    # The module prints every error to stderr by itself; ours go through exceptions and the log.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


def _sentence(error: Any) -> str:
    """Libvirt's message, as one line."""
    return " ".join((error.get_error_message() or str(error)).split())


def _refusal(error: Any, domain: str, action: str) -> BackupfsError:
    """Turn libvirt's exception into ours."""
    code = error.get_error_code()
    reason = _sentence(error)
    if code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_OPERATION_DENIED):
        return AccessRefused(domain, action, reason)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return LibvirtTimeout(domain, action, reason)
    return LibvirtRefused(domain, action, reason)


@dataclass(eq=False)
class Domain:
    """A domain on a connection that heals itself. Got with `open_domain`."""

    uri: str
    name: str
    uuid: str
    host_uuid: str
    timeout: float
    happenings: trio.MemoryReceiveChannel[Happening]
    _requested_uri: str | None
    _send: trio.MemorySendChannel[Happening]
    _connection: _Connection | None = None
    _connected: trio.Event = field(default_factory=trio.Event)
    _broken: trio.Event = field(default_factory=trio.Event)
    _callbacks: list[int] = field(default_factory=list)

    @property
    def is_local(self) -> bool:
        """Whether the domain's files and sockets are files and sockets of this host."""
        return not urlsplit(self.uri).hostname

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
        """Return what runs on the domain, or None. Waits for QEMU where the job is a backup."""

        def ask(d: Any) -> JobStatistics | None:
            try:
                found = d.jobStats(0)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_OPERATION_INVALID:
                    return None  # not running
                raise
            if found.get("type", libvirt.VIR_DOMAIN_JOB_NONE) == libvirt.VIR_DOMAIN_JOB_NONE:
                return None
            operation = _OPERATIONS.get(found.get("operation"), "other")
            return JobStatistics(operation, found.get("disk_temp_used"), found.get("disk_temp_total"))

        return cast("JobStatistics | None", await self._ask("ask for the running job", ask))

    # --- deeds -------------------------------------------------------------------------------

    async def begin_backup(self, backup_xml: str) -> None:
        """Begin a backup job; when it returns, the instant is fixed."""
        await self._do("begin the backup job", lambda d: d.backupBegin(backup_xml, None, 0))

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

    # --- the connection ----------------------------------------------------------------------

    async def _ask(self, action: str, question: Callable[[Any], T]) -> T:
        """Put a question that changes nothing; give up after `timeout`."""
        try:
            with trio.fail_after(self.timeout):
                return await self._call(action, question)
        except trio.TooSlowError:
            pass
        if self._connection is None:
            raise LibvirtUnavailable(self.uri, f"the connection is lost; tried again for {self.timeout:g} s")
        raise LibvirtTimeout(self.name, action, f"libvirt has not answered for {self.timeout:g} s")

    async def _do(self, action: str, deed: Callable[[Any], T]) -> T:
        """Do something that has an effect; given up only when the process is about to end.

        Then nobody knows whether it took effect, but the state folder's record says that it may
        have, and the next mount looks.
        """
        return await self._call(action, deed, again=False)

    async def _call(self, action: str, what: Callable[[Any], T], *, again: bool = True) -> T:
        while True:
            await self._connected.wait()
            connection = self._connection
            assert connection is not None  # set together with the event

            def work(connection: _Connection = connection) -> T:
                return what(connection.lookupByUUIDString(self.uuid))

            try:
                return await trio.to_thread.run_sync(work, abandon_on_cancel=True)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise NoSuchDomain(self.name, self.uri) from error
                # A question that met the restart of libvirtd is put once more; a deed is not,
                # for it may have been done.
                if again and not await _is_alive(connection):
                    again = False
                    self._lose(connection)
                    continue
                raise _refusal(error, self.name, action) from error

    def _lose(self, connection: _Connection | None) -> None:
        """Note that *connection* is dead; the healer makes another one."""
        if connection is self._connection and connection is not None:
            self._connection = None
            self._connected = trio.Event()
            self._broken.set()

    async def _heal(self) -> None:
        """Make the connection again whenever it breaks."""
        while True:
            await self._broken.wait()
            self._broken = trio.Event()
            log.warning("%s: lost the connection to libvirt at %s; trying again", self.name, self.uri)
            attempt = 0
            while True:
                try:
                    await self._connect()
                    break
                except BackupfsError as error:
                    log.debug("%s: %s", self.name, error)
                await trio.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                attempt += 1
            log.info("%s: connected to libvirt at %s again", self.name, self.uri)
            self._tell(Happening(Kind.RECONNECTED))

    async def _connect(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def hand_over(function: Callable[..., None], *arguments: object) -> None:
            # The loop may have ended already; then nobody wants to know.
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(function, *arguments)

        def on_close(connection: _Connection, _reason: int, _opaque: object) -> None:
            hand_over(self._lose, connection)

        def on_lifecycle(_c: object, _d: object, event: int, detail: int, _opaque: object) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN:
                # The guest has powered itself off; with a job running, libvirt and QEMU would
                # wait in "in shutdown" for as long as the job lasts (measured, libvirt 9.0).
                hand_over(self._tell, Happening(Kind.STOPPED, _SHUTDOWNS.get(detail, "shut down")))
            if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                hand_over(self._tell, Happening(Kind.STOPPED, _ENDS.get(detail, "stopped")))

        def on_job(_c: object, _d: object, statistics: dict[str, Any], _opaque: object) -> None:
            operation = statistics.get("operation", libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP)
            if operation == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
                hand_over(self._tell, Happening(Kind.JOB_ENDED, statistics.get("errmsg", "")))

        def connect() -> tuple[_Connection, list[int]]:
            connection = _open(self._requested_uri)
            try:
                domain = connection.lookupByUUIDString(self.uuid)
                callbacks = [
                    connection.domainEventRegisterAny(domain, which, callback, None)
                    for which, callback in (
                        (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle),
                        (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, on_job),
                    )
                ]
                connection.registerCloseCallback(on_close, None)
            except libvirt.libvirtError as error:
                connection.close()
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise NoSuchDomain(self.name, self.uri) from error
                raise LibvirtUnavailable(self.uri, _sentence(error)) from error
            return connection, callbacks

        connection, self._callbacks = await trio.to_thread.run_sync(connect)
        self._connection = connection
        self._connected.set()

    def _tell(self, happening: Happening) -> None:
        # Unbounded: what happens to a domain happens a few times, and the job always listens.
        self._send.send_nowait(happening)

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return

        def close() -> None:
            with contextlib.suppress(libvirt.libvirtError):  # a dead connection: nothing to undo
                connection.unregisterCloseCallback()
                for callback in self._callbacks:
                    connection.domainEventDeregisterAny(callback)
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

        with trio.move_on_after(self.timeout) as scope:
            scope.shield = True
            await trio.to_thread.run_sync(close, abandon_on_cancel=True)


async def _is_alive(connection: _Connection) -> bool:
    def ask() -> bool:
        try:
            return connection.isAlive() == 1
        except libvirt.libvirtError:
            return False

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)


def _open(uri: str | None) -> _Connection:
    """Connect to libvirt (blocks); raise LibvirtUnavailable."""
    try:
        connection = cast(_Connection, libvirt.open(uri))
    except libvirt.libvirtError as error:
        raise LibvirtUnavailable(uri or "", _sentence(error)) from error
    # Not every driver can (the test driver cannot); then a dead peer shows at the next call.
    with contextlib.suppress(libvirt.libvirtError):
        connection.setKeepAlive(*KEEPALIVE)
    return connection


def _find(connection: _Connection, source: str) -> Any:
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
    _start_event_loop()

    def find() -> tuple[str, str, str, str]:
        connection = _open(uri)
        canonical = uri or ""
        try:
            canonical = connection.getURI()
            domain = _find(connection, source)
            host_uuid = domainxml.parse_host_uuid(connection.getCapabilities())
            return canonical, domain.name(), domain.UUIDString(), host_uuid
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NoSuchDomain(source, canonical) from error
            raise _refusal(error, source, "find the domain") from error
        finally:
            connection.close()

    # An unreachable host can hold the call for minutes; nothing has begun, so it may be left.
    try:
        with trio.fail_after(timeout):
            canonical, name, uuid, host_uuid = await trio.to_thread.run_sync(find, abandon_on_cancel=True)
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
