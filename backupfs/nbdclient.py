# SPDX-License-Identifier: GPL-3.0-or-later
"""NBD connections, each with a thread of its own: the only module that knows `nbd`.

    trio thread                              connection's thread
    Request ──append──► queue ──(eventfd)──► aio_pread ─► poll(NBD socket, eventfd) ─► done
       ▲                                                                                │
       └───────────── run_sync_soon, only if somebody waits for it ◄────────────────────┘

Polled inside the trio loop, NBD gave a third of the speed: each wake-up of a task costs more
than the megabyte that it brings. So a thread fills buffers that were handed to it, and the trio
thread, which often finds them full already, is woken only when it really waits.

Law: a buffer belongs to its connection from `submit` until the request is done, whoever has
stopped waiting for it; a request is done only when libnbd has let go of the buffer.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import trio

from backupfs.errors import (
    BackupfsError,
    MissingDependency,
    NbdProtocolError,
    NbdReadFailed,
    NbdTimeout,
    NbdUnavailable,
)
from backupfs.extents import ZERO, Builder, ExtentMap, combine, uniform

try:
    import nbd  # type: ignore[import-not-found, unused-ignore]  # the distribution's, without types
except ImportError as error:  # pragma: no cover - proven in a bare tree, not here
    raise MissingDependency("libnbd's Python module", "python3-libnbd") from error

IN_FLIGHT: Final = 16  # requests on one connection; more only wait on the server's side
STATUS_LENGTH: Final = 2**32 - 2**16  # NBD's lengths have 32 bits; aligned for bitmaps
MOST_EXTENTS: Final = 2**21  # of one map: 16 MiB of memory
CONTEXT: Final = "base:allocation"
_STATE_ZERO: Final = 2  # NBD_STATE_ZERO; bit 0, hole, promises nothing about the contents


@dataclass(frozen=True, slots=True)
class Address:
    """Where an export is: a unix socket and the export's name."""

    socket: str
    export: str


class Request:
    """One read, filling *buffer*; got from and waited for in the trio thread."""

    __slots__ = ("_event", "_waiting", "buffer", "done", "error", "length", "offset")

    def __init__(self, offset: int, length: int, buffer: bytearray | memoryview) -> None:
        self.offset = offset
        self.length = length
        self.buffer = buffer
        self.done = False
        self.error: BackupfsError | None = None
        self._waiting = False
        self._event: trio.Event | None = None

    async def wait(self) -> None:
        """Wait until the buffer is full; raise what went wrong. May be waited for by several."""
        if not self.done:
            if self._event is None:
                self._event = trio.Event()
            # In this order, and the thread does it the other way round: no wake-up is lost.
            self._waiting = True
            if not self.done:
                await self._event.wait()
        if self.error is not None:
            raise self.error

    def finish(self, token: trio.lowlevel.TrioToken, error: BackupfsError | None) -> None:
        """Mark it done; called by the connection's thread."""
        self.error = error
        self.done = True
        if self._waiting and self._event is not None:
            with contextlib.suppress(trio.RunFinishedError):
                token.run_sync_soon(self._event.set)


class Connection:
    """One connection and its thread. `opened` tells when it is up, or why it is not.

    With *want_extents* the disk's map is fetched before the first read.
    """

    def __init__(self, address: Address, *, timeout: float, want_extents: bool = False) -> None:
        self.address = address
        self.timeout = timeout
        self.size = 0
        self.extents: ExtentMap | None = None
        self.why_no_extents: str | None = None
        self.error: BackupfsError | None = None
        self.requests = 0
        self.bytes = 0
        self._want_extents = want_extents
        self._token = trio.lowlevel.current_trio_token()
        self._queue: deque[Request] = deque()
        self._sleeping = False
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._opening = Request(0, 0, bytearray())
        self._thread = threading.Thread(target=self._run, name=f"nbd-{address.export}", daemon=True)
        self._thread.start()

    async def opened(self) -> None:
        """Wait until the connection is up; raise NbdUnavailable, NbdTimeout."""
        await self._opening.wait()

    def submit(self, request: Request) -> None:
        """Queue a read; its buffer belongs to the connection until it is done."""
        self._queue.append(request)
        if self._sleeping:
            self._ring()
        if self.error is not None:
            self._fail_queued(self.error)  # the thread has ended and looks no more

    @property
    def pending(self) -> int:
        """How many requests wait to be sent."""
        return len(self._queue)

    async def close(self) -> None:
        """Disconnect and end the thread; what is unanswered fails."""
        self._closing = True
        self._ring()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
        os.close(self._wake)

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        in_flight: dict[int, Request] = {}
        handle = nbd.NBD()
        try:
            self._connect(handle)
            self.size = handle.get_size()
            if self._want_extents:
                self._map(handle)
            self._opening.finish(self._token, None)
            self._serve(handle, in_flight)
            error: BackupfsError = NbdUnavailable(self.address.export, "closed")
        except BackupfsError as caught:
            error = caught
        except nbd.Error as caught:
            error = NbdUnavailable(self.address.export, str(caught))
        except Exception as caught:  # not to be lost in a thread: everybody who waits is told
            error = NbdUnavailable(self.address.export, f"unexpected: {caught!r}")
        # Destroying the handle is what takes the buffers back from libnbd; only then may the
        # requests be called done. The error's frames would keep it alive.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        del handle
        self.error = error
        self._opening.finish(self._token, error)
        for request in in_flight.values():
            request.finish(self._token, error)
        self._fail_queued(error)

    def _fail_queued(self, error: BackupfsError) -> None:
        while self._queue:
            with contextlib.suppress(IndexError):  # the other thread was quicker
                self._queue.popleft().finish(self._token, error)

    def _connect(self, handle: Any) -> None:
        handle.set_export_name(self.address.export)
        handle.set_pread_initialize(False)  # each answer overwrites its whole buffer
        # Not asked for, the server must take requests of any alignment, as readers make them.
        handle.set_request_block_size(False)
        if self._want_extents:
            handle.add_meta_context(CONTEXT)
        handle.aio_connect_unix(self.address.socket)
        self._drive(handle, lambda: bool(handle.aio_is_ready()), "connecting")

    def _drive(self, handle: Any, done: Callable[[], bool], what: str) -> None:
        """Let libnbd work until *done*; raise NbdTimeout if that takes longer than the time-out."""
        deadline = time.monotonic() + self.timeout
        while not done():
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise NbdUnavailable(self.address.export, f"the server closed the connection while {what}")
            if self._closing:
                raise NbdUnavailable(self.address.export, "closed")
            left = deadline - time.monotonic()
            if left <= 0:
                raise NbdTimeout(self.address.export, what, self.timeout)
            self._poll(handle, left)

    def _poll(self, handle: Any, seconds: float) -> None:
        """Wait for the server or for a new request, and let libnbd do what it can."""
        direction = handle.aio_get_direction()
        events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
            select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0
        )
        poller = select.poll()
        poller.register(handle.aio_get_fd(), events)
        poller.register(self._wake, select.POLLIN)
        self._sleeping = True
        # A request that came before the flag was seen has rung nobody.
        ready = dict(poller.poll(0 if self._queue_waits(handle) else max(1, int(seconds * 1000))))
        self._sleeping = False
        if ready.pop(self._wake, 0):
            os.eventfd_read(self._wake)
        for event in ready.values():
            if event & (select.POLLIN | select.POLLHUP | select.POLLERR) and direction & nbd.AIO_DIRECTION_READ:
                handle.aio_notify_read()
            elif event & (select.POLLOUT | select.POLLHUP | select.POLLERR):
                handle.aio_notify_write()

    def _queue_waits(self, handle: Any) -> bool:
        return (
            bool(self._queue)
            and bool(handle.aio_is_ready() or handle.aio_is_processing())
            and (handle.aio_in_flight() < IN_FLIGHT)
        )

    def _serve(self, handle: Any, in_flight: dict[int, Request]) -> None:
        """Send what is queued and hand out what is answered, until closed."""
        last_progress = time.monotonic()
        while not self._closing:
            while self._queue and len(in_flight) < IN_FLIGHT:
                if not in_flight:
                    last_progress = time.monotonic()
                request = self._queue.popleft()
                buffer = nbd.Buffer.from_buffer(request.buffer)
                try:
                    cookie = handle.aio_pread(buffer, request.offset)
                except nbd.Error as error:
                    request.finish(self._token, self._read_failed(request, error))
                    raise
                in_flight[cookie] = request
            left = self.timeout
            if in_flight:
                left -= time.monotonic() - last_progress
                if left <= 0:
                    raise NbdTimeout(self.address.export, f"{len(in_flight)} reads unanswered", self.timeout)
            self._poll(handle, left)
            while in_flight and (cookie := handle.aio_peek_command_completed()) > 0:
                request = in_flight.pop(cookie)
                last_progress = time.monotonic()
                try:
                    handle.aio_command_completed(cookie)
                except nbd.Error as error:
                    if handle.aio_is_dead() or handle.aio_is_closed():
                        request.finish(self._token, NbdUnavailable(self.address.export, str(error)))
                    else:
                        request.finish(self._token, self._read_failed(request, error))
                else:
                    self.requests += 1
                    self.bytes += request.length
                    request.finish(self._token, None)
            if handle.aio_is_dead() or handle.aio_is_closed():
                raise NbdUnavailable(self.address.export, "the server closed the connection")
        if not in_flight:
            with contextlib.suppress(nbd.Error):
                handle.aio_disconnect(0)

    def _read_failed(self, request: Request, error: Any) -> NbdReadFailed:
        return NbdReadFailed(self.address.export, request.offset, request.length, error.string or str(error))

    # --- the map -----------------------------------------------------------------------------

    def _map(self, handle: Any) -> None:
        """Fetch the disk's map; it only saves work, so where it can't be had all is data."""
        try:
            if not handle.can_meta_context(CONTEXT):
                self.why_no_extents = "the NBD server does not tell allocation"
            else:
                # The guest may discard while the server walks down from the scratch to the
                # disk: it looks into the scratch, the old block is saved there and discarded
                # below, and it finds a zero below. A block that this has happened to is in the
                # scratch ever after, so a second walk sees it: zero is only what both call so.
                first, second = self._walk(handle), self._walk(handle)
                self.extents = combine(first, second, lambda one, other: one & other)
        except (NbdProtocolError, nbd.Error) as error:
            self.why_no_extents = str(error)
        if self.extents is None:
            self.extents = uniform(self.size)

    def _walk(self, handle: Any) -> ExtentMap:
        builder = Builder(self.size)
        while builder.position < self.size and len(builder) < MOST_EXTENTS:
            position = builder.position
            length = min(STATUS_LENGTH, self.size - position)
            answers: list[tuple[str, int, list[int]]] = []

            def collect(context: str, offset: int, entries: list[int], _error: Any, into: Any = answers) -> int:
                into.append((context, offset, list(entries)))
                return 0

            cookie = handle.aio_block_status(length, position, collect)
            self._drive(handle, functools.partial(_is_completed, handle, cookie), "mapping")
            self._add(builder, answers, position)
        if builder.position < self.size:
            self.why_no_extents = f"more than {MOST_EXTENTS} extents; beyond {builder.position} all is read"
        return builder.finish()

    def _add(self, builder: Builder, answers: list[tuple[str, int, list[int]]], position: int) -> None:
        """Add one reply to the map; the server is believed only where it can be right."""
        export = self.address.export
        if len(answers) != 1 or answers[0][0] != CONTEXT or answers[0][1] != position:
            raise NbdProtocolError(export, f"it answered something else than {CONTEXT} from {position} on")
        entries = answers[0][2]
        if not entries or len(entries) % 2:
            raise NbdProtocolError(export, f"its map has no extents from {position} on")
        for length, flags in zip(entries[::2], entries[1::2], strict=True):
            if builder.position == self.size:
                raise NbdProtocolError(export, f"its map goes on beyond {self.size}")
            if length <= 0:
                raise NbdProtocolError(export, f"its map has an empty extent at {builder.position}")
            # The last extent of a reply may reach beyond what was asked for, says the protocol.
            builder.append(min(length, self.size - builder.position), ZERO if flags & _STATE_ZERO else 0)


def _is_completed(handle: Any, cookie: int) -> bool:
    return bool(handle.aio_command_completed(cookie))
