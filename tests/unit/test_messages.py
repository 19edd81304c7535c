# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from backupfs.messages import LONGEST, Peer, make_pair


@pytest.fixture
async def ends() -> Iterator[tuple[Peer, Peer]]:
    one, other = (Peer(end) for end in make_pair())
    yield one, other
    one.close()
    other.close()


async def test_messages_arrive_apart_and_in_order(ends: tuple[Peer, Peer]) -> None:
    mount, watchdog = ends
    assert mount.tell("begin", record={"job_id": "ü\n"})
    assert mount.tell("began")
    assert await watchdog.hear() == {"say": "begin", "record": {"job_id": "ü\n"}}
    assert await watchdog.hear() == {"say": "began"}


async def test_who_listens_hears_what_is_said_later_and_then_that_the_other_is_gone(ends: tuple[Peer, Peer]) -> None:
    mount, watchdog = ends
    heard = []

    async def listen() -> None:
        while (message := await watchdog.hear()) is not None:
            heard.append(message["say"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        mount.tell("bye")
        await trio.testing.wait_all_tasks_blocked()
        mount.close()
    assert heard == ["bye"]
    assert not watchdog.tell("ready"), "nobody is there"


async def test_closing_ones_own_end_ends_the_listening(ends: tuple[Peer, Peer]) -> None:
    mount, _watchdog = ends

    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            assert await mount.hear() is None

        nursery.start_soon(listen)
        await trio.testing.wait_all_tasks_blocked()
        mount.close()
    mount.close()  # twice does nothing
    assert await mount.hear() is None


async def test_one_that_is_stopped_holds_nobody_up(ends: tuple[Peer, Peer]) -> None:
    mount, _watchdog = ends
    with trio.fail_after(10):
        while mount.tell("log", text="x" * 1000):
            pass


async def test_a_record_of_many_disks_is_one_packet(ends: tuple[Peer, Peer]) -> None:
    mount, watchdog = ends
    long = "x" * (LONGEST - 100)
    assert mount.tell("begin", record=long)
    assert await watchdog.hear() == {"say": "begin", "record": long}
