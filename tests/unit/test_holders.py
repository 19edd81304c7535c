# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import subprocess
import threading

import pytest
import trio

from backupfs.holders import Holders, thread_group


@pytest.fixture
def process() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["cat"], stdin=subprocess.PIPE)


async def test_a_process_counts_once_and_until_it_ends(process: subprocess.Popen[bytes]) -> None:
    gone = trio.Event()
    holders = Holders(int, gone.set)
    async with trio.open_nursery() as nursery:
        holders.add(process.pid, nursery)
        holders.add(process.pid, nursery)
        assert holders.pids == (process.pid,)
        process.communicate()
        with trio.fail_after(10):
            await gone.wait()
        assert holders.pids == ()


async def test_clear_forgets_the_living(process: subprocess.Popen[bytes]) -> None:
    gone = trio.Event()
    holders = Holders(int, gone.set)
    async with trio.open_nursery() as nursery:
        holders.add(process.pid, nursery)
        await trio.testing.wait_all_tasks_blocked()
        holders.forget_processes()
        assert holders.pids == ()
    assert not gone.is_set(), "it has not ended"
    process.communicate()


async def test_a_process_that_ends_as_the_point_does_is_told_once(process: subprocess.Popen[bytes]) -> None:
    gone: list[int] = []
    holders = Holders(int, lambda: gone.append(1))
    async with trio.open_nursery() as nursery:
        holders.add(process.pid, nursery)
        await trio.testing.wait_all_tasks_blocked()
        process.communicate()
        holders.forget_processes()  # with the news of its end on the way
    assert not gone


@pytest.mark.parametrize("pid", [0, -1])
async def test_a_process_of_another_namespace_does_not_count(pid: int) -> None:
    holders = Holders(int, int)
    async with trio.open_nursery() as nursery:
        holders.add(pid, nursery)
    assert holders.pids == ()


async def test_a_process_that_has_gone_does_not_count(process: subprocess.Popen[bytes]) -> None:
    process.communicate()
    holders = Holders(int, int)
    async with trio.open_nursery() as nursery:
        holders.add(process.pid, nursery)
    assert holders.pids == ()


def test_a_thread_is_of_its_process() -> None:
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(threading.get_native_id()))
    holding = threading.Event()
    other = threading.Thread(target=holding.wait)
    other.start()
    assert other.native_id is not None
    assert thread_group(other.native_id) == os.getpid() != other.native_id
    holding.set()
    other.join()
    thread.start()
    thread.join()
    assert thread_group(seen[0]) in (seen[0], os.getpid()), "gone, or the number given anew"
