# SPDX-License-Identifier: GPL-3.0-or-later
"""What the mount and its watchdog say to each other.

    mount ──watch {…}, begin {record}, began, ended, bye──► watchdog
          ◄──ready, guarding {job_id}, lost {job_id, reason}, log {level, text}──

One JSON object a packet, on a socketpair that keeps packets apart. Nothing is waited for when
something is said, so that neither can be held up by the other being stopped or busy. When an end
closes without `bye`, its process has died; that is what the watchdog is for.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Final

import trio

LONGEST: Final = 2**17  # bytes of a packet: below what a socket takes at once, for 300 disks


def make_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Peer:
    """The other process, seen from one end of the pair. Owns the socket."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end

    def tell(self, say: str, **more: Any) -> bool:
        """Say something at once; False where the other is gone, or has stopped listening."""
        try:
            self._socket.send(json.dumps({"say": say, **more}).encode(), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    async def hear(self) -> dict[str, Any] | None:
        """Wait for what the other says; None when it is gone."""
        while True:
            try:
                packet = self._socket.recv(LONGEST)
            except BlockingIOError:
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    return None
                continue
            except OSError:
                return None
            await trio.lowlevel.checkpoint()
            message = json.loads(packet) if packet else None
            assert message is None or isinstance(message, dict)
            return message

    def close(self) -> None:
        """Close this end; whoever waits in `hear` hears None."""
        with contextlib.suppress(ValueError):  # closed already
            trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
