# SPDX-License-Identifier: GPL-3.0-or-later
"""Libvirtd killed and started again in each state of the job, and guests that crash.

Whatever the state was: nobody gets a wrong byte or waits for ever, a new point can begin when libvirtd
is back, and nothing is left at the end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import Guest, Libvirt

from ..faults import Fault
from .conftest import COMMAND, MIB, Mounted, Mounter, wait_until
from .test_failures import _lists, read_all

Faults = Callable[..., Fault]
PANIC = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger"


@contextlib.contextmanager
def away(libvirt: Libvirt) -> Iterator[None]:
    """Kill libvirtd, and start it again on the way out."""
    libvirt.kill()
    try:
        yield
    finally:
        libvirt.start()


@contextlib.contextmanager
def stopped(guest: Guest) -> Iterator[None]:
    """Hold QEMU still, so that the job stays in the state that it is in."""
    pid = guest.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def fill(guest: Guest, letter: str) -> bytes:
    """Fill the disk's first 16 MiB with *letter*; return what the whole disk is then."""
    guest.run(
        f"tr '\\0' {letter} < /dev/zero | dd of=/dev/vda bs=1M count=16 iflag=fullblock conv=notrunc 2>/dev/null; sync"
    )
    return letter.encode() * 16 * MIB + bytes(16 * MIB)


def see_next_point(mounted: Mounted, tried: Fault, truth: bytes) -> None:
    """See that a new point can begin and is right, and that nothing is left after the unmount."""
    wait_until(lambda: _lists(mounted.raw), 60, lambda: mounted.log)
    tried.reads(lambda: read_all(mounted.image), truth, when="when it is back")
    tried.guest(mounted.guest, "running")
    mounted.unmount()


def test_libvirtd_killed_while_idle(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("libvirtd is killed while no point is held", "Libvirt")
    truth = fill(own_guest, "A")
    mounted = mount(own_guest, "timeout=3")
    with away(own_guest.libvirt):
        tried.fails(errno.EIO, lambda: os.listdir(mounted.raw), when="while it is away, after `timeout=`")
        tried.log(mounted, "no point in time", cut=True)
        assert "domain.xml" in os.listdir(mounted.path)
    see_next_point(mounted, tried, truth)


def test_libvirtd_killed_while_a_point_is_lost(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("libvirtd is killed while a point is lost", "Libvirt")
    truth = fill(own_guest, "A")
    mounted = mount(own_guest, "timeout=3")
    os.listdir(mounted.raw)
    own_guest.libvirt.virsh("domjobabort", own_guest.name)
    mounted.wait_log("is lost")
    with away(own_guest.libvirt):
        tried.fails(errno.EIO, lambda: os.listdir(mounted.raw), when="while it is away")
    mounted.wait_log("connected to libvirt")
    tried.fails(errno.EIO, lambda: os.listdir(mounted.raw), when="before `backupfs release`")
    mounted.release()
    see_next_point(mounted, tried, truth)


def cure(guest: Guest) -> None:
    """Do what JobStuck says."""
    guest.destroy()
    guest.libvirt.kill()
    guest.libvirt.start()
    guest.start()


def test_libvirtd_killed_while_our_job_starts(own_guest: Guest, mount: Mounter) -> None:
    fill(own_guest, "A")
    mounted = mount(own_guest, "timeout=3")
    errors: list[int | None] = []

    def look() -> None:
        try:
            os.listdir(mounted.raw)
        except OSError as error:
            errors.append(error.errno)

    looking = threading.Thread(target=look)
    looking.start()
    # Recorded means that begin is about to be handed to libvirt. What it meets there is chance.
    state = Path(mounted.env["STATE_DIRECTORY"])
    while looking.is_alive() and not list(state.rglob("job")):
        pass
    own_guest.libvirt.kill()
    own_guest.libvirt.start()
    looking.join(20)
    assert not looking.is_alive()
    assert errors in ([], [errno.EIO])
    wait_until(lambda: _lists(mounted.raw) or "nobody can end" in mounted.log, 60, lambda: mounted.log)
    assert own_guest.state == "running"
    if "nobody can end" in mounted.log:
        cure(own_guest)
        wait_until(lambda: _lists(mounted.raw), 60, lambda: mounted.log)
    assert len(read_all(mounted.image)) == 32 * MIB
    mounted.unmount()


def test_libvirtd_killed_while_a_backup_begins_is_told_with_the_cure(
    own_guest: Guest, mount: Mounter, fault: Faults
) -> None:
    tried = fault("libvirtd is killed while a backup begins", "Libvirt")
    xml = own_guest.folder / "backup.xml"
    xml.write_text(f"<domainbackup mode='pull'><server transport='unix' socket='{own_guest.folder}/s'/></domainbackup>")
    with stopped(own_guest):
        begin = subprocess.Popen(
            ["virsh", "-c", own_guest.libvirt.uri, "backup-begin", own_guest.name, str(xml)], stderr=subprocess.DEVNULL
        )
        status = own_guest.libvirt.folder / f"run/libvirt/qemu/run/{own_guest.name}.xml"
        wait_until(lambda: "async='backup'" in status.read_text())
        own_guest.libvirt.kill()
        begin.wait()
    own_guest.libvirt.start()
    mounted = mount(own_guest, "timeout=3")
    tried.fails(errno.EIO, lambda: os.listdir(mounted.raw))
    tried.log(mounted, "nobody can end")
    tried.guest(own_guest, "running")
    cure(own_guest)
    mounted.wait_log("connected to libvirt")
    truth = fill(own_guest, "B")
    tried.reads(lambda: read_all(mounted.image), truth, when="after that")
    mounted.unmount()


def test_libvirtd_killed_while_the_job_stops(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    tried = fault("libvirtd is killed while the job stops", "Libvirt")
    fill(own_guest, "A")
    mounted = mount(own_guest, "timeout=3")
    held = os.open(mounted.image, os.O_RDONLY)
    os.pread(held, 4096, 0)
    truth = fill(own_guest, "B")
    with stopped(own_guest):
        release = subprocess.Popen(
            [COMMAND, "release", mounted.path], env=mounted.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # fmt: skip
        wait_until(lambda: mounted.status()["state"] == "stopping")
        tried.fails(errno.EIO, lambda: os.pread(held, MIB, 20 * MIB), when="in the old point")
        own_guest.libvirt.kill()
    own_guest.libvirt.start()
    release.wait(60)
    os.close(held)
    see_next_point(mounted, tried, truth)


def test_a_left_over_is_known_to_be_ours_though_libvirtd_was_restarted(own_guest: Guest, mount: Mounter) -> None:
    truth = fill(own_guest, "A")
    first = mount(own_guest)
    os.listdir(first.raw)
    # Here libvirt calls its host by another name after each start.
    with away(own_guest.libvirt):
        first.process.kill()
        first.process.wait()
    subprocess.run(["umount", first.path], check=True)
    second = mount(own_guest)
    assert read_all(second.image) == truth
    second.unmount()


def test_guest_that_is_reset_does_not_disturb_the_point(own_guest: Guest, mount: Mounter, fault: Faults) -> None:
    for deed, title in (("reset", "`virsh reset`"), ("panic", "the guest's kernel panics and reboots")):
        tried = fault(title)
        truth = fill(own_guest, "A")
        mounted = mount(own_guest)
        os.listdir(mounted.raw)
        fill(own_guest, "B")
        own_guest.reboot_by(
            (lambda: own_guest.libvirt.virsh("reset", own_guest.name))
            if deed == "reset"
            else (lambda: own_guest.run(f"(sleep 0.2; {PANIC}) & true"))
        )
        tried.reads(lambda: read_all(mounted.image), truth)  # noqa: B023
        tried.guest(own_guest, "running")
        assert " WARNING " not in mounted.log
        # The guest's virtio ports were closed and opened again: libvirt 9.0 takes half a minute for each
        # such event, and ends the job after them.
        mounted.unmount(within=80)
