# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints as directories: mkdir, rmdir, and what changed since each, byte for byte.

The truth is the paused guest's disk, as qemu-img copies it.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import COMMAND, MIB, Mounted, Mounter, assert_nothing_left, wait_until
from .test_qcow2 import check, qemu_img


@pytest.fixture
def disk_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest with a qcow2 disk and a raw one."""
    with open_guest(lab, [Disk("vda", size=64 * MIB), Disk("vdb", size=8 * MIB, format="raw")]) as found:
        found.run("dd if=/dev/urandom of=/dev/vda bs=1M count=30 conv=notrunc; sync")
        yield found


def write(guest: Guest, at: int, blocks: int = 1, source: str = "urandom") -> None:
    """Write *blocks* of 64 KiB at block *at* of vda."""
    guest.run(f"dd if=/dev/{source} of=/dev/vda bs=64k seek={at} count={blocks} conv=notrunc; sync")


def truth_of(guest: Guest, to: Path) -> Path:
    guest.run("sync")
    guest.pause()
    try:
        return guest.copy_disk("vda", to)
    finally:
        guest.resume()


def extents(folder: Path, disk: str = "vda") -> list[tuple[int, int, bool]]:
    told = json.loads((folder / f"{disk}.extents.json").read_text())
    return [(one["start"], one["length"], one["zero"]) for one in told["extents"]]


def blocks_of(folder: Path) -> set[int]:
    """Return the 64 KiB blocks that a checkpoint's directory says have changed."""
    return {
        block for start, length, _ in extents(folder) for block in range(start // 65536, -(-(start + length) // 65536))
    }


def copy_chain(folder: Path, mounted: Mounted, base: str, name: str) -> None:
    """Copy an increment since *base* to where its backing file lies."""
    shutil.copyfile(mounted.path / f"checkpoints/{base}/vda.inc.qcow2", folder / f"vda.{name}.qcow2")


def assert_restores(folder: Path, name: str, truth: Path) -> None:
    restored = folder / "restored.raw"
    check(folder / f"vda.{name}.qcow2")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", folder / f"vda.{name}.qcow2", restored)
    assert filecmp.cmp(restored, truth, shallow=False)


def make(mounted: Mounted, name: str) -> None:
    os.mkdir(mounted.path / "checkpoints" / name)


def test_a_chain_of_increments_is_each_instant_to_the_byte(disk_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    mounted = mount(disk_guest)
    chain = tmp_path / "chain"
    chain.mkdir()
    make(mounted, "monday")
    # What the guest writes from here on belongs to the next one.
    first = truth_of(disk_guest, tmp_path / "monday.raw")
    shutil.copyfile(mounted.path / "qcow2/vda.qcow2", chain / "vda.monday.qcow2")
    assert_restores(chain, "monday", first)
    assert sorted(os.listdir(mounted.path / "checkpoints/monday")) == ["checkpoint.xml"]

    write(disk_guest, 3, 2)
    write(disk_guest, 100, 5, "zero")  # zeroed: the old data must not come back
    write(disk_guest, 200, 10, "zero")
    mounted.release()  # while a job runs, QEMU drops a discard
    disk_guest.run("blkdiscard -o 6553600 -l 1310720 /dev/vda && sync")
    make(mounted, "tuesday")
    second = truth_of(disk_guest, tmp_path / "tuesday.raw")
    copy_chain(chain, mounted, "monday", "tuesday")
    assert_restores(chain, "tuesday", second)
    changed = blocks_of(mounted.path / "checkpoints/monday")
    assert changed == {3, 4, *range(100, 120), *range(200, 210)}
    assert os.listdir(mounted.path / "checkpoints/tuesday") == ["checkpoint.xml"]

    write(disk_guest, 105, 2)
    write(disk_guest, 800, 3)
    make(mounted, "wednesday")
    third = truth_of(disk_guest, tmp_path / "wednesday.raw")
    copy_chain(chain, mounted, "tuesday", "wednesday")
    assert_restores(chain, "wednesday", third)
    # All checkpoints at once: from monday it is the union.
    assert blocks_of(mounted.path / "checkpoints/tuesday") == {105, 106, 800, 801, 802}
    assert blocks_of(mounted.path / "checkpoints/monday") == {*changed, 105, 106, 800, 801, 802}
    shutil.copyfile(mounted.path / "checkpoints/monday/vda.inc.qcow2", chain / "vda.direct.qcow2")
    assert_restores(chain, "direct", third)

    facts = {name: os.getxattr(mounted.path / "checkpoints/monday/vda.inc.qcow2", f"user.backupfs.{name}").decode()
             for name in ("checkpoint", "from", "to", "instant")}  # fmt: skip
    assert facts["checkpoint"] == "monday"
    assert int(facts["from"]) < int(facts["to"]) == int(facts["instant"])
    why = mounted.status()["why"]
    assert "raw disk" in why["checkpoints/monday/vdb"]
    assert "wednesday" in str(why)
    assert set(os.listdir(mounted.path / "raw")) == {"domain.xml", "vda.raw", "vdb.raw"}
    mounted.unmount()


def test_unchanged_disks_keep_their_time_and_changed_ones_do_not(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest, "checkpoint=c,keep=1")
    first = mounted.image.stat().st_mtime
    assert os.listdir(mounted.path / "checkpoints") == ["c"]
    mounted.release()
    assert mounted.image.stat().st_mtime == first
    assert int(os.getxattr(mounted.image, "user.backupfs.instant")) > first
    assert (mounted.path / "qcow2/vda.qcow2").stat().st_mtime == first
    assert (mounted.raw / "vdb.raw").stat().st_mtime > first  # a raw disk has no bitmap
    assert sorted(os.listdir(mounted.path / "checkpoints")) == ["c", "c-2"]
    assert disk_guest.libvirt.virsh("checkpoint-list", "--name", disk_guest.uuid).split() == ["c-2"]
    write(disk_guest, 7)
    mounted.release()
    assert mounted.image.stat().st_mtime > first
    # The pruned one still is a base.
    assert blocks_of(mounted.path / "checkpoints/c") == {7}
    assert "pruned by backupfs" in (mounted.path / "checkpoints/c/checkpoint.xml").read_text()
    write(disk_guest, 9)
    mounted.unmount()
    # After a restart of the mount, too.
    mounted = mount(disk_guest, "checkpoint=c,keep=1")
    assert blocks_of(mounted.path / "checkpoints/c") == {7, 9}
    assert blocks_of(mounted.path / "checkpoints/c-2") == {7, 9}
    assert blocks_of(mounted.path / "checkpoints/c-3") == {9}
    os.rmdir(mounted.path / "checkpoints/c")
    assert sorted(os.listdir(mounted.path / "checkpoints")) == ["c-2", "c-3", "c-4"]
    mounted.unmount()


def refused(number: int, path: Path) -> None:
    with pytest.raises(OSError) as caught:
        os.mkdir(path)
    assert caught.value.errno == number, caught.value


def test_mkdir_says_what_is_wrong(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest)
    folder = mounted.path / "checkpoints"
    make(mounted, "one")
    assert folder.stat().st_mode & 0o7777 == 0o700
    assert (folder / "one").stat().st_mode & 0o7777 == 0o500
    refused(errno.EEXIST, folder / "one")
    for name in (".x", "a b", "ä", "x" * 250, "a,b"):
        refused(errno.EINVAL, folder / name)
    refused(errno.EROFS, mounted.path / "other")
    refused(errno.EROFS, mounted.raw / "other")
    with pytest.raises(OSError) as caught:
        os.rename(folder / "one", folder / "two")
    assert caught.value.errno == errno.EPERM
    # Another process has a file open.
    held = mounted.status()["point"]
    reader = subprocess.Popen(["sh", "-c", f"exec 3< {mounted.image}; echo; read go"], stdin=-1, stdout=-1)
    assert reader.stdout is not None
    reader.stdout.readline()
    refused(errno.EBUSY, folder / "two")
    assert f"process {reader.pid}" in mounted.log
    assert mounted.status()["point"] == held
    reader.communicate(b"\n")
    # This one's own open file does not stand in the way; it belongs to the old point.
    mine = os.open(mounted.image, os.O_RDONLY | os.O_DIRECT)
    make(mounted, "two")
    with pytest.raises(OSError) as caught:
        os.read(mine, MIB)
    assert caught.value.errno == errno.EIO
    os.close(mine)
    assert mounted.status()["point"] != held
    with pytest.raises(OSError) as caught:
        os.rmdir(folder / "none")
    assert caught.value.errno == errno.ENOENT
    os.rmdir(folder / "two")
    os.rmdir(folder / "one")
    assert os.listdir(folder) == []
    assert disk_guest.libvirt.virsh("checkpoint-list", "--name", disk_guest.uuid) == ""
    mounted.unmount()


def test_mkdir_on_a_read_only_mount_and_without_a_disk_for_it(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest, "ro")
    refused(errno.EROFS, mounted.path / "checkpoints/one")
    mounted.unmount()
    mounted = mount(disk_guest, "disks=vdb")
    os.listdir(mounted.raw)
    point = mounted.status()["point"]
    refused(errno.EOPNOTSUPP, mounted.path / "checkpoints/one")
    assert mounted.status()["point"] == point, "the old point was not ended for it"
    mounted.unmount()
    with open_guest(disk_guest.libvirt, [Disk("vda", size=MIB, options="compat=0.10")]) as old:
        mounted = mount(old)
        refused(errno.EOPNOTSUPP, mounted.path / "checkpoints/one")
        mounted.unmount()


def test_only_mkdir_begins_a_point_where_it_is_so_wished(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest, "begin=mkdir")
    with pytest.raises(OSError) as caught:
        os.listdir(mounted.raw)
    assert caught.value.errno == errno.EIO
    assert "mkdir checkpoints/NAME" in mounted.log
    make(mounted, "one")
    assert "vda.raw" in os.listdir(mounted.raw)
    mounted.unmount()


def test_checkpoints_of_others_are_bases_too(disk_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    virsh = disk_guest.libvirt.virsh
    mounted = mount(disk_guest, "backing={checkpoint}-{disk}.raw,format=raw")
    virsh("checkpoint-create-as", disk_guest.uuid, "foreign", "--diskspec", "vda")
    base = truth_of(disk_guest, tmp_path / "foreign-vda.raw")
    write(disk_guest, 5)
    make(mounted, "own")
    truth = truth_of(disk_guest, tmp_path / "truth.raw")
    assert blocks_of(mounted.path / "checkpoints/foreign") == {5}
    copy = shutil.copyfile(mounted.path / "checkpoints/foreign/vda.inc.qcow2", tmp_path / "inc.qcow2")
    qemu_img("compare", "-f", "qcow2", "-F", "raw", copy, truth)
    assert json.loads(qemu_img("info", "--output=json", copy))["backing-filename"] == base.name
    # One that is younger than the held point has no increment yet.
    virsh("checkpoint-create-as", disk_guest.uuid, "younger", "--diskspec", "vda")
    wait_until(lambda: "younger" in os.listdir(mounted.path / "checkpoints"))
    assert os.listdir(mounted.path / "checkpoints/younger") == ["checkpoint.xml"]
    assert "younger than the point" in mounted.status()["why"]["checkpoints/younger/vda"]
    # Deleted meanwhile: gone from listings, and an open file is served to its end.
    want = copy.read_bytes()
    held = os.open(mounted.path / "checkpoints/foreign/vda.inc.qcow2", os.O_RDONLY | os.O_DIRECT)
    virsh("checkpoint-delete", disk_guest.uuid, "foreign")
    wait_until(lambda: "foreign" not in os.listdir(mounted.path / "checkpoints"))
    assert b"".join(iter(lambda: os.read(held, MIB), b"")) == want
    os.close(held)
    # The same name made anew counts from then, not from before.
    write(disk_guest, 6)
    virsh("checkpoint-create-as", disk_guest.uuid, "foreign", "--diskspec", "vda")
    wait_until(lambda: "foreign" in os.listdir(mounted.path / "checkpoints"))
    assert os.listdir(mounted.path / "checkpoints/foreign") == ["checkpoint.xml"]
    write(disk_guest, 8)
    mounted.release()
    assert blocks_of(mounted.path / "checkpoints/foreign") == {8}
    assert blocks_of(mounted.path / "checkpoints/younger") == {6, 8}
    assert blocks_of(mounted.path / "checkpoints/own") == {6, 8}
    mounted.unmount()


def test_metadata_that_libvirt_lost_are_defined_again(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest)
    for name in ("one", "two", "three"):
        make(mounted, name)
        write(disk_guest, len(name))
    mounted.release()
    xml = disk_guest.libvirt.virsh("checkpoint-dumpxml", disk_guest.uuid, "two")
    for name in ("one", "two"):
        disk_guest.libvirt.virsh("checkpoint-delete", disk_guest.uuid, name, "--metadata")
    disk_guest.libvirt.virsh("checkpoint-delete", disk_guest.uuid, "three")
    assert blocks_of(mounted.path / "checkpoints/two") == {3, 5} if os.listdir(mounted.raw) else None
    assert disk_guest.libvirt.virsh("checkpoint-dumpxml", disk_guest.uuid, "two") == xml
    assert sorted(os.listdir(mounted.path / "checkpoints")) == ["one", "two"]
    assert blocks_of(mounted.path / "checkpoints/one") == {3, 5}
    mounted.unmount()


def test_pruning_deletes_nobody_else_s(disk_guest: Guest, mount: Mounter) -> None:
    virsh = disk_guest.libvirt.virsh
    virsh("checkpoint-create-as", disk_guest.uuid, "foreign", "--diskspec", "vda")
    mounted = mount(disk_guest, "checkpoint=day,keep=1")
    for number in range(3):
        os.listdir(mounted.raw)
        write(disk_guest, number)
        mounted.release()
    assert set(virsh("checkpoint-list", "--name", disk_guest.uuid).split()) == {"foreign", "day-3"}
    assert blocks_of(mounted.path / "checkpoints/foreign") == {0, 1, 2}
    for name, wanted in (("day", {0, 1, 2}), ("day-2", {1, 2}), ("day-3", {2})):
        assert blocks_of(mounted.path / "checkpoints" / name) == wanted
    mounted.unmount()


def test_bitmaps_that_died_with_qemu_are_told_of_and_can_be_removed(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest)
    make(mounted, "one")
    make(mounted, "two")
    mounted.unmount()
    disk_guest.signal(signal.SIGKILL)
    disk_guest.wait_state("shut off")
    disk_guest.start()
    mounted = mount(disk_guest)
    assert os.listdir(mounted.path / "checkpoints/one") == ["checkpoint.xml"]
    why = mounted.status()["why"]
    for name in ("one", "two"):
        assert "missing or broken bitmap" in why[f"checkpoints/{name}/vda"]
        assert "make a new checkpoint" in why[f"checkpoints/{name}/vda"]
    make(mounted, "three")
    write(disk_guest, 5)
    mounted.release()
    assert blocks_of(mounted.path / "checkpoints/three") == {5}
    for name in ("two", "one"):
        os.rmdir(mounted.path / "checkpoints" / name)
    assert os.listdir(mounted.path / "checkpoints") == ["three"]
    mounted.unmount()


def test_history_that_is_forgotten_leaves_no_increment_of_what_was_pruned(disk_guest: Guest, mount: Mounter) -> None:
    mounted = mount(disk_guest, "checkpoint=c,keep=1")
    for _ in range(2):
        os.listdir(mounted.raw)
        mounted.release()
    mounted.unmount()
    (record,) = [path for path in Path(mounted.env["STATE_DIRECTORY"]).rglob("vda-*.record")]
    record.write_bytes(record.read_bytes()[:-1])
    mounted = mount(disk_guest, "")
    with pytest.raises(OSError) as caught:
        os.listdir(mounted.path / "checkpoints/c")
    assert caught.value.errno == errno.EIO
    assert "thrown away" in mounted.log
    assert "pruned by backupfs" in (mounted.path / "checkpoints/c/checkpoint.xml").read_text()
    assert mounted.command("status").returncode == 0
    mounted.unmount()
    done = subprocess.run(
        [COMMAND, "forget", "-o", f"uri={disk_guest.libvirt.uri}", disk_guest.name],
        env=mounted.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    mounted = mount(disk_guest, "")
    assert os.listdir(mounted.path / "checkpoints") == ["c-2"]
    mounted.unmount()


@pytest.mark.parametrize("after", ["begin", "serve"])
def test_a_kill_between_begin_and_save_loses_no_change(
    disk_guest: Guest, mount: Mounter, tmp_path: Path, after: str
) -> None:
    """Killed while the point begins, or just after: the next one is exact all the same."""
    mounted = mount(disk_guest)
    make(mounted, "one")
    truth_of(disk_guest, tmp_path / "vda.one.qcow2.raw")
    shutil.copyfile(mounted.path / "qcow2/vda.qcow2", tmp_path / "vda.one.qcow2")
    write(disk_guest, 5)
    mounted.release()
    if after == "begin":
        begin = subprocess.Popen(["mkdir", mounted.path / "checkpoints/two"], stderr=subprocess.DEVNULL)
        wait_until(lambda: "two" in disk_guest.libvirt.virsh("checkpoint-list", "--name", disk_guest.uuid).split())
        mounted.process.kill()
        begin.wait()
    else:
        make(mounted, "two")
        mounted.process.kill()
    mounted.process.wait()
    subprocess.run(["umount", mounted.path], check=True)
    # Libvirt lists the checkpoint before QEMU has it: what is written until then is not in it.
    mounted.wait_log("the file system left is gone")
    write(disk_guest, 6)
    mounted = mount(disk_guest)
    time.sleep(2.1)  # a checkpoint that nobody knows of is believed when it is 2 s old
    assert blocks_of(mounted.path / "checkpoints/one") == {5, 6}
    assert blocks_of(mounted.path / "checkpoints/two") == {6}
    shutil.copyfile(mounted.path / "checkpoints/one/vda.inc.qcow2", tmp_path / "vda.three.qcow2")
    assert_restores(tmp_path, "three", truth_of(disk_guest, tmp_path / "truth.raw"))
    mounted.unmount()
    assert_nothing_left(disk_guest)
