# SPDX-License-Identifier: GPL-3.0-or-later
"""Labels never go back and a job is never forgotten, wherever the process is killed."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backupfs.state import JobRecord, State, next_instant, open_state

seconds = st.floats(0, 4e9, allow_nan=False)


@given(seconds, st.integers(0, 2**33))
def test_a_label_is_not_before_its_moment_and_after_the_last(now: float, last: int) -> None:
    instant = next_instant(now, last)
    assert instant >= now
    assert instant > last
    assert instant in (last + 1, math.ceil(now))


@given(st.lists(seconds, max_size=20))
def test_labels_rise_whatever_the_clock_does(clock: list[float]) -> None:
    last = 0
    for now in clock:
        fresh = next_instant(now, last)
        assert fresh > last
        last = fresh


class _KilledError(BaseException):
    """The process is gone at this system call."""


class Killed(RuleBasedStateMachine):
    """A process that notes labels and jobs, and is killed at any system call of it."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="backupfs-state-"))
        self.served = 0  # the latest label that was told to be durable
        self.jobs: set[JobRecord | None] = {None}  # what the record may be
        self.number = 0

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def opened(self) -> State:
        with mock.patch.dict(os.environ, {"STATE_DIRECTORY": str(self.folder)}):
            with open_state("host", "uuid", domain="d", holder="m") as state:
                return state  # it does without the lock: here is nobody else

    def run_until(self, calls: int, deed: object) -> bool:
        """Do *deed*; killed before its system call number *calls*. Whether it came to its end."""
        left = [calls]

        def counted(real: object) -> object:
            def call(*arguments: object, **named: object) -> object:
                if left[0] == 0:
                    raise _KilledError
                left[0] -= 1
                return real(*arguments, **named)  # type: ignore[operator]

            return call

        with mock.patch.multiple(
            os,
            open=counted(os.open),
            fsync=counted(os.fsync),
            utime=counted(os.utime),
            unlink=counted(os.unlink),
            replace=counted(os.replace),
        ):
            try:
                deed()  # type: ignore[operator]
            except _KilledError:
                return False
        return True

    @rule(step=st.integers(1, 100), calls=st.integers(0, 6))
    def advance(self, step: int, calls: int) -> None:
        state = self.opened()
        instant = state.last_instant + step
        if self.run_until(calls, lambda: state.advance_to(instant)):
            self.served = instant
            assert state.last_instant == instant

    @rule(calls=st.integers(0, 6))
    def record(self, calls: int) -> None:
        state = self.opened()
        self.number += 1
        record = JobRecord(f"job{self.number}", "/s", (f"/i.{self.number}",), self.number, 0.5)
        self.jobs |= {record}
        if self.run_until(calls, lambda: state.record_job(record)):
            self.jobs = {record}

    @rule(calls=st.integers(0, 6))
    def forget(self, calls: int) -> None:
        state = self.opened()
        self.jobs |= {None}
        if self.run_until(calls, state.forget_job):
            self.jobs = {None}

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "folder"):
            state = self.opened()
            assert state.last_instant >= self.served
            assert state.job in self.jobs
            self.jobs = {state.job}  # what was read once stays


TestKilled = Killed.TestCase
TestKilled.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


@given(st.integers(1, 2**32), st.binary(max_size=80), st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_damage_of_any_kind_is_survived_and_no_label_goes_back(instant: int, label: bytes, job: bytes) -> None:
    logging.getLogger("backupfs.state").setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as base, mock.patch.dict(os.environ, {"STATE_DIRECTORY": base}):
            with open_state("host", "uuid", domain="d", holder="m") as state:
                state.advance_to(instant)
                folder = state.folder
            for name, contents in (("instant", label), ("job", job)):
                (folder / name).write_bytes(contents)
                os.utime(folder / name, (instant, instant))
            with open_state("host", "uuid", domain="d", holder="m") as state:
                assert state.last_instant >= instant
                assert state.job is None
    finally:
        logging.getLogger("backupfs.state").setLevel(logging.NOTSET)
