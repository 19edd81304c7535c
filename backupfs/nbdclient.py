# SPDX-License-Identifier: GPL-3.0-or-later
"""NBD connections, each with a thread of its own: the only module that knows `nbd`.

    Wire ──┬── Connection      reads, as drawn below
           └── nbdstatus.StatusWire      asks what is allocated, or what changed

    trio thread                              connection's thread
    Request ──append──► queue ──(eventfd)──► aio_pread ─► poll(NBD socket, eventfd) ─► done
       ▲                                                                                │
       └───────────── run_sync_soon, only if somebody waits for it ◄────────────────────┘

Polled inside the trio loop, NBD gave a third of the speed: each wake-up of a task costs more
than the megabyte that it brings. So a thread fills buffers that were handed to it, and the trio
thread, which often finds them full already, is woken only when it really waits. The thread
sleeps on the socket and an eventfd together: with libnbd's own poll a request that came while
another was in flight would be sent only after that one's answer.

Reading goes without structured replies: for those QEMU looks each read's allocation up once more
and answers it in pieces, which costs up to a third of the speed. The map needs them, so it is
fetched over a connection of its own, which may break without harm.

Law: a buffer belongs to its connection from `submit` until the request is done, whoever has
stopped waiting for it; a request is done only when libnbd has let go of the buffer.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import trio

from backupfs.errors import (
    BackupfsError,
    MissingDependency,
    NbdProtocolError,
    NbdReadFailed,
    NbdTimeout,
    NbdUnavailable,
)
from backupfs.extents import LARGEST
from backupfs.request import Patience, Request

try:
    import nbd  # type: ignore[import-not-found, unused-ignore]  # the distribution's, without types
except ImportError as error:  # pragma: no cover - proven in a bare tree, not here
    raise MissingDependency("libnbd's Python module", "python3-libnbd") from error

log = logging.getLogger("backupfs.nbdclient")

LONGEST: Final = 2**20  # bytes of one request
IN_FLIGHT: Final = 16  # requests on one connection; more only wait on the server's side
MOMENT: Final = 10  # milliseconds
NbdError: Final[type[Exception]] = nbd.Error  # what all of a Handle's methods raise


class Handle(Protocol):
    """What is used of `nbd.NBD`, which has no types. All raise nbd.Error; see libnbd(3)."""

    def set_export_name(self, name: str, /) -> None: ...
    def set_pread_initialize(self, request: bool, /) -> None: ...
    def set_request_structured_replies(self, request: bool, /) -> None: ...
    def add_meta_context(self, name: str, /) -> None: ...
    def can_meta_context(self, name: str, /) -> bool: ...
    def get_size(self) -> int: ...
    def get_block_size(self, which: int, /) -> int: ...
    def aio_connect_unix(self, path: str, /) -> None: ...
    def aio_disconnect(self, flags: int, /) -> None: ...
    def aio_pread(self, buffer: Any, offset: int, completion: Callable[[Any], int], /) -> int: ...
    def aio_block_status(self, count: int, offset: int, extent: Callable[..., int], /) -> int: ...
    def aio_get_fd(self) -> int: ...
    def aio_get_direction(self) -> int: ...
    def aio_notify_read(self) -> None: ...
    def aio_notify_write(self) -> None: ...
    def poll(self, milliseconds: int, /) -> int: ...
    def aio_is_ready(self) -> bool: ...
    def aio_is_dead(self) -> bool: ...
    def aio_is_closed(self) -> bool: ...
    def aio_command_completed(self, cookie: int, /) -> bool: ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where an export is: a unix socket and the export's name."""

    socket: str
    export: str

    def connect(self, handle: Handle) -> None:
        """Begin to connect."""
        handle.aio_connect_unix(self.socket)


class Wire:
    """What connections have in common: a thread that lets libnbd work, and how to wake it up.

    *size* is what the disk must have if it was seen before.
    """

    def __init__(self, address: Address, timeout: float, size: int | None) -> None:
        self.address = address
        self.timeout = timeout
        self.size = size
        self.alignment = 1  # of what may be asked for
        self._token = trio.lowlevel.current_trio_token()
        self._queue: deque[Any] = deque()  # of what the thread is to do
        self._sleeping = False
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        self._polled: tuple[int, int] | None = None  # the NBD socket and its events, as registered
        self._thread = threading.Thread(target=self._run, name=f"nbd-{address.export}", daemon=True)

    def _run(self) -> None:
        raise NotImplementedError  # what the thread does

    async def close(self) -> None:
        """Disconnect and end the thread; what is unanswered fails."""
        self._closing = True
        if self._wake >= 0:
            self._ring()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1

    def _ring(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _hush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)

    def _unavailable(self, reason: str) -> NbdUnavailable:
        return NbdUnavailable(self.address.export, reason)

    def _connect(self, context: str | None = None) -> Handle:
        """Connect; with a meta *context* if one is wanted."""
        handle: Handle = nbd.NBD()
        handle.set_export_name(self.address.export)
        handle.set_pread_initialize(False)  # an answer overwrites all of its buffer, or is an error
        handle.set_request_structured_replies(context is not None)
        if context is not None:
            handle.add_meta_context(context)
        self._unwatch()  # the one before is gone
        self.address.connect(handle)
        self._drive(handle, handle.aio_is_ready, "connecting")
        return handle

    def _check(self, handle: Handle) -> None:
        """See that the server's disk is one that we can read, and still the same."""
        size = handle.get_size()
        if not 0 <= size <= LARGEST:
            raise NbdProtocolError(self.address.export, f"it tells a size of {size} bytes")
        if self.size not in (None, size):
            raise self._unavailable(f"the disk has {size} bytes now, it had {self.size}")
        self.size = size
        self.alignment = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
        longest = handle.get_block_size(nbd.SIZE_MAXIMUM)
        if 0 < longest < LONGEST:
            raise self._unavailable(f"the server takes requests of at most {longest} bytes; {LONGEST} are needed")

    def _drive(self, handle: Handle, is_done: Callable[[], bool], what: str, seconds: float | None = None) -> None:
        """Let libnbd work until *is_done*; raise NbdTimeout after *seconds* of silence, or the time-out."""
        patience = Patience(self.timeout if seconds is None else min(seconds, self.timeout))
        while not is_done():
            self._watch(handle)
            if self._closing:
                raise self._unavailable("closed")
            if patience.is_over:
                raise NbdTimeout(self.address.export, what, patience.seconds)
            self._poll(handle, patience)

    def _watch(self, handle: Handle) -> None:
        """See what libnbd waits for; raise if it waits no more."""
        # In this order: a dead handle's descriptor may be somebody else's by now.
        if handle.aio_is_dead() or handle.aio_is_closed():
            raise self._unavailable("the server closed the connection")
        direction = handle.aio_get_direction()
        fd = handle.aio_get_fd()
        events = (
            select.POLLRDHUP
            | (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0)
            | (select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)
        )
        if self._polled != (fd, events):
            self._unwatch()
            self._poller.register(fd, events)
            self._polled = fd, events

    def _unwatch(self) -> None:
        if self._polled is not None:
            self._poller.unregister(self._polled[0])
            self._polled = None

    def _poll(self, handle: Handle, patience: Patience | None, *, has_room: bool = False) -> bool:
        """Wait for the server, or for a ring if there *has_room* for a request; let libnbd do what it can.

        Return whether there is more to see than bytes that were read.
        """
        milliseconds = -1 if patience is None else math.ceil(patience.left * 1000)
        begun = time.monotonic()
        self._sleeping = has_room
        # A request that came before the flag was seen has rung nobody.
        ready = self._poller.poll(0 if has_room and self._queue else milliseconds)
        self._sleeping = False
        seen = 0
        for fd, event in ready:
            if fd == self._wake:
                self._hush()
            else:
                seen = event
        if patience is not None:
            patience.spend(time.monotonic() - begun, bool(seen))
        if seen & ~select.POLLOUT:
            handle.aio_notify_read()
        elif seen:
            handle.aio_notify_write()
        return bool(seen & ~select.POLLIN)


class Connection(Wire):
    """One connection for reads and its thread. `opened` tells when it is up, or why it is not.

    One that broke keeps the reason in `error`, and stays broken.
    """

    def __init__(self, address: Address, *, timeout: float, size: int | None = None) -> None:
        super().__init__(address, timeout, size)
        self.error: BackupfsError | None = None
        self.requests = 0
        self.bytes = 0
        self._answered: list[tuple[Request, int]] = []  # with the error number, or 0
        self._opening = Request(0, 0, bytearray())
        self._thread.start()

    async def opened(self) -> None:
        """Wait until the connection is up; raise NbdUnavailable, NbdTimeout, NbdProtocolError."""
        await self._opening.wait()

    def submit(self, request: Request) -> None:
        """Queue a read of LONGEST at most; its buffer belongs to the connection until it is done."""
        self._queue.append(request)
        if self._sleeping:
            self._ring()
        if self.error is not None:
            self._fail_queued(self.error)  # the thread has ended and looks no more

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        in_flight: dict[Request, int] = {}
        error = self._live(in_flight)
        # The handle is gone, and with it libnbd's hold on the buffers: only now are the requests
        # done. The error stands before anybody wakes up and looks for the broken connection.
        self.error = error
        self._opening.finish(self._token, error)
        for request in in_flight:
            request.finish(self._token, error)
        self._fail_queued(error)

    def _live(self, in_flight: dict[Request, int]) -> BackupfsError:
        """Connect and serve until closed or broken; return why it ended, with no handle left."""
        error: BackupfsError
        try:
            handle = self._connect()
            self._check(handle)
            self._opening.finish(self._token, None)
            self._serve(handle, in_flight)
            error = self._unavailable("closed")
        except BackupfsError as caught:
            error = caught
        except nbd.Error as caught:
            error = self._unavailable(str(caught))
        except Exception as caught:
            log.exception("%s: unexpected, in the connection's thread", self.address.export)
            error = self._unavailable(f"unexpected: {caught!r}")
        # Its frames hold the handle.
        error.__traceback__ = error.__context__ = error.__cause__ = None
        return error

    def _fail_queued(self, error: BackupfsError) -> None:
        while self._queue:
            with contextlib.suppress(IndexError):  # the other thread was quicker
                self._queue.popleft().finish(self._token, error)

    # --- reads -------------------------------------------------------------------------------

    def _serve(self, handle: Handle, in_flight: dict[Request, int]) -> None:
        """Send what is queued and hand out what is answered, until closed.

        A megabyte comes in six pieces, and each call of libnbd's lets another thread have the
        interpreter and then waits for its turn again. So the rest of an answer that has begun to
        come is waited for by libnbd's own poll, one call a piece. What else there is to see (who
        closed, what waits to be sent) changes only when something was sent, was answered, which
        death does to all that is in flight, or when poll says so.
        """
        patience = Patience(self.timeout)
        look, midway = True, False
        while not self._closing:
            while self._queue and len(in_flight) < IN_FLIGHT:
                self._send(handle, self._queue.popleft(), in_flight)
                look = True
            if midway:
                midway = self._poll_midway(handle, patience)
            else:
                if look or not in_flight:
                    self._watch(handle)
                if not in_flight:
                    patience.renew()
                look = self._poll(handle, patience if in_flight else None, has_room=len(in_flight) < IN_FLIGHT)
                midway = bool(in_flight) and not look
            if self._answered:
                self._hand_out(handle, in_flight)
                patience.renew()
                look, midway = True, False
            if in_flight and patience.is_over:
                raise NbdTimeout(self.address.export, f"{len(in_flight)} reads are waiting", self.timeout)
        if not in_flight:
            with contextlib.suppress(nbd.Error):
                handle.aio_disconnect(0)

    def _poll_midway(self, handle: Handle, patience: Patience) -> bool:
        """Wait a moment for the next piece of an answer; return whether it came."""
        begun = time.monotonic()
        came = handle.poll(MOMENT) > 0  # of a ring it knows nothing: hence a moment, not longer
        patience.spend(time.monotonic() - begun, came)
        return came

    def _send(self, handle: Handle, request: Request, in_flight: dict[Request, int]) -> None:
        try:
            # Not in an nbd.Buffer: libnbd 1.14 never lets go of what was made by its from_buffer.
            in_flight[request] = handle.aio_pread(
                request.buffer, request.offset, functools.partial(self._note, request)
            )
        except nbd.Error as error:
            if handle.aio_is_dead() or handle.aio_is_closed():
                self._queue.appendleft(request)  # fails with the connection, not for itself
                raise
            request.finish(self._token, self._read_failed(request, error))

    def _note(self, request: Request, error: Any) -> int:
        """Note an answer; libnbd calls this in the middle of its work. Return 1 if that is all about it."""
        self._answered.append((request, error.value))
        return 0 if error.value else 1

    def _hand_out(self, handle: Handle, in_flight: dict[Request, int]) -> None:
        """Finish the requests that were answered."""
        answered, self._answered = self._answered, []
        for request, number in answered:
            if number:
                self._hand_out_error(handle, request, in_flight)
            else:
                del in_flight[request]
                self.requests += 1
                self.bytes += request.length
                request.finish(self._token, None)

    def _hand_out_error(self, handle: Handle, request: Request, in_flight: dict[Request, int]) -> None:
        try:
            handle.aio_command_completed(in_flight[request])
        except nbd.Error as error:
            # ESHUTDOWN: the export is being taken away, which is no word about these bytes.
            if handle.aio_is_dead() or handle.aio_is_closed() or error.errno == "ESHUTDOWN":
                raise self._unavailable(str(error)) from error
            del in_flight[request]
            request.finish(self._token, self._read_failed(request, error))

    def _read_failed(self, request: Request, error: Any) -> NbdReadFailed:
        return NbdReadFailed(self.address.export, request.offset, request.length, str(error))
