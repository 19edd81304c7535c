# SPDX-License-Identifier: GPL-3.0-or-later
"""Others who own the domain too: what libvirt lets them do while a point is held, and what the mount then serves.

The truth is a copy by qemu-img of the paused guest's disk, taken at the instant.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest
from lab import Disk, Guest, Libvirt, open_guest

from ..faults import Fault
from .conftest import MIB, Mounted, Mounter, wait_until
from .test_failures import read_all

Faults = Callable[..., Fault]
OWNERS = "Other owners of the domain"


@pytest.fixture
def two_disks(lab: Libvirt) -> Iterator[Guest]:
    """A guest with an overlay over a base, and a second disk."""
    with open_guest(lab, [Disk("vda", size=24 * MIB, backed=True), Disk("vdb", size=8 * MIB)]) as guest:
        scribble(guest)
        yield guest


def scribble(guest: Guest) -> None:
    """Write anew all over the first half of both disks."""
    guest.run("for d in vda vdb; do dd if=/dev/urandom of=/dev/$d bs=1M count=6 conv=notrunc 2>/dev/null; done; sync")


def begin(mounted: Mounted, to: Path) -> dict[str, bytes]:
    """Begin a point while the guest is paused; return the truth of each disk, then let the guest write over it."""
    guest = mounted.guest
    guest.pause()
    try:
        truth = {target: guest.copy_disk(target, to / target).read_bytes() for target in ("vda", "vdb")}
        os.listdir(mounted.raw)
    finally:
        guest.resume()
    scribble(guest)
    return truth


def read_both(mounted: Mounted) -> bytes:
    return b"".join(read_all(mounted.raw / f"{target}.raw") for target in ("vda", "vdb"))


def both(truth: dict[str, bytes]) -> bytes:
    return truth["vda"] + truth["vdb"]


def in_parallel(actions: list[Callable[[], None]]) -> None:
    """Run all at once, for each may wait half a minute for the job's lock; raise what one raised."""
    failures: list[BaseException] = []

    def run(action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_what_waits_for_the_job_is_refused_after_half_a_minute(
    two_disks: Guest, mount: Mounter, fault: Faults, tmp_path: Path
) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    truth = both(begin(mounted, tmp_path))
    attempts = {
        "save": ("save", guest.name, str(guest.folder / "saved")),
        "managedsave": ("managedsave", guest.name),
        "dump": ("dump", guest.name, str(guest.folder / "core")),
        "migrate": ("migrate", guest.name, "qemu+unix:///session?socket=/nowhere", "--p2p", "--live"),
        "snapshot-create-as": ("snapshot-create-as", guest.name, "s1"),
        "snapshot-create-as --disk-only": ("snapshot-create-as", guest.name, "s2", "--disk-only"),
        "backup-begin": ("backup-begin", guest.name),
    }
    rows = {deed: fault(f"`virsh {deed}` while a point is held", OWNERS) for deed in attempts}
    in_parallel([
        (lambda deed=deed, words=words: rows[deed].refused(deed, lambda: virsh(*words)))  # type: ignore[misc]
        for deed, words in attempts.items()
    ])  # fmt: skip
    for row in rows.values():
        row.reads(lambda: read_both(mounted), truth)
        row.guest(guest, "running")
    assert " WARNING " not in mounted.log
    mounted.unmount()


def test_what_needs_the_disks_is_refused_at_once(
    two_disks: Guest, mount: Mounter, fault: Faults, tmp_path: Path
) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    truth = both(begin(mounted, tmp_path))
    attempts = {
        "blockcommit": ("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait"),
        "blockpull": ("blockpull", guest.name, "vda", "--wait"),
        "blockcopy": ("blockcopy", guest.name, "vda", str(guest.folder / "copy"), "--finish", "--wait"),
        "blockresize": ("blockresize", guest.name, "vda", "48M"),
        "detach-disk": ("detach-disk", guest.name, "vdb"),
        "domrename": ("domrename", guest.name, f"{guest.name}x"),
    }
    for deed, words in attempts.items():
        row = fault(f"`virsh {deed}` while a point is held", OWNERS)
        row.refused(deed, lambda words=words: virsh(*words))  # type: ignore[misc]
        row.reads(lambda: read_both(mounted), truth)
        row.guest(guest, "running")
    assert " WARNING " not in mounted.log
    mounted.unmount()


def test_what_is_allowed_while_a_point_is_held_changes_no_byte_of_it(
    two_disks: Guest, mount: Mounter, fault: Faults, tmp_path: Path
) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    truth = both(begin(mounted, tmp_path))
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", guest.folder / "new", "4M"], check=True)
    os.chmod(guest.folder / "new", 0o666)
    attempts = {
        "checkpoint-create-as": ("checkpoint-create-as", guest.name, "c1"),
        "checkpoint-delete": ("checkpoint-delete", guest.name, "c1"),
        "suspend": ("suspend", guest.name),
        "resume": ("resume", guest.name),
        "attach-disk": (
            "attach-disk", guest.name, str(guest.folder / "new"), "vdc", "--driver", "qemu", "--subdriver", "qcow2",
        ),
        "blkdeviotune": ("blkdeviotune", guest.name, "vda", "--total-bytes-sec", "0"),
        "undefine": ("undefine", guest.name),
    }  # fmt: skip
    for deed, words in attempts.items():
        row = fault(f"`virsh {deed}` while a point is held", OWNERS)
        row.allowed(deed, lambda words=words: virsh(*words))  # type: ignore[misc]
        row.reads(lambda: read_both(mounted), truth)
        row.guest(guest, "paused" if deed == "suspend" else "running")
        assert sorted(os.listdir(mounted.raw)) == ["domain.xml", "vda.raw", "vdb.raw"]
    guest.run("until [ -b /dev/vdc ]; do usleep 10000; done; echo C | dd of=/dev/vdc 2>/dev/null; sync")
    mounted.release()
    # The next point has the new disk.
    assert (mounted.raw / "vdc.raw").read_bytes() == b"C\n" + bytes(4 * MIB - 2)
    # And a domain that nobody defines any more is gone when it stops.
    gone = fault("an undefined domain stops while a point is held", OWNERS)
    guest.destroy()
    gone.log(mounted, "is lost", cut=True)
    gone.fails(errno.EIO, lambda: os.listdir(mounted.raw))
    mounted.release()
    gone.fails(errno.ENOENT, lambda: os.listdir(mounted.raw), when="after `backupfs release`")
    gone.log(mounted, "no domain with", cut=True)
    subprocess.run(["umount", mounted.path], check=True)
    assert mounted.process.wait(30) == 0
    assert not list(guest.libvirt.folder.rglob("*backupfs-*"))


@pytest.mark.parametrize("deed", ["managedsave", "snapshot-create-as --disk-only"])
def test_release_lets_those_who_wait_go_on(
    two_disks: Guest, mount: Mounter, fault: Faults, tmp_path: Path, deed: str
) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    begin(mounted, tmp_path)
    tried = fault(f"`virsh {deed}` waits for the point, which is then released", OWNERS)
    command, *more = deed.split()
    waiting = threading.Thread(target=lambda: tried.allowed(deed, lambda: virsh(command, guest.name, *more)))
    waiting.start()
    waiting.join(1.0)
    assert waiting.is_alive(), "libvirt makes it wait"
    held = os.open(mounted.image, os.O_RDONLY)
    mounted.release()
    waiting.join(25.0)
    assert not waiting.is_alive()
    tried.fails(errno.EIO, lambda: os.pread(held, MIB, 10 * MIB), when="in the old point")
    os.close(held)
    if command == "managedsave":
        guest.wait_state("shut off")
        tried.guest(guest, "shut off")
        tried.fails(errno.EIO, lambda: os.listdir(mounted.raw), when="in the next")
        tried.log(mounted, "the domain is shut off")
        virsh("managedsave-remove", guest.name)
        guest.start()
    else:
        guest.paths.update(active(guest))
    tried.guest(guest, "running", when="at last")
    truth = begin(mounted, tmp_path)
    tried.reads(lambda: read_both(mounted), both(truth), when="in the next point")
    mounted.unmount()


def active(guest: Guest) -> dict[str, Path]:
    """Where the disks are now."""
    lines = guest.libvirt.virsh("domblklist", guest.name).splitlines()
    return {line.split()[0]: Path(line.split()[1]) for line in lines}


def test_disks_that_change_between_two_points_are_served_as_they_are(
    two_disks: Guest, mount: Mounter, fault: Faults, tmp_path: Path
) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    begin(mounted, tmp_path)
    steps = {
        "blockresize": ("blockresize", guest.name, "vda", "32M"),
        "snapshot-create-as --disk-only": ("snapshot-create-as", guest.name, "s1", "--disk-only"),
        "blockcommit": ("blockcommit", guest.name, "vda", "--active", "--pivot", "--wait"),
        "blockcopy": (
            "blockcopy", guest.name, "vdb", str(guest.folder / "moved"), "--pivot", "--wait", "--transient-job",
        ),
    }  # fmt: skip
    for deed, words in steps.items():
        row = fault(f"`virsh {deed}` between two points", OWNERS)
        mounted.release()
        row.allowed(deed, lambda words=words: virsh(*words))  # type: ignore[misc]
        guest.paths.update(active(guest))
        truth = begin(mounted, tmp_path)
        assert mounted.image.stat().st_size == 32 * MIB == len(truth["vda"])
        row.reads(lambda: read_both(mounted), both(truth))  # called at once
        row.guest(guest, "running")
    mounted.unmount()


def test_a_block_job_of_others_is_told_and_left_alone(two_disks: Guest, mount: Mounter, fault: Faults) -> None:
    guest, virsh = two_disks, two_disks.libvirt.virsh
    mounted = mount(guest)
    tried = fault("a block copy of another program runs when a point is to begin", OWNERS)
    copy = str(guest.folder / "copy")
    virsh("blockcopy", guest.name, "vda", copy, "--transient-job")
    wait_until(lambda: (info := guest.domain.blockJobInfo("vda", 0)) and info["cur"] == info["end"])
    tried.fails(errno.EBUSY, lambda: os.listdir(mounted.raw))
    tried.log(mounted, "no point in time")
    tried.guest(guest, "running")
    assert guest.domain.blockJobInfo("vda", 0)["type"] == libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY
    virsh("blockjob", guest.name, "vda", "--abort")
    os.listdir(mounted.raw)
    mounted.unmount()


def test_a_guest_saved_and_renamed_is_still_found(two_disks: Guest, mount: Mounter, tmp_path: Path) -> None:
    guest = two_disks
    mounted = mount(guest)
    begin(mounted, tmp_path)
    mounted.release()
    guest.destroy()
    guest.libvirt.virsh("domrename", guest.name, f"{guest.name}-renamed")
    guest.start()
    truth = begin(mounted, tmp_path)
    assert read_both(mounted) == both(truth)
    assert json.loads((mounted.path / ".backupfs/status.json").read_text())["uuid"] == guest.uuid
    mounted.unmount()
