# SPDX-License-Identifier: GPL-3.0-or-later
"""The guests' kernel and initramfs, made from Debian's packages and kept in a cache.

Nothing is installed: the kernel and the guest agent are downloaded with apt-get and unpacked.
The cache is `.cache/lab` in the checkout, or $BACKUPFS_LAB_CACHE.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = (
    "virtio_pci", "virtio_blk", "virtio_console", "virtio_scsi", "sd_mod", "ahci", "ext4",
)  # fmt: skip
PROGRAMS = ("/usr/sbin/fstrim", "/usr/sbin/blkdiscard")

# The shell on the serial port: "ID COMMAND" in, the output and "\1ID STATUS" out.
INIT = r"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt /run /etc /var/run
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
ln -s /proc/mounts /etc/mtab
while read -r module; do insmod "/modules/$module"; done < /modules/order
port() { for p in /sys/class/virtio-ports/*; do
    [ "$(cat $p/name 2>/dev/null)" = "$1" ] && echo "/dev/${p##*/}" && return; done; return 1; }
until shell=$(port org.backupfs.shell); do usleep 20000; done
exec 3<>"$shell"
while read -r id command <&3; do
    (eval "$command") 3>&- </dev/null >/tmp/out 2>&1
    status=$?
    { cat /tmp/out; printf '\001%s %s\n' "$id" "$status"; } >&3
done
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Boot:
    """What a guest boots from."""

    kernel: Path
    initrd: Path


def cache_folder() -> Path:
    """Return where the downloads and the initramfs are kept."""
    return Path(os.environ.get("BACKUPFS_LAB_CACHE") or Path(__file__).parents[2] / ".cache/lab")


def make_boot() -> Boot:
    """Return the kernel and the initramfs; make them if they are not in the cache yet."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    recipe = hashlib.sha256("\0".join((INIT, *MODULES, *PROGRAMS, "1")).encode()).hexdigest()[:12]
    boot = Boot(cache / f"vmlinuz-{recipe}", cache / f"initrd-{recipe}.gz")
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (boot.kernel.exists() and boot.initrd.exists()):
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _make(Path(scratch), boot)
    return boot


def unpack_packages(packages: Sequence[str]) -> Path:
    """Return a folder with the contents of the distribution's *packages*, from the cache or downloaded."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"unpacked-{hashlib.sha256(' '.join(packages).encode()).hexdigest()[:12]}"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                unpacked = Path(scratch, "unpacked")
                _unpack(packages, Path(scratch), unpacked)
                unpacked.rename(folder)
    return folder


def _unpack(packages: Sequence[str], scratch: Path, to: Path) -> None:
    # apt's own sandbox user cannot write here, and says so at length.
    subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages],
        cwd=scratch,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for package in scratch.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(to)], check=True)


def _make(scratch: Path, boot: Boot) -> None:
    unpacked = scratch / "unpacked"
    depends = _output("apt-cache", "depends", "linux-image-cloud-amd64")
    kernel = re.search(r"Depends: (linux-image-[0-9]\S+)", depends)
    if kernel is None:
        raise RuntimeError("apt knows no linux-image-cloud-amd64: run `apt-get update`")
    _unpack([kernel[1], "qemu-guest-agent"], scratch, unpacked)
    root = scratch / "root"
    for folder in ("bin", "modules", "usr/sbin", "lib64"):
        (root / folder).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    modules = next(unpacked.glob("lib/modules/*"))
    subprocess.run(["depmod", "-b", str(unpacked), modules.name], check=True)
    order = _module_order(modules)
    (root / "modules/order").write_text("".join(f"{Path(name).name}\n" for name in order))
    for name in order:
        shutil.copy(modules / name, root / "modules")
    shutil.copy(unpacked / "usr/sbin/qemu-ga", root / "usr/sbin/qemu-ga")
    _copy_libraries(unpacked / "usr/sbin/qemu-ga", root)
    for program in PROGRAMS:
        shutil.copy(program, root / "usr/sbin")
        _copy_libraries(Path(program), root)
    listing = subprocess.run(["find", "."], cwd=root, check=True, capture_output=True).stdout
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], cwd=root, input=listing, check=True, capture_output=True
    ).stdout
    fresh = boot.initrd.with_suffix(".new")
    fresh.write_bytes(gzip.compress(archive, 1))
    shutil.copy(next(unpacked.glob("boot/vmlinuz-*")), boot.kernel)
    fresh.replace(boot.initrd)


def _module_order(modules: Path) -> list[str]:
    """Return the modules' files, each after those that it needs; built-in ones are left out."""
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        needs[name] = others.split()
    files = {Path(name).name.split(".")[0].replace("-", "_"): name for name in needs}
    order: list[str] = []
    for module in MODULES:
        if module in files:
            # modules.dep lists the farthest need last.
            for name in (*reversed(needs[files[module]]), files[module]):
                if name not in order:
                    order.append(name)
    return order


def _copy_libraries(program: Path, root: Path) -> None:
    for match in re.finditer(r"(?:=> )?(/\S+) \(0x", _output("ldd", str(program))):
        library = Path(match[1])
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            shutil.copy(library.resolve(), target)


def _output(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
