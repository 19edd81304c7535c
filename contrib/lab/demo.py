# SPDX-License-Identifier: GPL-3.0-or-later
"""What contrib/demo shows."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from lab import Disk, Guest, Libvirt, open_guest, open_libvirt

BACKUPFS = Path(sys.executable).with_name("backupfs")


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def show(*words: str | Path, env: dict[str, str] | None = None, check: bool = True) -> int:
    """Run a command as a user would, and show it."""
    print("$ " + shlex.join(str(word) for word in words), flush=True)
    status = subprocess.run([str(word) for word in words], env=env, check=False).returncode
    if check and status:
        raise SystemExit(f"contrib/demo: that ended with status {status}")
    return status


@contextlib.contextmanager
def mounted(lab: Libvirt, guest: Guest, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    point = folder / "mnt"
    point.mkdir()
    env = {**os.environ, **lab.env, "STATE_DIRECTORY": str(folder / "state")}
    env["PATH"] = f"{BACKUPFS.parent}:{env['PATH']}"
    try:
        show("backupfs", "-o", f"uri={lab.uri}", guest.name, point, env=env)
        yield point, env
    finally:
        # Without a word: whoever reads our output may have gone, which must not keep it mounted.
        if os.path.ismount(point):
            subprocess.run(["umount", point], check=False)


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    begun = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="bfdemo", dir="/tmp"))
    folder.chmod(0o755)
    try:
        with (
            open_libvirt(folder / "lab") as lab,
            booted(lab) as guest,
            mounted(lab, guest, folder) as (point, env),
        ):
            demonstrate(guest, point, env, folder)
            if "--keep" in arguments:
                keep(guest, point)
            say("Unmount: the backup job ends, nothing is left")
            show("umount", point)
            check_nothing_left(lab, guest, folder)
        say(f"Done, in {time.monotonic() - begun:.0f} s")
    except KeyboardInterrupt:
        print("\ncontrib/demo: interrupted; everything was cleaned up", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nobody reads on (`contrib/demo | head`); Python would say so once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", folder], check=False)
    return 0


@contextlib.contextmanager
def booted(lab: Libvirt) -> Iterator[Guest]:
    say("A throw-away libvirt, and a small Linux guest that keeps writing to its ext4")
    with open_guest(lab, [Disk("vda", ext4=True, size=256 * 2**20)]) as guest:
        print(guest.run("mount -t ext4 /dev/vda /mnt && uname -sr"))
        guest.start_writer()
        guest.run("until [ -s /mnt/last ]; do usleep 10000; done")
        yield guest


def demonstrate(guest: Guest, point: Path, env: dict[str, str], folder: Path) -> None:
    say("Mounted: the first look inside raw/ begins the point in time")
    show("findmnt", point)
    show("ls", "-lR", point)

    say("Copy the disk twice with plain cp, while the guest writes")
    first, second = folder / "first.raw", folder / "second.raw"
    show("cp", "--sparse=always", point / "raw/vda.raw", first)
    before = guest.run("cat /mnt/last")
    guest.run(f"until [ $(cat /mnt/last) != {before} ]; do usleep 10000; done")
    # Past the page cache, so that the second copy really asks QEMU again.
    Path("/proc/sys/vm/drop_caches").write_text("1")
    show("cp", "--sparse=always", point / "raw/vda.raw", second)
    show("cmp", first, second)
    print("both copies are equal")

    say("The copy is a whole file system, of one instant")
    show("e2fsck", "-fp", first, check=False)
    show("e2fsck", "-fn", first)

    say("The same instant as a qcow2 file, of what is allocated alone")
    show("cp", point / "qcow2/vda.qcow2", folder / "copy.qcow2")
    show("qemu-img", "check", folder / "copy.qcow2")

    say("The guest's disk has moved on meanwhile")
    guest.pause()
    now = guest.copy_disk("vda", folder / "now.raw")
    status = show("cmp", "-s", second, now, check=False)
    guest.resume()
    if status == 0:
        raise SystemExit("contrib/demo: the guest's disk did not change; that should not be")
    print("it differs from the copy by now")
    show("backupfs", "status", point, env=env)


def keep(guest: Guest, point: Path) -> None:
    say("Left mounted. Look at it from another terminal:")
    print(f"  ls -l {point}/raw\n  {BACKUPFS} status {point}\n  {BACKUPFS} release {point}")
    print(f"  virsh -c '{guest.libvirt.uri}' list")
    print("Stop with Ctrl-C here; everything is cleaned up then.", flush=True)
    signal.pause()


def check_nothing_left(lab: Libvirt, guest: Guest, folder: Path) -> None:
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-f", f"backupfs[ .].*{folder}"], capture_output=True, check=False).returncode == 0:
        if time.monotonic() > deadline:
            raise SystemExit("contrib/demo: a process of the mount is still there")
        time.sleep(0.05)
    job = subprocess.run(
        ["virsh", "-c", lab.uri, "backup-dumpxml", guest.name], capture_output=True, text=True, check=False
    )
    left = [path for path in folder.rglob("*backupfs-*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]
    for what, found in (("job", job.returncode == 0), ("socket or scratch file", left), ("mount", mounts)):
        if found:
            raise SystemExit(f"contrib/demo: a {what} is left: {found}")
    print("no job, no socket, no scratch file, no process, no mount is left")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
