# SPDX-License-Identifier: GPL-3.0-or-later
"""The guest's file systems frozen while a point begins, by the real guest agent; and thawed, whatever happens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest
from lab.guest import CommandFailed

from .conftest import MIB, Mounted, Mounter, wait_until, watchdogs
from .test_failures import assert_errno


@pytest.fixture(scope="module")
def shared_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest with two mounted file systems and a channel for the agent, which each test starts."""
    disks = [Disk("vda", ext4=True, size=64 * MIB), Disk("vdb", ext4=True, size=32 * MIB)]
    with open_guest(lab, disks, agent=True) as found:
        found.run("mkdir /mnt2; mount -t ext4 /dev/vda /mnt && mount -t ext4 /dev/vdb /mnt2")
        yield found


@pytest.fixture
def agent_guest(shared_guest: Guest) -> Iterator[Guest]:
    """That guest with its agent running; afterwards it must be able to write."""
    shared_guest.start_agent()
    yield shared_guest
    assert_writes(shared_guest)
    with contextlib.suppress(CommandFailed):  # where a test has ended it already
        shared_guest.kill_agent()
    shared_guest.wait_agent("disconnected")


def assert_writes(guest: Guest) -> None:
    """The guest is not frozen: it can write, and write through, to all its disks."""
    guest.run("for d in /mnt /mnt2; do date > $d/probe && sync $d/probe; done", timeout=20)


def is_frozen(guest: Guest) -> bool:
    return guest.run("test -e /run/qga.state.isfrozen && echo yes || echo no") == "yes"


def xattr(path: Path, name: str) -> str | None:
    word = f"user.backupfs.{name}"
    return os.getxattr(path, word).decode() if word in os.listxattr(path) else None


def begin(mounted: Mounted) -> None:
    assert "vda.raw" in os.listdir(mounted.raw)


def needs_recovery(image: Path) -> bool:
    done = subprocess.run(["dumpe2fs", "-h", image], check=True, capture_output=True, text=True)
    return "needs_recovery" in done.stdout


def test_a_copy_of_the_frozen_guest_needs_no_replay(agent_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(agent_guest)
    agent_guest.start_writer()
    try:
        agent_guest.run("until [ -e /mnt/last ]; do usleep 10000; done")
        for number in range(2):
            begin(mounted)
            for target in ("vda", "vdb"):
                copy = tmp_path / f"{target}{number}"
                subprocess.run(["cp", "--sparse=always", mounted.raw / f"{target}.raw", copy], check=True)
                assert not needs_recovery(copy)
                done = subprocess.run(["e2fsck", "-fn", copy], capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout
            status = mounted.status()
            assert status["quiesced"] is True
            assert status["frozen_filesystems"] == 2
            assert 0 < status["frozen_ms"] < 10000
            assert xattr(mounted.image, "quiesced") == "yes"
            assert xattr(mounted.image, "frozen") == f"{status['frozen_ms']:.0f}"
            assert "2 file systems frozen for " in mounted.log
            assert "backupfs_quiesced{" in (mounted.path / ".backupfs/metrics.prom").read_text()
            assert f"frozen for {status['frozen_ms']:.0f} ms" in mounted.command("status").stdout
            mounted.release()
        # And without, it does: else the test above would say nothing.
        other = mount.mount_point()
        mounted.unmount()
        without = mount(agent_guest, "quiesce=no", path=other)
        begin(without)
        subprocess.run(["cp", "--sparse=always", without.image, tmp_path / "unfrozen"], check=True)
        assert needs_recovery(tmp_path / "unfrozen")
        assert xattr(without.image, "quiesced") == "no"
        assert xattr(without.image, "frozen") is None
        assert without.status()["quiesced"] is False
        assert "quiesce" not in without.status()["why"]
        without.unmount()
    finally:
        agent_guest.stop_writer()


def test_only_the_listed_mount_points_are_frozen(agent_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(agent_guest, "quiesce=/mnt2/")
    begin(mounted)
    assert mounted.status()["frozen_filesystems"] == 1
    assert xattr(mounted.image, "quiesced") == "yes"
    copies = {target: tmp_path / target for target in ("vda", "vdb")}
    for target, copy in copies.items():
        subprocess.run(["cp", mounted.raw / f"{target}.raw", copy], check=True)
    assert needs_recovery(copies["vda"])
    assert not needs_recovery(copies["vdb"])
    mounted.unmount()
    both = mount(agent_guest, "quiesce=/mnt:/mnt2")
    begin(both)
    assert both.status()["frozen_filesystems"] == 2
    both.unmount()
    wrong = mount(agent_guest, "quiesce=/mnt:/nowhere")
    assert_errno(errno.EIO, lambda: os.listdir(wrong.raw))
    assert "nothing is mounted at /nowhere in the guest" in wrong.log
    assert "nothing is mounted at /nowhere" in wrong.status()["why"]["point"]
    wrong.unmount()


def assert_auto_goes_on_and_require_does_not(guest: Guest, mount: Mounter, reason: str, warns: bool) -> None:
    mounted = mount(guest)
    for _ in range(2):
        begin(mounted)
        status = mounted.status()
        assert status["quiesced"] is False
        assert status["frozen_ms"] is None
        assert reason in status["why"]["quiesce"]
        assert xattr(mounted.image, "quiesced") == "no"
        assert xattr(mounted.image, "frozen") is None
        mounted.release()
    assert f"not frozen: {reason}" in mounted.log
    assert mounted.log.count("may need its journals replayed") == int(warns), "a cause is told once"
    mounted.unmount()
    strict = mount(guest, "quiesce=require")
    assert_errno(errno.EIO, lambda: os.listdir(strict.raw), within=15)
    assert f"no freeze, which quiesce= requires: {reason}" in strict.log
    assert reason in strict.status()["why"]["point"]
    strict.unmount()


def test_without_a_channel_for_the_agent(own_guest: Guest, mount: Mounter) -> None:
    assert_auto_goes_on_and_require_does_not(
        own_guest, mount, "argument unsupported: QEMU guest agent is not configured", warns=False
    )


def test_an_agent_that_does_not_run(agent_guest: Guest, mount: Mounter) -> None:
    agent_guest.kill_agent()
    agent_guest.wait_agent("disconnected")
    assert_auto_goes_on_and_require_does_not(
        agent_guest, mount, "Guest agent is not responding: QEMU guest agent is not connected", warns=True
    )


def test_an_agent_that_hangs(agent_guest: Guest, mount: Mounter) -> None:
    agent_guest.signal_agent("STOP")
    try:
        assert_auto_goes_on_and_require_does_not(agent_guest, mount, "Guest agent is not responding", warns=True)
    finally:
        agent_guest.signal_agent("CONT")


def test_a_paused_guest_has_nothing_to_freeze(agent_guest: Guest, mount: Mounter) -> None:
    agent_guest.pause()
    try:
        assert_auto_goes_on_and_require_does_not(agent_guest, mount, "the guest is paused", warns=False)
    finally:
        agent_guest.resume()


def test_somebody_elses_freeze_is_not_thawed(agent_guest: Guest, mount: Mounter) -> None:
    agent_guest.libvirt.virsh("domfsfreeze", agent_guest.name)
    try:
        assert_auto_goes_on_and_require_does_not(agent_guest, mount, "somebody else has frozen the guest", warns=True)
        assert is_frozen(agent_guest)
    finally:
        agent_guest.libvirt.virsh("domfsthaw", agent_guest.name)
    # Nor is the time-out of ours left behind: it would cut somebody else's long command off.
    status = agent_guest.libvirt.folder / f"run/libvirt/qemu/run/{agent_guest.name}.xml"
    assert "<agentTimeout>-1</agentTimeout>" in status.read_text()


def test_a_begin_that_fails_is_followed_by_the_thaw(agent_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    # Room enough, but no file can be made there: only libvirt's own attempt shows it.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=0777,nr_inodes=1", "none", tmp_path], check=True)
    try:
        mounted = mount(agent_guest, f"scratch={tmp_path}")
        assert_errno(errno.EIO, lambda: os.listdir(mounted.raw))
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "cannot begin the backup job" in mounted.log
    assert not is_frozen(agent_guest)
    assert_writes(agent_guest)
    mounted.unmount()


@pytest.fixture
def slow_scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder for scratch files on a file system of its own; frozen, whoever makes a file there waits."""
    image, folder = tmp_path / "scratch.img", Path(f"/tmp/backupfs-scratch-{os.getpid()}")
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    folder.mkdir()
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        subprocess.run(["fsfreeze", "-u", folder], check=False, capture_output=True)
        subprocess.run(["umount", "-l", folder], check=True)
        folder.rmdir()


def is_stuck(guest: Guest) -> bool:
    """Whether libvirtd or QEMU waits for a disk of the host, and will go on waiting: then the begin is under way."""

    def waiting() -> set[Path]:
        tasks = {*Path(f"/proc/{guest.libvirt.pid}/task").iterdir(), *Path(f"/proc/{guest.pid}/task").iterdir()}
        return {task for task in tasks if (task / "stat").read_text().rpartition(")")[2].split()[0] == "D"}

    still = waiting()
    for _ in range(5):
        time.sleep(0.05)  # no event tells that something does not happen
        still &= waiting()
    return bool(still)


@contextlib.contextmanager
def stuck_begin(guest: Guest, mounted: Mounted, scratch: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A point's begin that stays between freeze and thaw until this ends; gives the one who looks."""
    subprocess.run(["fsfreeze", "-f", scratch], check=True)
    looker = subprocess.Popen(["ls", mounted.raw], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: is_frozen(guest) and is_stuck(guest))
        yield looker
    finally:
        subprocess.run(["fsfreeze", "-u", scratch], check=True)


def job_runs(guest: Guest) -> bool:
    try:
        return "backupfs-" in guest.libvirt.virsh("backup-dumpxml", guest.name)
    except RuntimeError:
        return False


def record(mount: Mounter) -> dict[str, object]:
    text = next((mount.folder / "state").glob("*/*/job")).read_bytes().partition(b" ")[2]
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def test_a_guest_frozen_by_a_killed_backupfs_is_thawed_by_its_watchdog(
    agent_guest: Guest, mount: Mounter, slow_scratch: Path
) -> None:
    first = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, first, slow_scratch) as looker:
        assert record(mount)["frozen"] is True
        first.process.kill()
        first.process.wait()
        looker.communicate(timeout=10)
        # Libvirtd itself waits for the disk, with the domain locked: nobody can thaw before that ends.
    wait_until(lambda: not is_frozen(agent_guest), 15, lambda: first.log)
    assert_writes(agent_guest)
    assert "thawed the file systems that were left frozen" in first.log
    wait_until(lambda: not watchdogs(first.path), 20, lambda: first.log)
    assert not job_runs(agent_guest)
    subprocess.run(["umount", first.path], check=True)
    second = mount(agent_guest)
    begin(second)
    assert second.status()["quiesced"] is True
    assert record(mount)["frozen"] is False
    second.unmount()


def test_a_guest_left_frozen_is_thawed_by_the_next_mount(
    agent_guest: Guest, mount: Mounter, slow_scratch: Path
) -> None:
    first = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, first, slow_scratch) as looker:
        first.process.send_signal(signal.SIGSTOP)  # it shall start no other
        for pid in watchdogs(first.path):
            os.kill(pid, signal.SIGKILL)
        first.process.kill()
        first.process.wait()
        looker.communicate(timeout=10)
    assert is_frozen(agent_guest), "nobody is left to thaw it"
    subprocess.run(["umount", first.path], check=True)
    second = mount(agent_guest)
    assert "thawed the file systems that were left frozen" in second.log
    assert not is_frozen(agent_guest)
    assert_writes(agent_guest)
    second.unmount()


def test_a_slow_begin_is_told_in_the_frozen_time(agent_guest: Guest, mount: Mounter, slow_scratch: Path) -> None:
    mounted = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, mounted, slow_scratch) as looker:
        until = time.monotonic() + 1.0
        wait_until(lambda: time.monotonic() > until)
    assert looker.communicate(timeout=30)[0].split() == [b"domain.xml", b"vda.raw", b"vdb.raw"]
    assert mounted.status()["frozen_ms"] >= 1000
    mounted.unmount()


def test_sigterm_while_frozen_thaws(agent_guest: Guest, mount: Mounter, slow_scratch: Path) -> None:
    mounted = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, mounted, slow_scratch) as looker:
        mounted.process.send_signal(signal.SIGTERM)
    looker.communicate(timeout=30)
    mounted.process.wait(30)
    assert not is_frozen(agent_guest)
    assert_writes(agent_guest)


def assert_serves_again(guest: Guest, mounted: Mounted, within: float = 60) -> None:
    """The guest writes, and the next point is quiesced."""
    wait_until(lambda: not is_frozen(guest), within, lambda: mounted.log)
    assert_writes(guest)
    mounted.release()
    begin(mounted)
    assert mounted.status()["quiesced"] is True
    mounted.unmount()


def test_an_agent_that_hangs_while_frozen_thaws_when_it_goes_on(
    agent_guest: Guest, mount: Mounter, slow_scratch: Path
) -> None:
    mounted = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, mounted, slow_scratch) as looker:
        agent_guest.signal_agent("STOP")
    wait_until(lambda: job_runs(agent_guest))
    assert is_frozen(agent_guest), "nobody was there to thaw"
    agent_guest.signal_agent("CONT")
    assert b"vda.raw" in looker.communicate(timeout=60)[0]
    assert mounted.status()["quiesced"] is True
    assert_serves_again(agent_guest, mounted)


def test_an_agent_that_dies_while_frozen_is_an_error_and_its_restart_after_the_job_thaws(
    agent_guest: Guest, mount: Mounter, slow_scratch: Path
) -> None:
    mounted = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, mounted, slow_scratch) as looker:
        agent_guest.kill_agent()
    wait_until(lambda: job_runs(agent_guest))
    agent_guest.run_agent()  # as systemd does in a guest of one's own; libvirt 9.0 takes no notice
    wait_until(lambda: "ERROR" in mounted.log, 30, lambda: mounted.log)
    assert f"until `virsh domfsthaw {agent_guest.name}` works" in mounted.log
    looker.communicate(timeout=100)  # twice 30 s: the kernel asks again
    # Libvirt lets the agent's going and its coming wait 30 s each, and the job's end behind them.
    wait_until(lambda: not job_runs(agent_guest), 90, lambda: mounted.log)
    assert is_frozen(agent_guest)
    # An administrator restarts it, as the message says.
    agent_guest.kill_agent()
    agent_guest.start_agent()
    assert_serves_again(agent_guest, mounted)
    assert "thawed the file systems" in mounted.log


def test_an_agent_that_dies_for_good_while_frozen_is_remembered_until_it_thaws(
    agent_guest: Guest, mount: Mounter, slow_scratch: Path
) -> None:
    mounted = mount(agent_guest, f"scratch={slow_scratch}")
    with stuck_begin(agent_guest, mounted, slow_scratch) as looker:
        agent_guest.kill_agent()
    looker.communicate(timeout=100)  # twice 30 s: the kernel asks again
    wait_until(lambda: mounted.status()["state"] == "idle", 180, lambda: mounted.log)
    assert mounted.log.count("may still be frozen") == 3, "at once, at the end, and why there is no point"
    assert not job_runs(agent_guest)
    assert record(mount)["frozen"] is True
    # No point begins over it.
    assert_errno(errno.EIO, lambda: os.listdir(mounted.raw), within=35)
    assert "may still be frozen" in mounted.status()["why"]["point"]
    # Libvirt has not seen it go, so it does not see it come.
    agent_guest.start_agent()
    agent_guest.kill_agent()
    agent_guest.wait_agent("disconnected")
    agent_guest.start_agent()
    assert is_frozen(agent_guest)
    begin(mounted)
    assert_serves_again(agent_guest, mounted)
