# SPDX-License-Identifier: GPL-3.0-or-later
"""The installed command as a user runs it: in the background, with its exit statuses and sentences."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import COMMAND, MIB, Mounter, assert_nothing_left, wait_until


def run(mount: Mounter, lab: Libvirt, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *words], capture_output=True, text=True, check=False, timeout=60,
                          env={**mount.env(lab), **env})  # fmt: skip


def test_background_mount_answers_when_the_command_returns(guest: Guest, lab: Libvirt, mount: Mounter) -> None:
    point = mount.mount_point()
    done = run(mount, lab, "-o", f"uri={lab.uri}", guest.name, point)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shown = subprocess.run(["findmnt", "-n", "-o", "FSTYPE,SOURCE", point], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["fuse.backupfs", guest.name]
    pid = json.loads((point / ".backupfs/status.json").read_text())["pid"]
    assert (point / "raw/vda.raw").stat().st_size == 96 * MIB
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    subprocess.run(["fusermount3", "-u", point], check=True)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    assert_nothing_left(guest)


def test_domain_is_found_by_uuid_too(guest: Guest, lab: Libvirt, mount: Mounter) -> None:
    point = mount.mount_point()
    assert run(mount, lab, "-o", f"uri={lab.uri}", guest.uuid, point).returncode == 0
    pid = json.loads((point / ".backupfs/status.json").read_text())["pid"]
    subprocess.run(["umount", point], check=True)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_each_failure_has_its_sentence_and_status(guest: Guest, lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    point = mount.mount_point()
    uri = f"uri={lab.uri}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    cases = [
        (("-o", uri, "nobody-has-this", point), 5, "no domain with the name or UUID 'nobody-has-this'"),
        (("-o", "uri=qemu+unix:///session?socket=/nowhere", guest.name, point), 4, "cannot reach libvirt"),
        (("-o", uri, guest.name, tmp_path / "none"), 32, "no such directory"),
        (("-o", uri, guest.name, tmp_path / "full"), 32, "not empty"),
        (("-o", uri, guest.name, tmp_path / "file"), 32, "not a directory"),
        (("-o", uri, guest.name, guest.folder.parent), 32, "not empty"),
        (("-o", f"{uri},idel=5", guest.name, point), 2, "unknown option idel; did you mean idle?"),
        (("-o", f"{uri},idle=soon", guest.name, point), 2, "option idle=soon"),
        (("-o", f"{uri},disks=vdx", guest.name, point), 2, "disks=vdx"),
        (("-o", f"{uri},scratch={point}/x", guest.name, point), 32, "the mount would hide"),
        ((guest.name,), 2, "MOUNTPOINT"),
        (("status", point), 32, "no backupfs is mounted there"),
        (("release", tmp_path), 32, "no backupfs is mounted there"),
    ]
    for words, status, sentence in cases:
        done = run(mount, lab, *words)
        assert (done.returncode, sentence in done.stderr) == (status, True), (words, done)
        assert done.stderr.startswith("backupfs: ")
        assert "Traceback" not in done.stderr
    assert not os.path.ismount(point)
    assert_nothing_left(guest)


def test_a_mount_over_a_mount_is_refused(guest: Guest, lab: Libvirt, mount: Mounter) -> None:
    mounted = mount(guest)
    done = run(mount, lab, "-o", f"uri={lab.uri}", guest.name, mounted.path)
    assert done.returncode == 32
    assert "already mounted" in done.stderr
    mounted.unmount()


def test_missing_fusermount3_names_its_package(guest: Guest, lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    for program in ("umount", "sh"):
        (tmp_path / program).symlink_to(shutil.which(program) or "")
    done = run(mount, lab, "-o", f"uri={lab.uri}", guest.name, mount.mount_point(), PATH=str(tmp_path))
    assert done.returncode == 3
    assert "install the package fuse3" in done.stderr


def test_fstab_words_are_taken(guest: Guest, lab: Libvirt, mount: Mounter) -> None:
    mounted = mount(guest, "noauto,nofail,_netdev,user,x-systemd.automount,nosuid,nodev,noexec,ro,defaults")
    options = subprocess.run(
        ["findmnt", "-n", "-o", "OPTIONS", mounted.path], capture_output=True, text=True, check=True
    )
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(options.stdout.strip().split(","))
    mounted.release()
    mounted.unmount()


def test_a_block_disk_needs_a_scratch_folder_and_works_with_one(lab: Libvirt, mount: Mounter) -> None:
    backing = lab.images / "block.img"
    with open(backing, "wb") as file:
        file.truncate(8 * MIB)
    loop = subprocess.run(
        ["losetup", "-f", "--show", backing], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        shutil.chown(loop, "nobody")
        disks = [Disk("vda", size=MIB), Disk("vdb", kind="block", format="raw", path=Path(loop))]
        with open_guest(lab, disks) as guest:
            guest.run("tr '\\0' A < /dev/zero | dd of=/dev/vdb bs=1M count=4 iflag=fullblock; sync")
            point = mount.mount_point()
            done = run(mount, lab, "-o", f"uri={lab.uri}", guest.name, point)
            assert done.returncode == 7
            assert "scratch=DIR" in done.stderr
            scratch = lab.images / "scratch"
            scratch.mkdir()
            shutil.chown(scratch, "nobody")
            mounted = mount(guest, f"scratch={scratch}")
            assert (mounted.raw / "vdb.raw").read_bytes() == b"A" * 4 * MIB + bytes(4 * MIB)
            assert len(os.listdir(scratch)) == 2
            mounted.unmount()
            assert os.listdir(scratch) == []
            excluded = mount(guest, "exclude=vdb")
            assert sorted(os.listdir(excluded.raw)) == ["domain.xml", "vda.raw"]
            assert "exclude" in excluded.status()["why"]["vdb"]
            excluded.unmount()
    finally:
        subprocess.run(["losetup", "-d", loop], check=True)
        backing.unlink()


def test_a_domain_that_is_off_can_be_mounted_and_says_so(lab: Libvirt, mount: Mounter) -> None:
    with open_guest(lab, [Disk("vda", size=MIB)], start=False) as guest:
        mounted = mount(guest)
        with pytest.raises(OSError):
            os.listdir(mounted.raw)
        assert "the domain is shut off; start it" in mounted.log
        assert "shut off" in mounted.status()["why"]["point"]
        guest.start()
        assert (mounted.raw / "vda.raw").stat().st_size == MIB
        mounted.unmount()


def test_a_network_disk_is_served(lab: Libvirt, mount: Mounter) -> None:
    folder = lab.images / "network"
    folder.mkdir()
    shutil.chown(folder, "nobody")
    server = subprocess.Popen(
        ["nbdkit", "-f", "-U", folder / "nbd.sock", "-P", folder / "pid", "memory", "8M"], user="nobody"
    )
    try:
        wait_until((folder / "pid").exists)
        network = Disk("vdb", kind="network", format="raw", path=folder / "nbd.sock")
        with open_guest(lab, [Disk("vda", size=MIB), network]) as guest:
            guest.run("tr '\\0' N < /dev/zero | dd of=/dev/vdb bs=1M count=3 iflag=fullblock; sync")
            mounted = mount(guest, f"scratch={folder}")
            assert (mounted.raw / "vdb.raw").read_bytes() == b"N" * 3 * MIB + bytes(5 * MIB)
            guest.run("dd if=/dev/zero of=/dev/vdb bs=1M count=8; sync")
            assert (mounted.raw / "vdb.raw").read_bytes()[: 3 * MIB] == b"N" * 3 * MIB
            mounted.unmount()
    finally:
        server.terminate()
        server.wait()
