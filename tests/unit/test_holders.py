# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import subprocess
import threading
from types import SimpleNamespace
from typing import Any

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


async def test_others_are_who_has_a_file_open_or_lives_on_but_not_one_s_own(
    process: subprocess.Popen[bytes], autojump_clock: object
) -> None:
    point: Any = SimpleNamespace(lost=None, over=False)
    holders = Holders(lambda: None, lambda: None)
    lease = holders.lease(point, os.getpid())
    async with trio.open_nursery() as nursery:
        holders.add(os.getpid(), nursery)
        assert await holders.others(point, os.getpid()) == ""
        # To its own child, this process is the script that has run it; but not while it has a file open.
        assert await holders.others(point, process.pid) == f"process {os.getpid()}"
        lease.release()
        assert await holders.others(point, process.pid) == ""
        holders.lease(SimpleNamespace(lost=None, over=False), 0)  # type: ignore[arg-type]  # of another point
        assert await holders.others(point, process.pid) == ""
        holders.add(process.pid, nursery)
        assert await holders.others(point, os.getpid()) == f"process {process.pid}"
        holders.forget_processes()
        nursery.cancel_scope.cancel()
    process.communicate()
    held = holders.lease(point, 0)
    assert await holders.others(point, os.getpid()) == "a process that is not known"
    held.release()


async def test_news_of_a_release_is_waited_for(autojump_clock: object) -> None:
    point: Any = SimpleNamespace(lost=None, over=False)
    holders = Holders(lambda: None, lambda: None)
    lease = holders.lease(point, 1)

    async def release() -> None:
        await trio.sleep(0.5)
        lease.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        assert await holders.others(point, os.getpid()) == ""


async def test_who_has_gone_has_no_parents() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert await Holders(lambda: None, lambda: None).others(SimpleNamespace(), gone.pid) == ""  # type: ignore[arg-type]
