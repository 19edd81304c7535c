# SPDX-License-Identifier: GPL-3.0-or-later
"""The link to one libvirt domain: calls in threads, events as they come, a connection that heals.

Libvirt's calls block, some of them (behind a stopped QEMU) for ever. So each runs in a thread.

    question   given up after `timeout`; the thread ends when libvirt does
    deed       begin, abort: not given up before the process ends, and recorded before it is done

What happens to the domain by itself (it stops, its job ends, libvirtd restarts) arrives through
libvirt's event loop, which runs in one daemon thread for the process, and is handed to the trio
thread as a `Happening`. A lost connection is made again for as long as the domain is open; a
question that comes meanwhile waits for it, up to `timeout`.

What is asked and done over it is said in `domain`; these two alone know the `libvirt` module.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar, cast
from urllib.parse import urlsplit

import trio

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

log = logging.getLogger("backupfs.link")

T = TypeVar("T")

RETRY_SECONDS: Final = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
KEEPALIVE: Final = (5, 3)  # seconds between probes, unanswered probes until the connection is dead

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
    IO_ERROR = "I/O error"  # of the guest's, whichever disk it was: libvirt does not always know
    PAUSED_BY_ERROR = "paused by an I/O error"
    RESUMED = "resumed"
    SCRATCH_GREW = "scratch file has grown"  # beyond what `Domain.set_threshold` named


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happened to the domain by itself; *detail* completes "the domain was …"."""

    kind: Kind
    detail: str = ""


class Connection(Protocol):
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


# Trio 0.22, which Debian 12 has, knows it by another name.
_ABANDON: Final[dict[str, Any]] = {
    "abandon_on_cancel"
    if "abandon_on_cancel" in inspect.signature(trio.to_thread.run_sync).parameters
    else "cancellable": True
}


async def in_thread(blocking: Callable[[], T]) -> T:
    """Call *blocking* in a thread; if this is cancelled, the thread is left to end when it does."""
    return await trio.to_thread.run_sync(blocking, **_ABANDON)


@functools.cache
def start_event_loop() -> None:
    """Run libvirt's event loop in a daemon thread; once a process, before the first connection."""
    # The module prints every error to stderr by itself; ours go through exceptions and the log.
    libvirt.registerErrorHandler(lambda _context, _error: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


def sentence(error: Any) -> str:
    """Libvirt's message, as one line."""
    return " ".join((error.get_error_message() or str(error)).split())


def refusal(error: Any, domain: str, action: str) -> BackupfsError:
    """Turn libvirt's exception into ours."""
    code = error.get_error_code()
    reason = sentence(error)
    if code in (libvirt.VIR_ERR_ACCESS_DENIED, libvirt.VIR_ERR_AUTH_FAILED, libvirt.VIR_ERR_OPERATION_DENIED):
        return AccessRefused(domain, action, reason)
    if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
        return LibvirtTimeout(domain, action, reason)
    return LibvirtRefused(domain, action, reason)


@dataclass(eq=False)
class Link:
    """A link to one domain; it heals itself while `_heal` runs."""

    uri: str
    name: str
    uuid: str
    host_uuid: str
    timeout: float
    happenings: trio.MemoryReceiveChannel[Happening]
    _requested_uri: str | None
    _send: trio.MemorySendChannel[Happening]
    _connection: Connection | None = None
    _connected: trio.Event = field(default_factory=trio.Event)
    _broken: trio.Event = field(default_factory=trio.Event)
    _callbacks: list[int] = field(default_factory=list)

    @property
    def is_local(self) -> bool:
        """Whether the domain's files and sockets are files and sockets of this host."""
        return not urlsplit(self.uri).hostname

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

            def work(connection: Connection = connection) -> T:
                return what(connection.lookupByUUIDString(self.uuid))

            try:
                return await in_thread(work)
            except libvirt.libvirtError as error:
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise NoSuchDomain(self.name, self.uri) from error
                # A question that met the restart of libvirtd is put once more; a deed is not,
                # for it may have been done.
                if again and not await is_connected(connection):
                    again = False
                    self._lose(connection)
                    continue
                raise refusal(error, self.name, action) from error

    def _lose(self, connection: Connection | None) -> None:
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

        def on_close(connection: Connection, _reason: int, _opaque: object) -> None:
            hand_over(self._lose, connection)

        def on_lifecycle(_c: object, _d: object, event: int, detail: int, _opaque: object) -> None:
            if event == libvirt.VIR_DOMAIN_EVENT_SHUTDOWN:
                # The guest has powered itself off; with a job running, libvirt and QEMU would
                # wait in "in shutdown" for as long as the job lasts (measured, libvirt 9.0).
                hand_over(self._tell, Happening(Kind.STOPPED, _SHUTDOWNS.get(detail, "shut down")))
            if (event, detail) == (libvirt.VIR_DOMAIN_EVENT_SUSPENDED, libvirt.VIR_DOMAIN_EVENT_SUSPENDED_IOERROR):
                hand_over(self._tell, Happening(Kind.PAUSED_BY_ERROR))
            if event == libvirt.VIR_DOMAIN_EVENT_RESUMED:
                hand_over(self._tell, Happening(Kind.RESUMED))
            if event == libvirt.VIR_DOMAIN_EVENT_STOPPED:
                hand_over(self._tell, Happening(Kind.STOPPED, _ENDS.get(detail, "stopped")))

        def on_job(_c: object, _d: object, statistics: dict[str, Any], _opaque: object) -> None:
            operation = statistics.get("operation", libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP)
            if operation == libvirt.VIR_DOMAIN_JOB_OPERATION_BACKUP:
                hand_over(self._tell, Happening(Kind.JOB_ENDED, statistics.get("errmsg", "")))

        def on_io_error(_c: object, _d: object, _path: str, _alias: str, _action: int, reason: str, _o: object) -> None:
            hand_over(self._tell, Happening(Kind.IO_ERROR, reason))

        def on_threshold(_c: object, _d: object, node: str, *_more: object) -> None:
            hand_over(self._tell, Happening(Kind.SCRATCH_GREW, node))

        def connect() -> tuple[Connection, list[int]]:
            connection = connect_to(self._requested_uri)
            try:
                domain = connection.lookupByUUIDString(self.uuid)
                callbacks = [
                    connection.domainEventRegisterAny(domain, which, callback, None)
                    for which, callback in (
                        (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_lifecycle),
                        (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, on_job),
                        (libvirt.VIR_DOMAIN_EVENT_ID_IO_ERROR_REASON, on_io_error),
                        (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_THRESHOLD, on_threshold),
                    )
                ]
                connection.registerCloseCallback(on_close, None)
            except libvirt.libvirtError as error:
                connection.close()
                if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                    raise NoSuchDomain(self.name, self.uri) from error
                raise LibvirtUnavailable(self.uri, sentence(error)) from error
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
            await in_thread(close)


async def is_connected(connection: Connection) -> bool:
    def ask() -> bool:
        try:
            return connection.isAlive() == 1
        except libvirt.libvirtError:
            return False

    return await in_thread(ask)


def connect_to(uri: str | None) -> Connection:
    """Connect to libvirt (blocks); raise LibvirtUnavailable."""
    try:
        connection = cast(Connection, libvirt.open(uri))
    except libvirt.libvirtError as error:
        raise LibvirtUnavailable(uri or "", sentence(error)) from error
    # Not every driver can (the test driver cannot); then a dead peer shows at the next call.
    with contextlib.suppress(libvirt.libvirtError):
        connection.setKeepAlive(*KEEPALIVE)
    return connection
