# SPDX-License-Identifier: GPL-3.0-or-later
"""Where log lines go: stderr in the foreground, else syslog, and always `.backupfs/log`.

    log.info(…) ─► logger "backupfs" ─┬─► ring ─► .backupfs/log
                                      └─► stderr │ /dev/log

Law: logging never fails, and never waits for a log daemon: one that is stuck must not stop a
reader. A domain's name may hold anything; no handler lets a control character of it forge a line.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import socket
import sys
from types import TracebackType
from typing import Final

SYSLOG: Final = "/dev/log"
LINES: Final = 2000
LONGEST_LINE: Final = 4096  # characters; what libvirt says in an error has no bound
_DAEMON: Final = 3  # syslog's facility, see syslog(3); the levels' severities too
_SEVERITIES: Final = (
    (logging.CRITICAL, 2),
    (logging.ERROR, 3),
    (logging.WARNING, 4),
    (logging.INFO, 6),
    (logging.NOTSET, 7),
)
_FORMAT: Final = "%(levelname)s %(message)s"
_DATED: Final = f"%(asctime)s {_FORMAT}"


def printable(text: str) -> str:
    """Return *text* with whatever a terminal or a log could take for more than text escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _line(text: str) -> str:
    """Return *text* as one printable line of bounded length."""
    more = len(text) - LONGEST_LINE
    return printable(text) if more <= 0 else f"{printable(text[:LONGEST_LINE])} … ({more} more characters)"


class _OneLine(logging.Formatter):
    """Renders a record as one line of printable text; a traceback follows it, marked."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _line(record.message)
        return super().formatMessage(record)

    def formatException(
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        # It quotes the error, whose text may hold anything, line breaks too. So each line is
        # marked as no line of ours.
        return "\n".join(f"  | {_line(line)}" for line in super().formatException(ei).split("\n"))


class RingLog(logging.Handler):
    """Keeps the last lines in memory. `destination` says where else they go."""

    def __init__(self) -> None:
        super().__init__()
        self.destination = ".backupfs/log"
        self._lines: collections.deque[str] = collections.deque(maxlen=LINES)
        self.setFormatter(_OneLine(_DATED))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.extend(self.format(record).split("\n"))
        except Exception:  # logging's own rule: a bad log call must not stop the work
            self.handleError(record)

    def render(self) -> bytes:
        """Return the kept lines as the file's contents."""
        self.acquire()  # other threads log too
        try:
            lines = list(self._lines)
        finally:
            self.release()
        return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


class _Syslog(logging.Handler):
    """Sends to a log daemon, and drops what it will not take at once: the ring has it.

    The standard library's handler would wait for a daemon that is stuck. Raises OSError if there
    is none.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._ident = f"backupfs[{os.getpid()}]"
        self._socket = self._connect()
        self.setFormatter(_OneLine(_FORMAT))

    def _connect(self) -> socket.socket:
        fresh = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            fresh.connect(self._path)
        except OSError:
            fresh.close()
            raise
        return fresh

    def emit(self, record: logging.LogRecord) -> None:
        try:
            lines = self.format(record).split("\n")
        except Exception:  # logging's own rule, as above
            self.handleError(record)
            return
        priority = _DAEMON * 8 + next(code for level, code in _SEVERITIES if record.levelno >= level)
        for line in lines:
            self._send(f"<{priority}>{self._ident}: {line}".encode("utf-8", "backslashreplace"))

    def _send(self, datagram: bytes) -> None:
        with contextlib.suppress(OSError):  # it is gone, or its queue is full
            try:
                self._socket.send(datagram)
            except BlockingIOError:
                raise
            except OSError:  # it was restarted
                fresh = self._connect()
                self._socket.close()
                self._socket = fresh
                fresh.send(datagram)

    def close(self) -> None:
        self._socket.close()
        super().close()


def configure_logging(*, foreground: bool, debug: bool) -> RingLog:
    """Set the logger "backupfs" up; return the lines for `.backupfs/log`.

    To be called in the process that will log, for its number goes into syslog.
    """
    ring = RingLog()
    handlers: list[logging.Handler] = [ring]
    if foreground:
        stderr = logging.StreamHandler(sys.stderr)
        stderr.setFormatter(_OneLine(_DATED))
        handlers.append(stderr)
        ring.destination = "stderr"
    else:
        # A daemon that died leaves its socket: only connecting tells.
        with contextlib.suppress(OSError):
            handlers.append(_Syslog(SYSLOG))
            ring.destination = "syslog"
    # pyfuse3 tells through its own logger when the kernel refuses an answer.
    for name, level in (("backupfs", logging.DEBUG if debug else logging.INFO), ("pyfuse3", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.propagate = False
        logger.handlers[:] = handlers
    if len(handlers) == 1:
        logging.getLogger("backupfs").info("no log daemon at %s: the log is only in .backupfs/log", SYSLOG)
    return ring
