# SPDX-License-Identifier: GPL-3.0-or-later
"""Where log lines go: stderr in the foreground, else syslog, and always `.backupfs/log`.

A domain's name may hold anything; no handler lets a control character of it forge a line.
"""

from __future__ import annotations

import collections
import logging
import logging.handlers
import os
import sys
from typing import Final

SYSLOG: Final = "/dev/log"
LINES: Final = 2000


class _OneLine(logging.Formatter):
    """Renders a record as one line of printable text; only a traceback has more."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


class RingLog(logging.Handler):
    """Keeps the last lines in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.destination = ".backupfs/log"
        self._lines: collections.deque[str] = collections.deque(maxlen=LINES)
        self.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.append(self.format(record))
        except Exception:  # logging's own rule: a bad log call must not stop the work
            self.handleError(record)

    def render(self) -> bytes:
        """Return the kept lines as the file's contents."""
        return "".join(f"{line}\n" for line in list(self._lines)).encode("utf-8", "backslashreplace")


def configure_logging(*, foreground: bool, debug: bool) -> RingLog:
    """Set the logger "backupfs" up; return the lines for `.backupfs/log`."""
    logger = logging.getLogger("backupfs")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    ring = RingLog()
    logger.handlers[:] = [ring]
    handler: logging.Handler
    if foreground:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        ring.destination = "stderr"
    elif os.path.exists(SYSLOG):
        handler = logging.handlers.SysLogHandler(SYSLOG)
        handler.ident = f"backupfs[{os.getpid()}]: "
        handler.setFormatter(_OneLine("%(levelname)s %(message)s"))
        ring.destination = "syslog"
    else:
        logger.info("no %s, so the log is only in .backupfs/log", SYSLOG)
        return ring
    logger.addHandler(handler)
    # pyfuse3 tells through its own logger when the kernel refuses an answer.
    foreign = logging.getLogger("pyfuse3")
    foreign.setLevel(logging.WARNING)
    foreign.handlers[:] = [ring, handler]
    foreign.propagate = False
    return ring
