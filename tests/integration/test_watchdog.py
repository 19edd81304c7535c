# SPDX-License-Identifier: GPL-3.0-or-later
"""The watchdog: whatever kills the mount, its job ends, the guest runs on, and nothing is unmounted."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import COMMAND, MIB, Mounted, Mounter, assert_nothing_left, wait_until, watchdogs


@pytest.fixture(scope="module")
def quiet_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest that outlives all of this; its disk has no file system."""
    with open_guest(lab, [Disk("vda", size=32 * MIB)]) as found:
        yield found


def job_xml(guest: Guest) -> str | None:
    try:
        return guest.libvirt.virsh("backup-dumpxml", guest.name)
    except RuntimeError:
        return None


def is_nothing_left(guest: Guest) -> bool:
    return job_xml(guest) is None and not list(guest.libvirt.folder.rglob("*backupfs-*"))


def kill(mounted: Mounted) -> float:
    """Kill the mount as the OOM killer would; say when."""
    mounted.process.kill()
    mounted.process.wait()
    return time.monotonic()


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def foreign_job(guest: Guest) -> Iterator[str]:
    """A backup job of another program's; it must live until the end."""
    theirs = str(guest.folder / "theirs.sock")
    xml = guest.folder / "backup.xml"
    xml.write_text(f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}'/></domainbackup>")
    guest.libvirt.virsh("backup-begin", guest.name, str(xml))
    yield theirs
    assert theirs in (job_xml(guest) or "")
    guest.libvirt.virsh("domjobabort", guest.name)


def assert_dead(path: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.listdir(path)
    assert caught.value.errno == errno.ENOTCONN


def test_killed_while_a_point_is_held_the_job_is_gone_within_five_seconds(quiet_guest: Guest, mount: Mounter) -> None:
    quiet_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8; sync")
    mounted = mount(quiet_guest)
    reader = os.open(mounted.image, os.O_RDONLY)
    assert len(os.pread(reader, MIB, 0)) == MIB
    assert len(watchdogs(mounted.path)) == 1
    killed = kill(mounted)
    wait_until(lambda: is_nothing_left(quiet_guest), 5)
    print(f"job gone {time.monotonic() - killed:.2f} s after kill -9")
    assert quiet_guest.state == "running"
    quiet_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8; sync")
    # Dead, and not unmounted.
    assert_dead(mounted.path)
    with pytest.raises(OSError) as caught:
        os.pread(reader, MIB, 4 * MIB)
    assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    with contextlib.suppress(OSError):  # ENOTCONN: nobody is left to be told
        os.close(reader)
    wait_until(lambda: not watchdogs(mounted.path), 5)
    assert "has gone without ending its backup job" in mounted.log
    subprocess.run(["fusermount3", "-u", mounted.path], check=True)
    again = mount(quiet_guest, path=mounted.path)
    assert "left over" not in again.log, "the watchdog had ended it"
    assert len(again.image.read_bytes()) == 32 * MIB
    again.unmount()


def test_killed_while_idle_the_watchdog_ends_too(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    assert len(watchdogs(mounted.path)) == 1
    kill(mounted)
    wait_until(lambda: not watchdogs(mounted.path), 5)
    assert_dead(mounted.path)
    assert "has gone" not in mounted.log, "there was nothing to do"


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.15])
def test_killed_while_a_point_begins(quiet_guest: Guest, mount: Mounter, delay: float) -> None:
    mounted = mount(quiet_guest)
    looker = subprocess.Popen(["ls", mounted.raw], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mounted.wait_log("a backup job begins, on", 10)
    time.sleep(delay)  # what is tried is that it is killed anywhere on the way
    kill(mounted)
    looker.wait(10)
    wait_until(lambda: not watchdogs(mounted.path), 10)
    # What libvirt would still begin, it has begun by now.
    assert job_xml(quiet_guest) is None
    assert_nothing_left(quiet_guest)
    assert quiet_guest.state == "running"


def test_mount_right_after_a_kill_waits_for_the_watchdog(quiet_guest: Guest, mount: Mounter) -> None:
    first = mount(quiet_guest)
    os.listdir(first.raw)
    (watchdog,) = watchdogs(first.path)
    with stopped(watchdog):
        kill(first)
        path = mount.mount_point()
        command = [COMMAND, "-f", "-o", f"uri={quiet_guest.libvirt.uri},timeout=1", quiet_guest.name, path]
        refused = subprocess.run(command, env=first.env, capture_output=True, text=True, check=False)
        assert refused.returncode == 6
        assert f"process {watchdog}" in refused.stderr
        assert job_xml(quiet_guest) is not None, "left to the one who holds the lock"
        env, uri = first.env, quiet_guest.libvirt.uri
        log = mount.folder / "second"
        with open(log, "wb") as file:
            second = subprocess.Popen([COMMAND, "-f", "-o", f"uri={uri}", quiet_guest.name, path], env=env, stderr=file)
        wait_until(lambda: "waiting for the watchdog" in log.read_text(), 20)
    wait_until(lambda: " mounted at " in log.read_text(), 20, log.read_text)
    assert "left over" not in log.read_text()
    assert "raw" in os.listdir(path)
    subprocess.run(["umount", path], check=True)
    assert second.wait(20) == 0
    assert_nothing_left(quiet_guest)


def test_killed_while_qemu_is_stopped_the_job_ends_when_it_goes_on(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    with stopped(quiet_guest.pid):
        kill(mounted)
        mounted.wait_log("has gone without ending its backup job")
    wait_until(lambda: not watchdogs(mounted.path), 20)
    assert_nothing_left(quiet_guest)
    assert quiet_guest.state == "running"


def test_unmounted_while_qemu_is_stopped_the_watchdog_stays_until_the_job_has_ended(
    quiet_guest: Guest, mount: Mounter
) -> None:
    mounted = mount(quiet_guest, "timeout=2")
    os.listdir(mounted.raw)
    with stopped(quiet_guest.pid):
        subprocess.run(["umount", mounted.path], check=True)
        assert mounted.process.wait(60) == 0
        assert len(watchdogs(mounted.path)) == 1
        mounted.wait_log("stays until the job has ended")
    wait_until(lambda: not watchdogs(mounted.path), 20)
    assert_nothing_left(quiet_guest)


def test_libvirtd_killed_and_started_again_then_the_mount_killed(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    quiet_guest.libvirt.kill()
    quiet_guest.libvirt.start()
    mounted.wait_log("connected to libvirt")
    kill(mounted)
    wait_until(lambda: is_nothing_left(quiet_guest), 10)
    wait_until(lambda: not watchdogs(mounted.path), 5)


def test_mount_killed_while_libvirtd_is_away(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    quiet_guest.libvirt.kill()
    try:
        kill(mounted)
        mounted.wait_log("has gone without ending its backup job")
    finally:
        quiet_guest.libvirt.start()
    wait_until(lambda: is_nothing_left(quiet_guest), 15)
    wait_until(lambda: not watchdogs(mounted.path), 5)


def test_a_killed_watchdog_is_replaced_and_the_new_one_knows_the_job(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    (old,) = watchdogs(mounted.path)
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: watchdogs(mounted.path) not in ([], [old]), 10)
    mounted.wait_log("was ended by signal 9")
    mounted.wait_log("a watchdog is there again")
    assert mounted.status()["state"] == "running", "the point lives on"
    kill(mounted)
    wait_until(lambda: is_nothing_left(quiet_guest), 5)


def test_no_point_begins_while_the_watchdog_does_not_answer(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest, "timeout=1")
    (watchdog,) = watchdogs(mounted.path)
    with stopped(watchdog):
        with pytest.raises(OSError) as caught:
            os.listdir(mounted.raw)
        assert caught.value.errno == errno.EIO
        wait_until(lambda: "no backup begins without a watchdog" in mounted.log, 5)
        assert_nothing_left(quiet_guest)
    wait_until(lambda: _lists(mounted.raw), 10)
    mounted.unmount()


def _lists(path: Path) -> bool:
    try:
        return bool(os.listdir(path))
    except OSError:
        return False


def test_watchdog_and_mount_both_killed_the_next_mount_ends_the_job(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    with stopped(mounted.process.pid):  # so that it starts no other
        for pid in watchdogs(mounted.path):
            os.kill(pid, signal.SIGKILL)
        kill(mounted)
    assert job_xml(quiet_guest) is not None
    subprocess.run(["umount", mounted.path], check=True)
    second = mount(quiet_guest)
    assert "left over" in second.log
    second.unmount()


def test_a_foreign_job_that_began_after_ours_ended_is_left_alone(quiet_guest: Guest, mount: Mounter) -> None:
    mounted = mount(quiet_guest)
    os.listdir(mounted.raw)
    with stopped(mounted.process.pid):
        quiet_guest.libvirt.virsh("domjobabort", quiet_guest.name)
        wait_until(lambda: job_xml(quiet_guest) is None, 5)
        with foreign_job(quiet_guest):
            kill(mounted)
            wait_until(lambda: not watchdogs(mounted.path), 10)
    subprocess.run(["umount", mounted.path], check=True)
    mount(quiet_guest).unmount()


@pytest.mark.parametrize("way", ["umount", "SIGTERM", "SIGTERM to all"])
def test_the_watchdog_ends_with_the_mount(quiet_guest: Guest, mount: Mounter, way: str) -> None:
    mounted = mount(quiet_guest, "idle=1")
    subprocess.run(["cat", mounted.raw / "domain.xml"], check=True, capture_output=True)
    pids = [mounted.process.pid, *watchdogs(mounted.path)]
    if way == "umount":
        subprocess.run(["umount", mounted.path], check=True)
    else:  # to all: as systemd does to a unit's whole group
        for pid in pids[: 1 if way == "SIGTERM" else 2]:
            os.kill(pid, signal.SIGTERM)
    assert mounted.process.wait(20) == 0
    assert watchdogs(mounted.path) == [], "before the mount's own process has ended"
    assert "watchdog (process" not in mounted.log
    assert_nothing_left(quiet_guest)


def test_in_the_background_too_and_it_is_small(quiet_guest: Guest, mount: Mounter) -> None:
    path, env = mount.mount_point(), mount.env(quiet_guest.libvirt)
    subprocess.run([COMMAND, "-o", f"uri={quiet_guest.libvirt.uri}", quiet_guest.name, path], env=env, check=True)
    try:
        os.listdir(path / "raw")
        (watchdog,) = watchdogs(path)
        figures = dict(line.split(":", 1) for line in Path(f"/proc/{watchdog}/status").read_text().splitlines())
        anonymous = int(figures["RssAnon"].split()[0])
        print(f"watchdog: VmRSS {figures['VmRSS'].strip()}, of it its own {anonymous} kB")
        assert anonymous < 48 * 1024
        assert os.getsid(watchdog) == watchdog
        assert os.readlink(f"/proc/{watchdog}/cwd") == "/"
        for descriptor in (0, 1, 2):
            assert os.readlink(f"/proc/{watchdog}/fd/{descriptor}") == "/dev/null"
        mount_pid = int(figures["PPid"])
        os.kill(mount_pid, signal.SIGKILL)
        wait_until(lambda: is_nothing_left(quiet_guest), 5)
        wait_until(lambda: not watchdogs(path), 5)
        assert_dead(path)
    finally:
        subprocess.run(["umount", path], check=True)
