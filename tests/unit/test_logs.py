# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backupfs import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    loggers = logging.getLogger("backupfs"), logging.getLogger("pyfuse3")
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    server.bind(str(path))
    server.settimeout(10)
    return server


def test_a_name_cannot_forge_a_line() -> None:
    ring = logs.configure_logging(foreground=True, debug=False)
    logging.getLogger("backupfs.test").info("%s begins", "web\n2026-01-01 ERROR forged\x1b[2J")
    (line,) = ring.render().decode().splitlines()
    assert r"web\n2026-01-01 ERROR forged\x1b[2J begins" in line


@pytest.mark.expects_warning
def test_an_error_s_text_cannot_forge_a_line_either() -> None:
    ring = logs.configure_logging(foreground=True, debug=False)
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 INFO forged\x1b[2J\u202e" + "y" * 10_000)
    except ValueError:
        logging.getLogger("backupfs").exception("unexpected")
    first, *rest = ring.render().decode().splitlines()
    assert first.endswith("ERROR unexpected")
    assert all(line.startswith("  | ") for line in rest)
    assert r"  | 2026-01-01 00:00:00,000 INFO forged\x1b[2J\u202e" in ring.render().decode()
    assert max(map(len, rest)) < 2 * logs.LONGEST_LINE


@pytest.mark.parametrize("odd", ["\0", "\r", "\x7f", "\x9b", "\u2028", "\u202e", "\udc80", "\xa0"])
def test_what_a_terminal_could_obey_is_escaped(odd: str) -> None:
    assert logs.printable(f"a{odd}b").isascii()
    assert logs.printable("domäne „1“ – 日本") == "domäne „1“ – 日本"


def test_a_line_has_an_end() -> None:
    ring = logs.configure_logging(foreground=True, debug=False)
    logging.getLogger("backupfs").info("%s", "x" * 100_000)
    (line,) = ring.render().decode().splitlines()
    assert len(line) < logs.LONGEST_LINE + 100
    assert line.endswith(f"x … ({100_000 - logs.LONGEST_LINE} more characters)")


def test_lines_can_be_read_while_others_write_them() -> None:
    ring = logs.configure_logging(foreground=True, debug=False)
    logger = logging.getLogger("backupfs")
    threads = [threading.Thread(target=lambda: [logger.info("line") for _ in range(500)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        ring.render()
    assert ring.render().count(b"\n") == 1000


def test_only_the_last_lines_are_kept() -> None:
    ring = logs.configure_logging(foreground=True, debug=False)
    for number in range(logs.LINES + 5):
        logging.getLogger("backupfs").info("line %d", number)
    kept = ring.render().decode().splitlines()
    assert len(kept) == logs.LINES
    assert kept[0].endswith("line 5")


def test_debug_lines_need_debug(capsys: pytest.CaptureFixture[str]) -> None:
    for debug in (False, True):
        ring = logs.configure_logging(foreground=True, debug=debug)
        logging.getLogger("backupfs").debug("detail")
        assert (b"detail" in ring.render()) is debug
    assert "detail" in capsys.readouterr().err
    assert ring.destination == "stderr"


def test_without_syslog_the_log_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listen(tmp_path / "dead").close()
    for name in ("none", "dead"):
        monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / name))
        ring = logs.configure_logging(foreground=False, debug=False)
        assert b"the log is only in .backupfs/log" in ring.render()
        assert ring.destination == ".backupfs/log"
        assert logging.getLogger("pyfuse3").handlers == [ring]


@pytest.mark.expects_warning
def test_syslog_is_used_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "log"))
    with listen(tmp_path / "log") as server:
        ring = logs.configure_logging(foreground=False, debug=True)
        logger = logging.getLogger("backupfs")
        for level, severity in ((logging.DEBUG, 7), (logging.INFO, 6), (logging.WARNING, 4), (logging.ERROR, 3)):
            logger.log(level, "hello\n\udc80")
            name = logging.getLevelName(level)
            expected = f"<{3 * 8 + severity}>backupfs[{os.getpid()}]: {name} hello\\n\\udc80"
            assert server.recv(4096).decode() == expected
        logging.getLogger("pyfuse3").warning("from FUSE")
        assert server.recv(4096).endswith(b"WARNING from FUSE")
    assert ring.destination == "syslog"
    assert b"from FUSE" in ring.render()


def test_a_log_daemon_that_was_restarted_is_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(logs, "SYSLOG", str(path))
    with listen(path):
        ring = logs.configure_logging(foreground=False, debug=False)
    logger = logging.getLogger("backupfs")
    for line in ("one", "two", "three"):
        logger.info("nobody hears %s", line)
    path.unlink()
    with listen(path) as server:
        logger.info("again")
        assert server.recv(4096).endswith(b"INFO again")
    assert ring.render().count(b"\n") == 4


def test_a_log_daemon_that_is_stuck_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "log"
    monkeypatch.setattr(logs, "SYSLOG", str(path))
    with listen(path):  # and never read
        ring = logs.configure_logging(foreground=False, debug=False)
        for number in range(5000):
            logging.getLogger("backupfs").info("line %d", number)
    assert ring.render().endswith(b"line 4999\n")


@pytest.mark.parametrize("foreground", [True, False])
def test_a_bad_log_call_stops_nothing(
    foreground: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(logs, "SYSLOG", str(tmp_path / "log"))
    with listen(tmp_path / "log"):
        ring = logs.configure_logging(foreground=foreground, debug=False)
        logging.getLogger("backupfs").info("%d", "no number")
    assert ring.render() == b""
    assert "TypeError" in capsys.readouterr().err
