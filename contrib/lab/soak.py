# SPDX-License-Identifier: GPL-3.0-or-later
"""What contrib/soak does: random work and random faults on one guest, each step checked.

    vda   4 KiB at every MiB carry a number, and random bytes lie between. The guest writes them in turn,
          each flushed before the next:   8 8 8 7 7 7 7 7   at one instant, whenever that is
          A copy of two instants shows:   8 8 6 6 7 7 7 7   a number that rises, or one that is two behind
    vdb   an ext4 that the guest writes to; a copy must be clean after its journal was replayed

Copies of one point must also be equal to one another, and to what nbdcopy reads from the job's own
socket, which knows nothing of backupfs.

A step that breaks something may cut readers off with an error; none may ever see a wrong byte, and
afterwards a new point must be whole. A step that breaks nothing must not fail.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lab import Disk, Guest, Libvirt, open_guest, open_libvirt

BACKUPFS: Final = Path(sys.executable).with_name("backupfs")
MIB: Final = 2**20
BLOCK: Final = 4096
BLOCKS: Final = 24  # one in each MiB
PATIENCE: Final = 200.0  # seconds until a point must be there again; libvirt needs most of it after a reset
OPTIONS: Final = "timeout=5,idle=20,debug"

GENERATIONS: Final = (
    f"i=0; g=$(dd if=/dev/vda bs={BLOCK} count=1 2>/dev/null | sed 's/^0*//'); g=${{g:-0}}; "
    f"while :; do while [ $i -lt {BLOCKS} ]; do printf '%0{BLOCK}d' $g | "
    f"dd of=/dev/vda bs={BLOCK} seek=$((i*{MIB // BLOCK})) conv=notrunc,fsync 2>/dev/null; i=$((i+1)); done; "
    "i=0; g=$((g+1)); done"
)
PORT: Final = (
    "for p in /sys/class/virtio-ports/*; do "
    '[ "$(cat $p/name)" = org.qemu.guest_agent.0 ] && qemu-ga -d -m virtio-serial -p /dev/${p##*/}; done; true'
)


class Wrong(Exception):
    """Something that must not be."""


def generations(image: bytes) -> list[int]:
    """Return the numbers in a copy of vda."""
    found = []
    for number in range(BLOCKS):
        block = image[number * MIB : number * MIB + BLOCK]
        if not block.isdigit() or len(block) < BLOCK:
            raise Wrong(f"block {number} of vda holds no number: {block[:20]!r} …")
        found.append(int(block))
    return found


def check_generations(found: Sequence[int]) -> None:
    """Raise Wrong unless the numbers are of one instant: none rises, and at most one step down by 1."""
    if any(later > earlier for earlier, later in itertools.pairwise(found)) or found[0] - found[-1] > 1:
        raise Wrong(f"vda is a mix of instants: {found}")


@dataclass(eq=False)
class Soak:
    """The guest, the mount of now, and what was seen so far."""

    lab: Libvirt
    guest: Guest
    folder: Path
    chance: random.Random
    process: subprocess.Popen[bytes] | None = None
    mounts: int = 0
    seen: Counter[str] = field(default_factory=Counter)

    # --- the mount ---------------------------------------------------------------------------

    @property
    def point(self) -> Path:
        return self.folder / "mnt"

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, **self.lab.env, "STATE_DIRECTORY": str(self.folder / "state")}

    def mount(self) -> None:
        self.mounts += 1
        self.point.mkdir(exist_ok=True)
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [BACKUPFS, "-f", "-o", f"uri={self.lab.uri},{OPTIONS}", self.guest.name, self.point],
                env=self.env,
                stderr=log,
            )
        self.wait(lambda: os.path.ismount(self.point), 60, "no mount")
        self.seen["mounts"] += 1

    def unmount(self) -> None:
        assert self.process is not None
        subprocess.run(["umount", self.point], check=True)
        if (status := self.process.wait(PATIENCE)) != 0:
            raise Wrong(f"backupfs ended with status {status}")
        self.check_nothing_left()

    def release(self) -> None:
        """End the point; EIO where it does not end."""
        done = subprocess.run([BACKUPFS, "release", self.point], env=self.env, check=False, capture_output=True)
        if done.returncode:
            raise OSError(errno.EIO, f"release: {done.stderr.decode().strip()}")

    def wait(self, true: Callable[[], object], seconds: float, why: str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            if self.process is not None and self.process.poll() is not None:
                raise Wrong(f"{why}: backupfs ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise Wrong(f"{why} within {seconds:g} s")
            time.sleep(0.05)  # by polling: another process's doing

    def status(self) -> dict[str, object]:
        found = json.loads((self.point / ".backupfs/status.json").read_text())
        assert isinstance(found, dict)
        return found

    # --- what is read ------------------------------------------------------------------------

    def copies(self) -> dict[str, Callable[[str, Path], list[str]]]:
        """Return the ways to copy a disk that this mount has: a command that writes a raw image."""
        raw, forms = self.point / "raw", os.listdir(self.point)
        ways: dict[str, Callable[[str, Path], list[str]]] = {
            "cp": lambda disk, to: ["cp", "--sparse=always", f"{raw}/{disk}.raw", str(to)],
            "cat": lambda disk, to: ["sh", "-c", 'cat "$0" > "$1"', f"{raw}/{disk}.raw", str(to)],
            "dd": lambda disk, to: [
                "dd", f"if={raw}/{disk}.raw", f"of={to}", "bs=1M", "iflag=direct", "status=none",
            ],
            "qemu-img": lambda disk, to: [
                "qemu-img", "convert", "-f", "raw", "-O", "raw", f"{raw}/{disk}.raw", str(to),
            ],
            "rsync": lambda disk, to: ["rsync", "-S", f"{raw}/{disk}.raw", str(to)],
        }  # fmt: skip
        if "qcow2" in forms:
            ways["qcow2"] = lambda disk, to: [
                "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", f"{self.point}/qcow2/{disk}.qcow2", str(to),
            ]  # fmt: skip
        if "chunks" in forms:
            ways["chunks"] = lambda disk, to: [
                "sh", "-c", 'cat $(find "$0" -type f | sort) > "$1"', f"{self.point}/chunks/{disk}", str(to),
            ]  # fmt: skip
        return ways

    def copy(self, disk: str, way: str, name: str) -> Path:
        to = self.folder / name
        to.unlink(missing_ok=True)
        done = subprocess.run(self.copies()[way](disk, to), capture_output=True, text=True, check=False, timeout=120)
        if done.returncode:
            raise OSError(errno.EIO, f"{way} of {disk}: {done.stderr.strip()[-300:]}")
        return to

    def check_copy(self, disk: str, path: Path) -> bytes:
        data = path.read_bytes()
        if disk == "vda":
            check_generations(generations(data))
        else:
            replayed = subprocess.run(["e2fsck", "-fp", path], capture_output=True, text=True, check=False)
            checked = subprocess.run(["e2fsck", "-fn", path], capture_output=True, text=True, check=False)
            if replayed.returncode > 1 or checked.returncode:
                raise Wrong(f"the copy of vdb is damaged: {replayed.stdout}{checked.stdout}")
        self.seen["copies"] += 1
        self.seen["MiB"] += len(data) // MIB
        return data

    @contextlib.contextmanager
    def reader(self) -> Iterator[None]:
        """Copy vda while something happens; what was copied whole must be of one instant."""
        to = self.folder / "background"
        to.unlink(missing_ok=True)
        way = self.chance.choice(sorted(self.copies()))
        command = self.copies()[way]("vda", to)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                time.sleep(self.chance.random() * 0.3)  # chance is what is wanted
                yield
                try:
                    status = process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    raise Wrong(f"{way} neither ends nor fails for {PATIENCE:g} s") from None
            finally:
                process.kill()
        if status:
            self.seen["readers cut off"] += 1
        else:
            self.check_copy("vda", to)

    # --- after each step ---------------------------------------------------------------------

    def check_guest(self) -> None:
        if (state := self.guest.state) != "running":
            raise Wrong(f"the guest is {state}")
        if self.guest.run("echo alive") != "alive":
            raise Wrong("the guest does not answer")

    def recover(self) -> None:
        """See that a new point can be had and is whole."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.release()
                self.check_copy("vda", self.copy("vda", "cp", "again"))
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise Wrong(f"no new point within {PATIENCE:g} s: {error}") from error
                time.sleep(0.2)  # libvirt or QEMU is still coming back

    def check_nothing_left(self) -> None:
        left = [str(path) for path in self.lab.folder.rglob("*backupfs-*")]
        if left:
            raise Wrong(f"left behind: {left}")

    def write(self) -> None:
        """Have the guest write, from its boot on."""
        self.guest.run("mount -t ext4 /dev/vdb /mnt")
        self.guest.start_writer()
        self.guest.run(f"({GENERATIONS}) & true")
        self.guest.run(PORT)

    # --- the steps ---------------------------------------------------------------------------

    def step_copy_twice(self) -> None:
        """Two copies of one point, by two tools, are equal, and equal to nbdcopy's."""
        disk = self.chance.choice(["vda", "vdb"])
        ways = self.chance.sample(sorted(self.copies()), 2)
        first = self.copy(disk, ways[0], "first").read_bytes()
        Path("/proc/sys/vm/drop_caches").write_text("1")
        second = self.copy(disk, ways[1], "second")
        if first != second.read_bytes():
            raise Wrong(f"{disk}: {ways[0]} and {ways[1]} differ")
        truth = self.folder / "nbdcopy"
        source = f"nbd+unix:///{disk}?socket={self.status()['socket']}"
        subprocess.run(["nbdcopy", source, truth], check=True, capture_output=True)
        if truth.read_bytes() != first:
            raise Wrong(f"{disk}: {ways[0]} and nbdcopy differ")
        self.check_copy(disk, second)

    def step_random_reads(self) -> None:
        """Bytes from anywhere are those of the copy."""
        whole = self.copy("vda", "dd", "whole").read_bytes()
        with open(self.point / "raw/vda.raw", "rb") as file:
            for _ in range(50):
                offset = self.chance.randrange(len(whole))
                length = self.chance.choice([1, 512, 4096, 70000, 3 * MIB])
                if os.pread(file.fileno(), length, offset) != whole[offset : offset + length]:
                    raise Wrong(f"vda: {length} bytes at {offset} differ from the copy")
        check_generations(generations(whole))

    def step_next_point(self) -> None:
        """A released point ends, and the next one is of a later instant."""
        before = os.stat(self.point / "raw/vda.raw").st_mtime
        self.release()
        if os.stat(self.point / "raw/vda.raw").st_mtime <= before:
            raise Wrong("the next point is not later")
        self.check_copy("vdb", self.copy("vdb", "cp", "next"))
        self.seen["points"] += 1

    def step_remount(self) -> None:
        self.unmount()
        self.mount()

    def step_checkpoint_of_others(self) -> None:
        name = f"c{self.mounts}-{self.seen['steps']}"
        with self.reader():
            self.lab.virsh("checkpoint-create-as", self.guest.name, name)
        self.lab.virsh("checkpoint-delete", self.guest.name, name)

    def step_freeze_by_others(self) -> None:
        # After a reset libvirt may not know of the agent again yet; then the freeze is refused, or undone.
        with contextlib.suppress(RuntimeError):
            self.lab.virsh("domfsfreeze", self.guest.name)
        try:
            self.release()
            with self.reader():
                pass
        finally:
            with contextlib.suppress(RuntimeError):
                self.lab.virsh("domfsthaw", self.guest.name)

    def fault_kill_mount(self) -> None:
        assert self.process is not None
        with self.reader():
            self.process.kill()
            self.process.wait()
        try:
            os.listdir(self.point)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise Wrong(f"a dead mount answers {error!r}") from error
        else:
            raise Wrong("a dead mount can be listed")
        self.check_guest()
        subprocess.run(["umount", self.point], check=True)
        self.mount()

    def fault_stop_mount(self) -> None:
        assert self.process is not None
        with self.reader():
            self.process.send_signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.2, 3))  # the time is the fault
            self.process.send_signal(signal.SIGCONT)

    def fault_stop_qemu(self) -> None:
        with self.reader():
            self.guest.signal(signal.SIGSTOP)
            time.sleep(self.chance.uniform(0.2, 8))  # as above; some are longer than timeout=
            self.guest.signal(signal.SIGCONT)

    def fault_kill_libvirtd(self) -> None:
        # Not while a backup begins: libvirt 9.0 then keeps a job that only a restart of the guest ends.
        os.listdir(self.point / "raw")
        with self.reader():
            self.lab.kill()
            time.sleep(self.chance.uniform(0, 3))  # as above
            self.lab.start()

    def fault_abort_job(self) -> None:
        with self.reader(), contextlib.suppress(RuntimeError):  # there may be none
            self.lab.virsh("domjobabort", self.guest.name)

    def fault_release_under_reader(self) -> None:
        with self.reader():
            self.release()

    def fault_reset_guest(self) -> None:
        with self.reader():
            self.guest.reboot_by(lambda: self.lab.virsh("reset", self.guest.name))
        self.write()

    def fault_destroy_guest(self) -> None:
        with self.reader():
            self.guest.destroy()
        self.guest.wait_state("shut off")
        self.guest.start()
        self.write()


def steps_of(soak: Soak) -> list[tuple[str, Callable[[], None]]]:
    names = [name for name in dir(Soak) if name.startswith(("step_", "fault_"))]
    return [(name, getattr(soak, name)) for name in names]


def run(soak: Soak, seconds: float, most: int | None) -> None:
    begun = time.monotonic()
    steps = steps_of(soak)
    while time.monotonic() - begun < seconds and (most is None or soak.seen["steps"] < most):
        name, step = soak.chance.choice(steps)
        soak.seen["steps"] += 1
        at = time.monotonic()
        print(f"{soak.seen['steps']:5} {name:28}", end="", flush=True)
        step()
        if name.startswith("fault_"):
            soak.recover()
        soak.check_guest()
        soak.seen[name] += 1
        print(f"{time.monotonic() - at:6.1f} s", flush=True)
    soak.unmount()
    # The guest's own file system, at rest.
    soak.guest.stop_writer()
    soak.guest.run("umount /mnt")
    soak.guest.pause()
    soak.check_copy("vdb", soak.guest.copy_disk("vdb", soak.folder / "last"))
    soak.guest.resume()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="contrib/soak")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="no more than so many")
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"contrib/soak: seed {parsed.seed}, {parsed.minutes:g} minutes", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="bfsoak", dir="/tmp"))
    folder.chmod(0o755)
    begun = time.monotonic()
    soak: Soak | None = None
    wrong = ""
    try:
        disks = [Disk("vda", size=(BLOCKS + 1) * MIB), Disk("vdb", ext4=True, size=64 * MIB)]
        with open_libvirt(folder / "lab") as lab, open_guest(lab, disks, agent=True) as guest:
            soak = Soak(lab, guest, folder, random.Random(parsed.seed))
            try:
                guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count={BLOCKS} 2>/dev/null")
                guest.run(f"for i in $(seq 0 {BLOCKS - 1}); do printf '%0{BLOCK}d' 0 | dd of=/dev/vda bs={BLOCK} "
                          f"seek=$((i*{MIB // BLOCK})) conv=notrunc 2>/dev/null; done; sync")  # fmt: skip
                soak.write()
                soak.mount()
                run(soak, parsed.minutes * 60, parsed.steps)
            finally:
                take_away(soak)
    except KeyboardInterrupt:
        wrong = "interrupted"
    except (Wrong, OSError, RuntimeError, subprocess.SubprocessError) as error:
        wrong = f"{type(error).__name__}: {error}"
    finally:
        if wrong and wrong != "interrupted" and (folder / "log").exists():
            print("\nthe last lines of the log:", *(folder / "log").read_text().splitlines()[-30:], sep="\n  ")
        shutil.rmtree(folder, ignore_errors=True)
    seen = soak.seen if soak is not None else Counter[str]()
    told = ", ".join(f"{seen[name]} {name}" for name in ("steps", "mounts", "copies", "MiB", "readers cut off"))
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(seen.items()) if "_" in name)
    print(f"\n{kinds}\ncontrib/soak: seed {parsed.seed}, {time.monotonic() - begun:.0f} s: {told}: "
          f"{wrong or 'every byte was of its instant'}")  # fmt: skip
    return 130 if wrong == "interrupted" else bool(wrong)


def take_away(soak: Soak) -> None:
    """Leave no mount and no process, whatever went wrong."""
    if soak.process is not None and soak.process.poll() is None:
        soak.process.send_signal(signal.SIGCONT)
        soak.process.terminate()
        try:
            soak.process.wait(30)
        except subprocess.TimeoutExpired:
            soak.process.kill()
            soak.process.wait()
    if os.path.ismount(soak.point) or _is_dead(soak.point):
        subprocess.run(["umount", "-l", soak.point], check=False)


def _is_dead(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
