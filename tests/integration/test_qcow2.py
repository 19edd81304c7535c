# SPDX-License-Identifier: GPL-3.0-or-later
"""qcow2/ is the same instant as raw/, in files that QEMU takes for its own.

The truth is what qemu-img makes of the paused guest's disk, and what a guest finds in a copy.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounted, Mounter


def qemu_img(*words: str | Path) -> str:
    done = subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def check(path: Path) -> dict[str, Any]:
    found = json.loads(qemu_img("check", "--output=json", "-f", "qcow2", path))
    assert isinstance(found, dict)
    assert found["check-errors"] == found.get("corruptions", 0) == found.get("leaks", 0) == 0
    return found


@pytest.fixture(scope="module")
def full_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest whose 64 MiB disk holds data, holes and zeros of odd lengths."""
    with open_guest(lab, [Disk("vda", size=64 * MIB), Disk("vdb", size=5 * MIB + 512, format="raw")]) as guest:
        guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=20 conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vda bs=4k count=300 seek=7777 conv=notrunc")
        guest.run("dd if=/dev/zero of=/dev/vda bs=512 count=777 seek=9999 conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=9 seek=1015 conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vdb bs=512 count=1 seek=10240 conv=notrunc; sync")
        yield guest


@pytest.fixture
def frozen(full_guest: Guest, mount: Mounter, tmp_path: Path) -> Iterator[tuple[Mounted, Path]]:
    """A mount whose point began while the guest was paused, and that instant's truth."""
    mounted = mount(full_guest)
    full_guest.run("sync")
    full_guest.pause()
    truth = tmp_path / "truth"
    truth.mkdir()
    for target in ("vda", "vdb"):
        full_guest.copy_disk(target, truth / target)
    assert sorted(os.listdir(mounted.path / "qcow2")) == ["domain.xml", "vda.qcow2", "vdb.qcow2"]
    full_guest.resume()
    full_guest.run("(while :; do dd if=/dev/urandom of=/dev/vda bs=1M count=50 conv=notrunc; sync; done) "
                   ">/dev/null 2>&1 & echo $! > /tmp/writer")  # fmt: skip
    yield mounted, truth
    full_guest.run("kill $(cat /tmp/writer); sync")
    mounted.unmount()


def test_a_copy_by_cp_is_sound_and_holds_the_instant(frozen: tuple[Mounted, Path], tmp_path: Path) -> None:
    mounted, truth = frozen
    for target in ("vda", "vdb"):
        image = mounted.path / f"qcow2/{target}.qcow2"
        size = image.stat().st_size
        assert image.stat().st_blocks * 512 >= size
        for name, words in (
            ("cp", ["cp", image, tmp_path / "cp"]),
            ("direct", ["dd", f"if={image}", f"of={tmp_path / 'direct'}", "bs=1M", "iflag=direct", "status=none"]),
            ("cat", ["sh", "-c", f"cat {image} > {tmp_path / 'cat'}"]),
            ("rsync", ["rsync", "--inplace", image, tmp_path / "rsync"]),
        ):
            subprocess.run(words, check=True, capture_output=True)
            copy = tmp_path / name
            assert copy.stat().st_size == size
            assert "corruptions" not in check(copy)
            qemu_img("compare", "-f", "qcow2", "-F", "raw", copy, truth / target)
            if name != "cp":
                assert filecmp.cmp(copy, tmp_path / "cp", shallow=False)
        # Only what is allocated: 20 MiB, and the odd bits.
        assert size < (24 * MIB if target == "vda" else MIB)

    # qemu-img reads it in place, too.
    qemu_img("compare", "-f", "qcow2", "-F", "raw", mounted.path / "qcow2/vda.qcow2", mounted.path / "raw/vda.raw")


def test_any_read_is_that_part_of_the_copy(frozen: tuple[Mounted, Path], tmp_path: Path) -> None:
    mounted, _ = frozen
    image = mounted.path / "qcow2/vda.qcow2"
    shutil.copyfile(image, tmp_path / "copy")
    want = (tmp_path / "copy").read_bytes()
    pick = random.Random(7)
    with open(image, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for length in (1, 4096, 65536, MIB):
            for _ in range(40):
                offset = pick.randrange(len(want))
                assert os.pread(file.fileno(), length, offset) == want[offset : offset + length]
        assert os.pread(file.fileno(), 100, len(want) - 7) == want[-7:]
        assert os.pread(file.fileno(), 100, len(want)) == b""


def test_both_forms_at_once_are_of_one_instant(lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    with open_guest(lab, [Disk("vda", ext4=True, size=96 * MIB)]) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt")
        guest.start_writer()
        mounted = mount(guest)
        for _ in range(2):
            copies = [
                threading.Thread(target=shutil.copyfile, args=(mounted.path / name, tmp_path / Path(name).name))
                for name in ("raw/vda.raw", "qcow2/vda.qcow2")
            ]
            for copy in copies:
                copy.start()
            for copy in copies:
                copy.join()
            check(tmp_path / "vda.qcow2")
            qemu_img("compare", "-f", "qcow2", "-F", "raw", tmp_path / "vda.qcow2", tmp_path / "vda.raw")
            assert (mounted.path / "qcow2/vda.qcow2").stat().st_mtime == mounted.image.stat().st_mtime
            # Who holds a file of the one form while the point ends gets nothing of the next.
            held = os.open(mounted.path / "qcow2/vda.qcow2", os.O_RDONLY | os.O_DIRECT)
            mounted.release()
            with pytest.raises(OSError) as caught:
                os.read(held, MIB)
            assert caught.value.errno == errno.EIO
            os.close(held)
        guest.stop_writer()
        mounted.unmount()


@pytest.mark.parametrize("form", ["qcow2", "raw"])
@pytest.mark.parametrize("disk", [Disk("vda", ext4=True), Disk("vda", ext4=True, format="raw")], ids=["qcow2", "raw"])
def test_a_lost_guest_is_restored_from_one_folder(
    lab: Libvirt, mount: Mounter, tmp_path: Path, form: str, disk: Disk
) -> None:
    """Copy the folder, lose guest and disk, define what was copied, and start it."""
    with open_guest(lab, [disk]) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt; echo before > /mnt/file; sync")
        mounted = mount(guest)
        backup = tmp_path / "backup"
        shutil.copytree(mounted.path / form, backup)
        guest.run("echo after > /mnt/file; sync")
        mounted.unmount()
        guest.destroy()
        lab.virsh("undefine", guest.name)
        guest.paths["vda"].unlink()

        restored = guest.folder / f"restored.{form}"
        shutil.copyfile(backup / f"vda.{form}", restored)
        shutil.chown(restored, "nobody", "nogroup")
        definition = (backup / "domain.xml").read_text()
        assert str(guest.paths["vda"]) in definition
        (tmp_path / "new.xml").write_text(definition.replace(str(guest.paths["vda"]), str(restored)))
        lab.virsh("define", "--validate", str(tmp_path / "new.xml"))
        guest.start()
        assert guest.run("mount -t ext4 /dev/vda /mnt && cat /mnt/file") == "before"
        guest.run("dd if=/dev/urandom of=/mnt/more bs=1M count=9; sync; umount /mnt")
        guest.destroy()
        if form == "qcow2":
            check(restored)
        qemu_img("convert", "-f", form, "-O", "raw", restored, tmp_path / "fsck.raw")
        subprocess.run(["e2fsck", "-fn", tmp_path / "fsck.raw"], check=True, capture_output=True)
