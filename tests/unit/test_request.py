# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest
import trio
import trio.testing

from backupfs.errors import NbdReadFailed, NbdUnavailable
from backupfs.request import Patience, Request


def test_patience_ends_with_silence() -> None:
    patience = Patience(10)
    patience.spend(4, heard=False)
    assert (patience.left, patience.is_over) == (6, False)
    patience.spend(6, heard=False)
    assert (patience.left, patience.is_over) == (0, True)
    patience.renew()
    assert (patience.left, patience.is_over) == (10, False)


def test_patience_outlasts_a_stop_of_ourselves() -> None:
    patience = Patience(10)
    # An hour in poll, because we were stopped; the answer is in the socket.
    patience.spend(3600, heard=True)
    assert not patience.is_over
    patience.spend(0.1, heard=True)
    assert not patience.is_over
    patience.spend(0, heard=False)
    assert patience.is_over


def test_patience_ends_with_an_answer_that_never_ends() -> None:
    patience = Patience(10)
    for _ in range(19):
        patience.spend(1, heard=True)
        assert not patience.is_over
    patience.spend(1, heard=True)
    assert patience.is_over


async def test_request_that_is_done_is_not_waited_for() -> None:
    request = Request(0, 1, bytearray(1))
    request.finish(trio.lowlevel.current_trio_token(), None)
    with trio.fail_after(1):
        await request.wait()


async def test_all_who_wait_are_told_by_errors_of_their_own() -> None:
    request = Request(0, 1, bytearray(1))
    told: list[BaseException] = []

    async def wait() -> None:
        with pytest.raises(NbdReadFailed) as caught:
            await request.wait()
        told.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        token = trio.lowlevel.current_trio_token()
        await trio.to_thread.run_sync(request.finish, token, NbdReadFailed("vda", 0, 1, "EIO"))
    assert len({id(error) for error in told}) == 3
    assert str(told[0]) == str(told[1]) == "vda: reading 1 bytes at 0 failed: EIO"


async def test_request_that_failed_before_it_was_sent_is_done() -> None:
    request = Request(0, 1, bytearray(1))
    request.fail(NbdUnavailable("vda", "closed"))
    with pytest.raises(NbdUnavailable):
        await request.wait()
