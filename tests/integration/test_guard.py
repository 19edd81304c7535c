# SPDX-License-Identifier: GPL-3.0-or-later
"""The scratch guard: where room for old blocks runs short the backup dies, not the guest."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounted, Mounter, assert_nothing_left, wait_until, watchdogs
from .test_watchdog import is_nothing_left, stopped

FULL_SPEED = "while :; do dd if=/dev/zero of=/mnt/big bs=1M count=160 conv=notrunc,fsync 2>/dev/null; done"


@pytest.fixture(scope="module")
def scratches() -> Iterator[Path]:
    """Small file systems for scratch files: SIZE in MiB after the kind, `ext4-32`; made before the guest starts."""
    folder = Path(tempfile.mkdtemp(prefix="backupfs-scratch-", dir="/tmp"))
    folder.chmod(0o755)
    made = []
    try:
        for kind, size in (("tmpfs", 8), ("tmpfs", 64), ("ext4", 16), ("ext4", 32)):
            path = folder / f"{kind}-{size}"
            path.mkdir()
            if kind == "tmpfs":
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "none", path], check=True)
            else:
                image = folder / f"{path.name}.img"
                with open(image, "wb") as file:
                    file.truncate(size * MIB)
                subprocess.run(["mke2fs", "-q", "-t", "ext4", image], check=True)
                subprocess.run(["mount", "-o", "loop", image, path], check=True)
            made.append(path)
            shutil.chown(path, "nobody", "nogroup")
        yield folder
    finally:
        for path in made:
            subprocess.run(["umount", "-l", path], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def busy_guest(lab: Libvirt, scratches: Path) -> Iterator[Guest]:
    """A guest with a file of 160 MiB on its ext4, to be written over and over; at the end it must be clean."""
    with open_guest(lab, [Disk("vda", ext4=True, size=320 * MIB)]) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt && dd if=/dev/urandom of=/mnt/big bs=1M count=160 conv=fsync")
        yield guest
        guest.run("umount /mnt && sync")
        guest.libvirt.virsh("suspend", guest.name)  # a test has restarted libvirtd under the guest's own connection
        disk = guest.copy_disk("vda", scratches / "disk.raw")
        checked = subprocess.run(["e2fsck", "-fn", disk], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


def stop_writing(guest: Guest) -> None:
    guest.run("kill $(cat /tmp/writer); killall dd; sync")


@contextlib.contextmanager
def writing(guest: Guest) -> Iterator[None]:
    """The guest writes as fast as it can."""
    guest.run(f"({FULL_SPEED}) & echo $! > /tmp/writer")
    try:
        yield
    finally:
        stop_writing(guest)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Others fill a file system up."""
    filler = folder / "filler"
    subprocess.run(["dd", "if=/dev/zero", f"of={filler}", "bs=1M", "status=none"], check=False, capture_output=True)
    try:
        yield
    finally:
        filler.unlink()


@dataclass(eq=False)
class Pauses:
    """When the guest was paused, and for how long, from libvirt's events."""

    log: Path
    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)

    def take(self) -> list[float]:
        """Return how long each pause lasted; infinite if it still does."""
        lasted, since = [], None
        for line in self.log.read_text().splitlines():
            match = re.match(r"(\S+ \S+): event 'lifecycle' for domain \S+: (\w+)", line)
            if match is None:
                continue
            when = datetime.fromisoformat(match[1]).timestamp()
            if match[2] == "Suspended":
                since = when
            elif match[2] == "Resumed" and since is not None:
                lasted.append(when - since)
                since = None
        return lasted if since is None else [*lasted, float("inf")]


@pytest.fixture
def pauses(busy_guest: Guest, tmp_path: Path) -> Iterator[Pauses]:
    log = tmp_path / "events"
    with open(log, "ab") as file:  # appended to, for it is emptied meanwhile
        words = ["stdbuf", "-oL", "virsh", "-c", busy_guest.libvirt.uri, "event", busy_guest.name]
        process = subprocess.Popen([*words, "--event", "lifecycle", "--loop", "--timestamp"], stdout=file)
    try:
        # It says nothing when it listens: a pause of our own shows that it does.
        def heard() -> bool:
            busy_guest.libvirt.virsh("suspend", busy_guest.name)
            busy_guest.libvirt.virsh("resume", busy_guest.name)
            return "Resumed" in log.read_text()

        wait_until(heard, 20)
        log.write_text("")
        yield Pauses(log, process)
    finally:
        process.terminate()
        process.wait()


def is_lost(mounted: Mounted, times: int) -> bool:
    return mounted.log.count("is lost") == times


def assert_eio(descriptor: int) -> None:
    with pytest.raises(OSError) as caught:
        os.pread(descriptor, MIB, 40 * MIB)
    assert caught.value.errno == errno.EIO
    os.close(descriptor)


@pytest.mark.parametrize("where", ["tmpfs-8", "ext4-16", "ext4-32", "tmpfs-64"])
def test_guest_that_writes_as_fast_as_it_can_never_stops_for_a_second(
    busy_guest: Guest, scratches: Path, mount: Mounter, pauses: Pauses, where: str, guard_runs: int
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / where}")
    for run in range(1, guard_runs + 1):
        descriptor = os.open(mounted.image, os.O_RDONLY)
        with writing(busy_guest):
            wait_until(functools.partial(is_lost, mounted, run), 30)
            assert_eio(descriptor)
            wait_until(lambda: is_nothing_left(busy_guest), 10)
            wait_until(lambda: busy_guest.state == "running", 1)
        mounted.release()
        assert "where QEMU saves old blocks" in mounted.status()["why"]["point"]
    lasted = pauses.take()
    print(f"{where}: {guard_runs} runs, {len(lasted)} pauses" + "".join(f", {1000 * each:.0f} ms" for each in lasted))
    assert all(each < 1 for each in lasted)
    mounted.unmount()


def test_a_point_that_cannot_even_begin_before_the_scratch_is_full(
    busy_guest: Guest, scratches: Path, mount: Mounter, pauses: Pauses
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-8'}")
    with writing(busy_guest):
        with pytest.raises(OSError) as caught:
            mounted.image.read_bytes()
        assert caught.value.errno == errno.EIO
        wait_until(lambda: is_nothing_left(busy_guest), 10)
        wait_until(lambda: busy_guest.state == "running", 1)
    assert "where QEMU saves old blocks" in mounted.status()["why"]["point"]
    assert all(each < 1 for each in pauses.take())
    mounted.unmount()


def test_stopped_mount_is_guarded_all_the_same(
    busy_guest: Guest, scratches: Path, mount: Mounter, pauses: Pauses
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'ext4-32'}")
    os.stat(mounted.image)  # nothing may be open: a child of ours would close it, and wait for the mount
    with stopped(mounted.process.pid):
        with writing(busy_guest):
            wait_until(lambda: is_nothing_left(busy_guest), 30)
        wait_until(lambda: busy_guest.state == "running", 1)
    assert all(each < 1 for each in pauses.take())
    mounted.wait_log("where QEMU saves old blocks")
    with pytest.raises(OSError) as caught:
        mounted.image.read_bytes()
    assert caught.value.errno == errno.EIO
    mounted.unmount()
    assert "from outside" not in mounted.log


def write_until_paused(guest: Guest) -> None:
    """Let the scratch space fill up while nobody looks, until QEMU has paused the guest."""
    guest.run(f"(sleep 1; {FULL_SPEED}) & echo $! > /tmp/writer")  # later, for a paused guest gives no answer
    guest.wait_state("paused", 30)


@pytest.mark.parametrize("reserve", ["50%", "0"])
def test_guest_that_was_paused_all_the_same_is_resumed_at_once(
    busy_guest: Guest, scratches: Path, mount: Mounter, reserve: str
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-8'},scratch-reserve={reserve}")
    os.stat(mounted.image)
    (watchdog,) = watchdogs(mounted.path)
    with stopped(watchdog):
        write_until_paused(busy_guest)
    begun = time.monotonic()
    busy_guest.wait_state("running", 5)
    print(f"running {1000 * (time.monotonic() - begun):.0f} ms after the watchdog could look")
    assert time.monotonic() - begun < 1
    stop_writing(busy_guest)
    mounted.wait_log("the guest was paused for want of scratch space, and was resumed")
    mounted.wait_log("is lost")
    mounted.unmount()


def test_guest_that_is_paused_when_the_mount_is_killed_is_resumed(
    busy_guest: Guest, scratches: Path, mount: Mounter
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-8'},scratch-reserve=0")
    os.stat(mounted.image)
    (watchdog,) = watchdogs(mounted.path)
    with stopped(watchdog):
        write_until_paused(busy_guest)
        mounted.process.kill()
        mounted.process.wait()
    busy_guest.wait_state("running", 5)
    stop_writing(busy_guest)
    wait_until(lambda: not watchdogs(mounted.path), 10)
    assert_nothing_left(busy_guest)


def test_a_new_watchdog_resumes_the_guest_that_it_finds_paused(
    busy_guest: Guest, scratches: Path, mount: Mounter
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-8'}")
    os.stat(mounted.image)
    (watchdog,) = watchdogs(mounted.path)
    with stopped(watchdog):
        write_until_paused(busy_guest)
        os.kill(watchdog, signal.SIGKILL)
    busy_guest.wait_state("running", 10)
    stop_writing(busy_guest)
    mounted.wait_log("was resumed")
    mounted.unmount()


def test_killed_mount_and_scratch_that_fills_leave_a_running_guest(
    busy_guest: Guest, scratches: Path, mount: Mounter, pauses: Pauses
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-8'}")
    os.stat(mounted.image)
    with writing(busy_guest):
        mounted.process.kill()
        mounted.process.wait()
        wait_until(lambda: is_nothing_left(busy_guest), 5)
        wait_until(lambda: not watchdogs(mounted.path), 5)
    assert busy_guest.state == "running"
    assert all(each < 1 for each in pauses.take())


def test_guest_that_a_person_suspended_stays_suspended(busy_guest: Guest, scratches: Path, mount: Mounter) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'ext4-32'}")
    descriptor = os.open(mounted.image, os.O_RDONLY)
    busy_guest.libvirt.virsh("suspend", busy_guest.name)
    # Others fill the file system: the guard ends the job, and has no business with the guest.
    try:
        with filled(scratches / "ext4-32"):
            mounted.wait_log("is lost")
            wait_until(lambda: is_nothing_left(busy_guest), 10)
            until = time.monotonic() + 3  # longer than the guard looks after the guest
            while time.monotonic() < until:
                assert busy_guest.state == "paused"
    finally:
        busy_guest.libvirt.virsh("resume", busy_guest.name)
    assert_eio(descriptor)
    assert "resumed" not in mounted.log
    mounted.unmount()


def test_guest_whose_own_disk_is_full_stays_paused_and_keeps_its_backup(
    lab: Libvirt, scratches: Path, mount: Mounter
) -> None:
    # Its image lies on a file system too small for it; the scratch has room.
    image = scratches / "tmpfs-64/full.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "200M"], check=True)
    shutil.chown(image, "nobody", "nogroup")
    with open_guest(lab, [Disk("vda", path=image)]) as guest:
        mounted = mount(guest, f"scratch={guest.folder}")
        descriptor = os.open(mounted.image, os.O_RDONLY)
        guest.run("(dd if=/dev/urandom of=/dev/vda bs=1M) > /dev/null 2>&1 &")
        guest.wait_state("paused", 60)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            assert guest.state == "paused"
        assert mounted.status()["state"] == "running"
        assert len(os.pread(descriptor, MIB, 0)) == MIB
        os.close(descriptor)
        mounted.unmount()
        # Nor when the scratch space runs short later: that is not why it waits.
        again = mount(guest, f"scratch={scratches / 'ext4-16'}")
        os.stat(again.image)
        with filled(scratches / "ext4-16"):
            again.wait_log("is lost")
            wait_until(lambda: is_nothing_left(guest), 10)
            until = time.monotonic() + 3
            while time.monotonic() < until:
                assert guest.state == "paused"
        again.unmount()
        assert guest.state == "paused"
    image.unlink()


@pytest.mark.parametrize("moment", ["held", "restarting"])
def test_libvirtd_away_while_the_scratch_fills(busy_guest: Guest, scratches: Path, mount: Mounter, moment: str) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'tmpfs-64'}")
    descriptor = os.open(mounted.image, os.O_RDONLY)
    busy_guest.libvirt.kill()
    try:
        busy_guest.run(f"(sleep 1; {FULL_SPEED}) & echo $! > /tmp/writer")
        if moment == "held":  # until QEMU has paused the guest
            folder = scratches / "tmpfs-64"
            wait_until(lambda: os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < MIB, 30)
    finally:
        busy_guest.libvirt.start()
    mounted.wait_log("is lost")
    wait_until(lambda: is_nothing_left(busy_guest), 20)
    wait_until(lambda: busy_guest.state == "running", 5)
    stop_writing(busy_guest)
    assert_eio(descriptor)
    mounted.unmount()


def test_no_point_begins_where_there_is_less_room_than_the_reserve(
    busy_guest: Guest, scratches: Path, mount: Mounter
) -> None:
    mounted = mount(busy_guest, f"scratch={scratches / 'ext4-16'},scratch-reserve=1G")
    with pytest.raises(OSError) as caught:
        os.listdir(mounted.raw)
    assert caught.value.errno == errno.ENOSPC
    assert "(ext4), where QEMU would save old blocks, has" in mounted.log
    assert "reserve of 1024.0 MiB" in mounted.log
    assert "scratch-reserve=" in mounted.status()["why"]["point"]
    mounted.unmount()
    assert_nothing_left(busy_guest)


def test_no_point_begins_where_the_folder_is_missing_or_closed_to_qemu(
    busy_guest: Guest, scratches: Path, mount: Mounter
) -> None:
    closed = scratches / "closed"
    closed.mkdir(mode=0o700)
    for folder, reason in ((scratches / "gone", "no such file or directory"), (closed, "may not write there")):
        mounted = mount(busy_guest, f"scratch={folder}")
        with pytest.raises(OSError) as caught:
            os.listdir(mounted.raw)
        assert caught.value.errno == errno.EIO
        assert reason in mounted.log
        mounted.unmount()
    shutil.chown(closed, "nobody", "nogroup")
    mounted = mount(busy_guest, f"scratch={closed}")
    assert "vda.raw" in os.listdir(mounted.raw)
    mounted.unmount()
