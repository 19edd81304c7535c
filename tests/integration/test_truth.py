# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read through the mount is the disk as it was at one instant, byte for byte.

The truth is made by qemu-img from the paused guest; then a point begins, the guest goes on and
overwrites what it had.
"""

from __future__ import annotations

import filecmp
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounted, Mounter, assert_nothing_left


@pytest.fixture(scope="module")
def full_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest whose 64 MiB disk holds data, holes and zeros of odd lengths."""
    with open_guest(lab, [Disk("vda", size=64 * MIB)]) as guest:
        guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=20 conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vda bs=4k count=300 seek=7777 conv=notrunc")
        guest.run("dd if=/dev/zero of=/dev/vda bs=512 count=777 seek=9999 conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=9 seek=1015 conv=notrunc; sync")
        yield guest


@pytest.fixture
def frozen(full_guest: Guest, mount: Mounter, tmp_path: Path) -> Iterator[tuple[Mounted, Path]]:
    """A mount whose point began while the guest was paused, and that instant's truth."""
    mounted = mount(full_guest)
    full_guest.run("sync")
    full_guest.pause()
    truth = full_guest.copy_disk("vda", tmp_path / "truth")
    assert sorted(os.listdir(mounted.raw)) == ["domain.xml", "vda.raw"]
    full_guest.resume()
    # Overwrites data, fills holes, and discards.
    full_guest.run("(while :; do dd if=/dev/urandom of=/dev/vda bs=1M count=50 conv=notrunc; sync; done) "
                   ">/dev/null 2>&1 & echo $! > /tmp/writer")  # fmt: skip
    full_guest.run("blkdiscard -o 8M -l 8M /dev/vda || true")
    yield mounted, truth
    full_guest.run("kill $(cat /tmp/writer); sync")
    mounted.unmount()


def test_every_way_of_reading_gives_the_instant(frozen: tuple[Mounted, Path], tmp_path: Path) -> None:
    mounted, truth = frozen
    image = mounted.image
    want = truth.read_bytes()
    assert image.stat().st_size == len(want)

    assert filecmp.cmp(image, truth, shallow=False)
    copies = {
        "cp": ["cp", "--sparse=always", image, tmp_path / "cp"],
        "dd": ["dd", f"if={image}", f"of={tmp_path / 'dd'}", "bs=1M", "status=none"],
        "dd-direct": ["dd", f"if={image}", f"of={tmp_path / 'dd-direct'}", "bs=1M", "iflag=direct", "status=none"],
        "rsync": ["rsync", "--inplace", image, tmp_path / "rsync"],
        "convert": ["qemu-img", "convert", "-f", "raw", "-O", "raw", image, tmp_path / "convert"],
    }
    for name, words in copies.items():
        subprocess.run(words, check=True, capture_output=True)
        assert filecmp.cmp(tmp_path / name, truth, shallow=False), name
        (tmp_path / name).unlink()
    tar = subprocess.run(
        ["sh", "-c", f"tar -C {mounted.raw} -cf - vda.raw | tar -xOf - vda.raw | cmp - {truth}"], check=False
    )
    assert tar.returncode == 0

    with open(image, "rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == want
        pick = random.Random(7)
        for length in (1, 4096, MIB):
            for _ in range(60):
                offset = pick.randrange(len(want))
                assert os.pread(file.fileno(), length, offset) == want[offset : offset + length]
        assert os.pread(file.fileno(), 100, len(want) - 7) == want[-7:]
        assert os.pread(file.fileno(), 100, len(want)) == b""


def test_four_readers_at_once_each_get_the_instant(frozen: tuple[Mounted, Path]) -> None:
    mounted, truth = frozen
    want = truth.read_bytes()
    wrong: list[str] = []

    def read(seed: int) -> None:
        # O_DIRECT, so that each really asks the file system and not the page cache.
        descriptor = os.open(mounted.image, os.O_RDONLY | os.O_DIRECT)
        pick = random.Random(seed)
        length = (4096, 128 * 1024, MIB, 3 * MIB)[seed]
        buffer = mmap.mmap(-1, length)
        offsets = list(range(0, len(want), length))
        if seed == 0:
            offsets = pick.sample(offsets, 600)
        for offset in offsets:
            count = os.preadv(descriptor, [buffer], offset)
            if buffer[:count] != want[offset : offset + length]:
                wrong.append(f"reader {seed} at {offset}")
        os.close(descriptor)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert wrong == []
    disk = mounted.status()["disks"]["vda"]
    assert disk["connections"] == 2


def test_a_loop_device_on_the_image_is_the_guests_file_system(lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    with open_guest(lab, [Disk("vda", ext4=True)]) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt; echo before > /mnt/file; sync; umount /mnt")
        mounted = mount(guest)
        os.listdir(mounted.raw)
        guest.run("mount -t ext4 /dev/vda /mnt; echo after > /mnt/file; sync")
        inner = tmp_path / "inner"
        inner.mkdir()
        subprocess.run(["mount", "-o", "loop,ro,noload", mounted.image, inner], check=True)
        try:
            assert (inner / "file").read_text() == "before\n"
        finally:
            subprocess.run(["umount", inner], check=True)
        mounted.unmount()


def test_all_kinds_of_disks_are_served_and_cdroms_are_told_of(lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    medium = lab.images / "medium.iso"
    medium.write_bytes(b"\0" * MIB)
    disks = [
        Disk("vda", ext4=True),
        Disk("vdb", format="raw", size=16 * MIB),
        Disk("vdc", size=16 * MIB, backed=True),
        Disk("sda", bus="scsi", size=16 * MIB),
        Disk("sdb", bus="sata", size=16 * MIB),
        Disk("sdc", bus="sata", device="cdrom", format="raw", path=medium, read_only=True),
        Disk("sdd", bus="sata", device="cdrom", format="raw", read_only=True),
    ]
    with open_guest(lab, disks) as guest:
        guest.run("for d in vdb vdc sda sdb; do dd if=/dev/urandom of=/dev/$d bs=1M count=3 2>/dev/null; done; sync")
        mounted = mount(guest)
        guest.pause()
        truths = {
            disk.target: guest.copy_disk(disk.target, tmp_path / disk.target) for disk in disks if disk.device == "disk"
        }
        found = set(os.listdir(mounted.raw))
        guest.resume()
        guest.run("for d in vdb vdc sda sdb; do dd if=/dev/zero of=/dev/$d bs=1M count=9 2>/dev/null; done; sync")
        assert {"domain.xml", *(f"{target}.raw" for target in truths)} <= found
        assert not found & {"sdc.raw", "sdd.raw"}
        for target, truth in truths.items():
            assert filecmp.cmp(mounted.raw / f"{target}.raw", truth, shallow=False), target
        why = mounted.status()["why"]
        assert "cdrom" in why["sdc"]
        assert "cdrom" in why["sdd"]
        # What a restore needs: the definition, in the form that define takes.
        (tmp_path / "domain.xml").write_bytes((mounted.raw / "domain.xml").read_bytes())
        mounted.unmount()
        guest.libvirt.virsh("define", "--validate", str(tmp_path / "domain.xml"))
        assert_nothing_left(guest)


def test_nvram_is_in_the_point(lab: Libvirt, mount: Mounter) -> None:
    firmware = (
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>"
        "<nvram template='/usr/share/OVMF/OVMF_VARS.fd'>{folder}/nvram.fd</nvram>"
    )
    with open_guest(lab, [Disk("vda", size=MIB)], extra=firmware, start=False) as guest:
        # The firmware needs no guest behind it, and booting one under TCG takes long.
        guest.libvirt.virsh("start", "--paused", guest.name)
        mounted = mount(guest)
        assert (mounted.raw / "nvram.fd").read_bytes() == (guest.folder / "nvram.fd").read_bytes()
        mounted.unmount()
