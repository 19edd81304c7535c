# SPDX-License-Identifier: GPL-3.0-or-later
"""For all tests: a WARNING that a test does not expect fails it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import hypothesis
import pytest

# A busy machine makes any example slow; pytest's own time-out catches what hangs.
hypothesis.settings.register_profile("backupfs", deadline=None)
hypothesis.settings.load_profile("backupfs")

pytest_plugins = ["tests.faults"]


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--guard-runs", type=int, default=3, help="how often the scratch guard is tried on each small file system"
    )


@pytest.fixture
def guard_runs(request: pytest.FixtureRequest) -> int:
    """How often to let the scratch space fill up."""
    number = request.config.getoption("--guard-runs")
    assert isinstance(number, int)
    return number


@pytest.fixture(autouse=True)
def logged_warnings(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """What backupfs has logged as WARNING or worse, in this process."""
    collector = _Collector()
    logger = logging.getLogger("backupfs")
    logger.addHandler(collector)
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)
    if collector.lines and request.node.get_closest_marker("expects_warning") is None:
        pytest.fail("unexpected warnings: " + "; ".join(collector.lines))
