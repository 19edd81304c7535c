# SPDX-License-Identifier: GPL-3.0-or-later
"""The chain that README shows, word for word, with a guest that writes, trims and zeroes in between.

The truth of each day is the raw image of its point, of which other tests show that it is the paused guest's.
"""

from __future__ import annotations

import filecmp
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounted, Mounter
from .test_qcow2 import check, qemu_img

README = Path(__file__).parents[2] / "README.md"
CLUSTER = 65536
DAYS = ("mon", "tue", "wed", "thu")


def commands() -> list[str]:
    """Return the commands of README's chain, in order."""
    text = README.read_text()
    block = text[text.index("    mkdir /mnt/web01/checkpoints/mon") :].split("\n\n")[0]
    return [re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines()]


def live(guest: Guest, mounted: Mounted, day: str) -> None:
    """Have the guest do what guests do in a day; of vdb it is known which blocks change."""
    if day == "mon":
        mounted.release()  # idle for long; also, while a job runs QEMU may drop a discard
        guest.run("rm /mnt/big; sync; fstrim /mnt; sync")
        guest.run("blkdiscard -o 1310720 -l 655360 /dev/vdb; sync")  # 10 blocks
    elif day == "tue":
        guest.run("dd if=/dev/zero of=/mnt/small bs=64k count=20 conv=notrunc,fsync")
        guest.run("dd if=/dev/zero of=/dev/vdb bs=64k seek=50 count=10 conv=notrunc; sync")
        guest.run("dd if=/dev/urandom of=/dev/vdb bs=64k seek=25 count=3 conv=notrunc; sync")  # over the discarded
    else:
        guest.run("dd if=/dev/urandom of=/mnt/small bs=64k count=30 conv=notrunc,fsync")
        guest.run("dd if=/dev/urandom of=/dev/vdb bs=64k seek=55 count=2 conv=notrunc; sync")  # over the zeroed
    guest.run(f"echo {day} > /mnt/day; sync")


def count_changed(before: Path, after: Path) -> tuple[int, int]:
    """Return the bytes of the clusters that are not what they were: all of them, and those that are not zero."""
    found = data = 0
    with open(before, "rb") as one, open(after, "rb") as other:
        while new := other.read(CLUSTER):
            if one.read(CLUSTER) != new:
                found += CLUSTER
                data += CLUSTER if any(new) else 0
    return found, data


def test_the_chain_in_readme(lab: Libvirt, mount: Mounter, tmp_path: Path) -> None:
    with open_guest(lab, [Disk("vda", ext4=True, size=96 * MIB), Disk("vdb", size=16 * MIB)]) as guest:
        guest.run("mount -t ext4 /dev/vda /mnt; dd if=/dev/urandom of=/mnt/big bs=1M count=30")
        guest.run("dd if=/dev/urandom of=/mnt/small bs=64k count=40")
        guest.run("dd if=/dev/urandom of=/dev/vdb bs=1M count=8; sync")
        mounted = mount(guest, "umask=022")
        backup = guest.folder / "backup"
        truths = tmp_path / "truths"
        truths.mkdir()
        day = ""
        for command in commands():
            if made := re.search(r"mkdir \S+/(\w+)$", command):
                if day:
                    live(guest, mounted, day)
                day = made[1]
            if command.startswith("sed "):
                guest.destroy()
                shutil.chown(guest.folder / "new.qcow2", "nobody", "nogroup")
            run(command, guest, mounted, backup)
            if made:
                for disk in ("vda", "vdb"):
                    shutil.copyfile(mounted.path / f"raw/{disk}.raw", truths / f"{disk}.{day}.raw")
            elif re.search(r"^cp .*vda", command) or " mv " in command:
                other = command.replace("cp -r /mnt/web01/qcow2 /backup && ", "").replace("vda", "vdb")
                run(other, guest, mounted, backup)
                if day != DAYS[0]:
                    assert_small(mounted, backup, truths, DAYS[DAYS.index(day) - 1], day)
        assert day == DAYS[-1]
        for disk in ("vda", "vdb"):
            for name in DAYS:
                check(backup / f"{disk}.{name}.qcow2")
                restored = tmp_path / "restored.raw"
                qemu_img("convert", "-O", "raw", backup / f"{disk}.{name}.qcow2", restored)
                assert filecmp.cmp(restored, truths / f"{disk}.{name}.raw", shallow=False), (disk, name)
        assert filecmp.cmp(backup / "vda.raw", truths / "vda.thu.raw", shallow=False)
        chain = json.loads(qemu_img("info", "--backing-chain", "--output=json", backup / "vda.thu.qcow2"))
        assert [Path(one["filename"]).name for one in chain] == [f"vda.{name}.qcow2" for name in reversed(DAYS)]

        # The last command has started the guest from the chain.
        guest._connect()
        assert guest.run("mount -t ext4 /dev/vda /mnt && cat /mnt/day") == "wed"
        assert "new.qcow2" in lab.virsh("domblklist", guest.uuid)
        guest.run("umount /mnt")
        guest.destroy()
        subprocess.run(["umount", mounted.path], check=True)


def assert_small(mounted: Mounted, backup: Path, truths: Path, base: str, day: str) -> None:
    """An increment holds what was really changed, within two clusters for each run of it."""
    told = json.loads((mounted.path / f"checkpoints/{base}/vdb.extents.json").read_text())
    changed, data = count_changed(truths / f"vdb.{base}.raw", truths / f"vdb.{day}.raw")
    size = (backup / f"vdb.{day}.qcow2").stat().st_size
    # The header, the two tables of reference counts, L1 and L2 are in any file.
    assert data <= size <= changed + 2 * CLUSTER * len(told["extents"]) + 5 * CLUSTER


def run(command: str, guest: Guest, mounted: Mounted, backup: Path) -> None:
    """Run a command of README with the paths and names of here."""
    here = {
        "/images/vda.qcow2": str(guest.paths["vda"]),
        "/images/new.qcow2": str(guest.folder / "new.qcow2"),
        "/mnt/web01": str(mounted.path),
        "/backup": str(backup),
        "virsh ": f"virsh -c '{guest.libvirt.uri}' ",
        "web01": guest.name,
    }
    command = re.sub("|".join(map(re.escape, here)), lambda match: here[match[0]], command)
    done = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, env=mounted.env, check=False)
    if done.returncode:
        pytest.fail(f"{command}: {done.stderr}")
