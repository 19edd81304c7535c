# SPDX-License-Identifier: GPL-3.0-or-later
"""What breaks: each failure gives the right errno in seconds, a line in the log, and a new point later."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lab import Guest, Libvirt

from ..faults import Fault
from .conftest import COMMAND, MIB, Mounted, Mounter, assert_nothing_left, wait_until

SYS_PIDFD_GETFD = 438

Faults = Callable[..., Fault]


def read_all(path: Path) -> bytes:
    """Read past the page cache."""
    return subprocess.run(["dd", f"if={path}", "bs=1M", "iflag=direct", "status=none"], check=True,
                          capture_output=True).stdout  # fmt: skip


def assert_errno(number: int, action: Callable[[], object], within: float = 10.0) -> None:
    begun = time.monotonic()
    with pytest.raises(OSError) as caught:
        action()
    assert caught.value.errno == number
    assert time.monotonic() - begun < within


@pytest.mark.parametrize("way", ["destroy", "kill", "poweroff"])
def test_guest_that_stops_loses_the_point_and_a_new_one_can_begin(
    own_guest: Guest, mount: Mounter, fault: Faults, way: str
) -> None:
    tried = fault(
        {
            "destroy": "`virsh destroy`",
            "kill": "QEMU is killed with SIGKILL",
            "poweroff": "the guest powers itself off",
        }[way]
    )
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8; sync")
    mounted = mount(own_guest)
    descriptor = os.open(mounted.image, os.O_RDONLY)
    assert len(os.pread(descriptor, MIB, 0)) == MIB
    match way:
        case "destroy":
            own_guest.destroy()
        case "kill":
            own_guest.signal(signal.SIGKILL)
        case "poweroff":
            own_guest.run("(sleep 0.2; poweroff -f) & true")
    tried.log(mounted, "is lost", cut=way != "poweroff")
    if way == "poweroff":
        assert "shut down by its guest" in mounted.log
    else:
        assert "by its guest" not in mounted.log
    tried.fails(errno.EIO, lambda: os.pread(descriptor, MIB, 5 * MIB))
    tried.fails(errno.EIO, lambda: os.listdir(mounted.raw))
    os.close(descriptor)
    # Libvirt 9.0 takes 30 s and more over a guest that powers off during a backup: its one thread
    # waits for the job to handle the closing of a virtio port, with QEMU's end behind it in the queue.
    own_guest.wait_state("shut off", 120)
    tried.guest(own_guest, "shut off")
    mounted.release()
    # The domain is off: that is what a look is told, in the log.
    assert_errno(errno.EIO, lambda: os.listdir(mounted.raw))
    assert "the domain is shut off" in mounted.log
    own_guest.start()
    assert len(read_all(mounted.image)) == 32 * MIB
    mounted.unmount()


def test_job_ended_from_outside_is_lost_at_once(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("`virsh domjobabort` while a point is held", "Other owners of the domain")
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8; sync")
    mounted = mount(own_guest)
    descriptor = os.open(mounted.image, os.O_RDONLY)
    tried.allowed("domjobabort", lambda: own_guest.libvirt.virsh("domjobabort", own_guest.name))
    tried.log(mounted, "is lost")
    tried.fails(errno.EIO, lambda: os.pread(descriptor, MIB, 5 * MIB))
    tried.guest(own_guest, "running")
    os.close(descriptor)
    # Nobody is carried over into another point by trying again.
    assert_errno(errno.EIO, lambda: open(mounted.image, "rb"))
    assert mounted.status()["state"] == "lost"
    mounted.release()
    assert len(read_all(mounted.image)) == 32 * MIB
    mounted.unmount()


def test_foreign_job_is_ebusy_at_once_and_left_alone(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("another program's backup job runs", "Other owners of the domain")
    theirs = own_guest.folder / "theirs.sock"
    xml = own_guest.folder / "backup.xml"
    xml.write_text(f"<domainbackup mode='pull'><server transport='unix' socket='{theirs}'/></domainbackup>")
    mounted = mount(own_guest)
    own_guest.libvirt.virsh("backup-begin", own_guest.name, str(xml))
    tried.fails(errno.EBUSY, lambda: os.listdir(mounted.raw), within=3)
    tried.log(mounted, "no point in time")
    tried.guest(own_guest, "running")
    assert mounted.log.count(str(theirs)) == 1, "told once"
    assert str(theirs) in own_guest.libvirt.virsh("backup-dumpxml", own_guest.name)
    # Nor does unmounting touch it.
    subprocess.run(["umount", mounted.path], check=True)
    assert mounted.process.wait(30) == 0
    assert str(theirs) in own_guest.libvirt.virsh("backup-dumpxml", own_guest.name)
    own_guest.libvirt.virsh("domjobabort", own_guest.name)


def test_libvirtd_restarted_while_reading_is_not_noticed(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("libvirtd is killed while a point is read, and started again", "Libvirt")
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32; sync")
    mounted = mount(own_guest)
    before = read_all(mounted.image)
    own_guest.libvirt.kill()
    try:
        tried.reads(lambda: read_all(mounted.image), before, when="while it is away")
    finally:
        own_guest.libvirt.start()
    tried.log(mounted, "lost the connection to libvirt")
    tried.log(mounted, "connected to libvirt")
    tried.reads(lambda: read_all(mounted.image), before, when="afterwards")
    tried.guest(own_guest, "running")
    assert mounted.status()["state"] == "running"
    mounted.release()
    assert len(read_all(mounted.image)) == 32 * MIB
    mounted.unmount()


def cut_nbd(mounted: Mounted) -> int:
    """Shut the mount's NBD connections down, as a server that goes away would; return how many."""
    path = mounted.status()["socket"]
    pidfd = os.pidfd_open(mounted.process.pid)
    libc = ctypes.CDLL(None, use_errno=True)
    cut = 0
    for entry in Path(f"/proc/{mounted.process.pid}/fd").iterdir():
        if not os.readlink(entry).startswith("socket:"):
            continue
        copy = libc.syscall(SYS_PIDFD_GETFD, pidfd, int(entry.name), 0)
        assert copy >= 0, os.strerror(ctypes.get_errno())
        with socket.socket(fileno=copy) as theirs, contextlib.suppress(OSError):  # a listening one has no peer
            if theirs.getpeername() == path:
                theirs.shutdown(socket.SHUT_RDWR)
                cut += 1
    os.close(pidfd)
    return cut


def test_cut_nbd_connections_are_made_again(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("all NBD connections are cut", "NBD")
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32; sync")
    mounted = mount(own_guest, "timeout=5")
    before = read_all(mounted.image)
    assert cut_nbd(mounted) >= 1
    tried.reads(lambda: read_all(mounted.image), before)
    tried.log(mounted, "the NBD connection broke", cut=True)
    tried.guest(own_guest, "running")
    assert mounted.status()["state"] == "running"
    assert mounted.status()["disks"]["vda"]["reconnects"] >= 1
    mounted.unmount()


def test_a_stopped_qemu_gives_eio_within_the_timeout_and_the_reader_can_be_killed(
    own_guest: Guest, mount: Mounter, fault: Faults
) -> None:
    tried = fault("QEMU is stopped with SIGSTOP while a point is read")
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32; sync")
    mounted = mount(own_guest, "timeout=2")
    truth = read_all(mounted.image)
    descriptor = os.open(mounted.image, os.O_RDONLY)
    assert len(os.pread(descriptor, 10, 0)) == 10
    own_guest.signal(signal.SIGSTOP)
    try:
        # Not from the page cache: dd read past it.
        tried.fails(errno.EIO, lambda: os.pread(descriptor, MIB, 20 * MIB), within=8, when="after `timeout=`")
        tried.log(mounted, "has not answered")
        reader = subprocess.Popen(["dd", f"if={mounted.image}", "of=/dev/null", "bs=1M", "skip=24", "status=none"],
                                  stderr=subprocess.DEVNULL)  # fmt: skip
        reader.kill()
        reader.wait(8)
        assert subprocess.run(["ls", mounted.path], capture_output=True, check=True).stdout
    finally:
        own_guest.signal(signal.SIGCONT)
    wait_until(lambda: _reads(descriptor, 20 * MIB), 20)
    tried.reads(lambda: read_all(mounted.image), truth, when="after SIGCONT")
    tried.guest(own_guest, "running", when="after SIGCONT")
    os.close(descriptor)
    mounted.unmount()


def _reads(descriptor: int, offset: int) -> bool:
    try:
        return len(os.pread(descriptor, MIB, offset)) == MIB
    except OSError:
        return False


def test_a_stopped_qemu_does_not_hold_the_begin_for_ever(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("QEMU is stopped with SIGSTOP when a point is to begin")
    mounted = mount(own_guest, "timeout=2")
    own_guest.signal(signal.SIGSTOP)
    try:
        tried.fails(errno.EIO, lambda: os.listdir(mounted.raw), within=8, when="after `timeout=`")
    finally:
        own_guest.signal(signal.SIGCONT)
    wait_until(lambda: _lists(mounted.raw), 40)
    tried.guest(own_guest, "running", when="after SIGCONT")
    tried.log(mounted, "begins", when="after SIGCONT", cut=True)
    mounted.unmount()


def _lists(path: Path) -> bool:
    try:
        return bool(os.listdir(path))
    except OSError:
        return False


def test_second_mount_of_a_domain_says_who_has_it(own_guest: Guest, mount: Mounter) -> None:
    first = mount(own_guest)
    with pytest.raises(AssertionError) as caught:
        mount(own_guest)
    assert f"already mounted by process {first.process.pid} at {first.path}" in str(caught.value)
    first.unmount()


def test_sigterm_unmounts_what_nobody_uses(own_guest: Guest, mount: Mounter) -> None:
    mounted = mount(own_guest, "idle=1")
    subprocess.run(["cat", mounted.raw / "domain.xml"], check=True, capture_output=True)
    mounted.wait_log("begins")
    mounted.process.terminate()
    assert mounted.process.wait(30) == 0
    assert not os.path.ismount(mounted.path)
    assert os.listdir(mounted.path) == []
    assert_nothing_left(own_guest)


def test_sigterm_while_in_use_leaves_a_dead_mount_never_an_empty_folder(
    own_guest: Guest, mount: Mounter, fault: Faults
) -> None:
    tried = fault("SIGTERM while a file is open", "backupfs itself")
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=32; sync")
    mounted = mount(own_guest)
    descriptor = os.open(mounted.image, os.O_RDONLY)
    os.pread(descriptor, 1, 0)
    errors: list[int] = []
    stop = threading.Event()

    def read() -> None:
        offset = 0
        while not stop.is_set():
            try:
                os.pread(descriptor, 4096, offset % (32 * MIB))
            except OSError as error:
                errors.append(error.errno or 0)
                return
            offset += 5 * MIB + 4096

    reader = threading.Thread(target=read)
    reader.start()
    mounted.process.terminate()
    assert mounted.process.wait(30) == 0
    stop.set()
    reader.join()
    assert set(errors) <= {errno.EIO, errno.ENOTCONN}
    tried.fails(errno.ENOTCONN, lambda: os.listdir(mounted.path))
    tried.log(mounted, "the mount point stays dead")
    tried.guest(own_guest, "running")
    assert_nothing_left(own_guest)
    with contextlib.suppress(OSError):  # ENOTCONN, for nobody is left to be told
        os.close(descriptor)
    subprocess.run(["umount", mounted.path], check=True)
    again = mount(own_guest, path=mounted.path)
    again.unmount()


def test_the_process_ends_though_another_namespace_keeps_a_copy_of_the_mount(own_guest: Guest, mount: Mounter) -> None:
    mounted = mount(own_guest)
    os.listdir(mounted.raw)
    # As QEMU's own namespace does where the mounts are private.
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "unchanged", "sh", "-c", "echo ready; read x"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert keeper.stdout is not None
        assert keeper.stdout.readline() == b"ready\n"
        mounted.unmount()
    finally:
        keeper.communicate(b"\n")


def test_fifty_mounts_and_points_leak_nothing(lab: Libvirt, own_guest: Guest, mount: Mounter) -> None:
    mounted = mount(own_guest)
    process = Path(f"/proc/{mounted.process.pid}")

    def figures() -> tuple[int, int, int]:
        status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        return len(list((process / "fd").iterdir())), int(status["Threads"]), int(status["VmRSS"].split()[0])

    def rounds(count: int) -> None:
        for _ in range(count):
            read_all(mounted.image)
            mounted.release()

    rounds(3)
    descriptors, threads, resident = figures()
    rounds(10)
    after = figures()
    assert after[0] <= descriptors
    assert after[1] <= threads + 1  # trio keeps an idle worker or two
    assert after[2] < resident + 8 * 1024
    mounted.unmount()
    # The mount itself, many times, in the background as a user has it.
    env = mount.env(lab)
    point = mount.mount_point()
    command = [str(COMMAND), "-o", f"uri={lab.uri}", own_guest.name, str(point)]
    for _ in range(50):
        subprocess.run(command, env=env, check=True)
        assert "raw" in os.listdir(point)
        subprocess.run(["umount", point], check=True)
        wait_until(lambda: not _serving(point), 20)
    assert_nothing_left(own_guest)


def _serving(point: Path) -> bool:
    done = subprocess.run(["pgrep", "-f", f"backupfs[ .].*{point}$"], capture_output=True, check=False)
    return done.returncode == 0
