# SPDX-License-Identifier: GPL-3.0-or-later
"""The other side: what the guest feels of it, by its own fio, beside nbdcopy from a plain backup.

    guest    fio: 4 KiB random reads and writes, one at a time ──► IOPS, median and 99th percentile
    host     nothing │ a point held │ ... copied at full speed │ ... with rate= │ virsh + nbdcopy

The guest's processor is emulated here, so what it loses to a copy it mostly loses for want of
the host's two cores; with hardware virtualisation it is less. What the figures show is whether
backupfs costs the guest more than nbdcopy does, and whether rate= gives it back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lab import Guest

from tests.bench import meters
from tests.bench.figures import Figure
from tests.bench.images import GIB, make_dense, make_tools_disk
from tests.bench.rivals import open_backupfs, uri, wait_until
from tests.bench.stage import Bench, Groups, Stage

RATE: Final = "32M"  # bytes a second, as the option is written
MEMORY: Final = 512  # MiB: fio comes with the libraries of every storage that it knows
TOOLS: Final = "vdb"  # the disk with fio on it; named as the guest names its second
KINDS: Final = (("IOPS", "1/s"), ("latency, median", "ms"), ("latency, 99 %", "ms"))


@contextlib.contextmanager
def _again_and_again(command: str) -> Iterator[None]:
    """Run a shell command over and over beside what is measured."""
    process = subprocess.Popen(
        ["sh", "-c", f"while {command}; do :; done"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
        if process.poll() is not None:
            raise RuntimeError(f"it was to be copied meanwhile, but this ended: {command}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(eq=False)
class GuestSide:
    """The stage: a guest at work, and each of the things that can be done to it."""

    folder: Path
    guest: Guest
    seconds: float
    found: dict[str, dict[str, float]] = field(default_factory=dict)  # by state; what was not told yet

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def held(self, options: str = "", *, copied: bool = False) -> Iterator[None]:
        """Hold a point of backupfs; *copied*: and read it without end, past the page cache."""
        words = ",".join(word for word in ("disks=vda", "idle=0", options) if word)
        with open_backupfs(self.folder, self.guest, words) as ours:
            image = ours.image()
            image.stat()
            with _again_and_again(f"dd if={image} bs=1M iflag=direct") if copied else contextlib.nullcontext():
                yield

    @contextlib.contextmanager
    def plain(self, *, copied: bool = False) -> Iterator[None]:
        """Hold a pull backup made with virsh; *copied*: and read it with nbdcopy without end."""
        virsh, name = self.guest.libvirt.virsh, self.guest.name
        socket, scratch = self.guest.folder / "plain.sock", self.guest.folder / "plain.scratch"
        definition = self.folder / "backup.xml"
        definition.write_text(
            f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
            f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
            f"<disk name='{TOOLS}' backup='no'/></disks></domainbackup>"
        )
        virsh("backup-begin", name, str(definition))
        try:
            copying = _again_and_again(f"nbdcopy -- '{uri(str(socket), 'vda')}' null:")
            with copying if copied else contextlib.nullcontext():
                yield
        finally:
            virsh("domjobabort", name)
            _wait_for_end(self.guest)

    def fio(self) -> dict[str, float]:
        """Run the guest's own fio for a while; return its figures."""
        text = self.guest.run(
            "cd /tools && LD_LIBRARY_PATH=/tools ./ld-linux-x86-64.so.2 ./fio --name=g --filename=/dev/vda --rw=randrw"
            f" --bs=4k --direct=1 --ioengine=psync --time_based --runtime={self.seconds:g} --ramp_time=1"
            " --randrepeat=0 --group_reporting --output-format=json"
        )
        job = meters.parse_fio(text)["jobs"][0]
        return {
            "IOPS": job["read"]["iops"] + job["write"]["iops"],
            "latency, median": _percentile(job["write"], "50.000000"),
            "latency, 99 %": _percentile(job["write"], "99.000000"),
        }

    def figures(self) -> list[Figure]:
        states: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
            "nothing": self.alone,
            "backupfs held": self.held,
            "backupfs copied": lambda: self.held(copied=True),
            f"backupfs copied, rate={RATE}": lambda: self.held(f"rate={RATE}", copied=True),
            "virsh held": self.plain,
            "virsh, nbdcopy": lambda: self.plain(copied=True),
        }

        def bound(who: str, kind: str) -> Callable[[], float]:
            def how() -> float:
                # One run is for all kinds, and it is not known which of them is asked for first.
                if kind not in self.found.get(who, {}):
                    with states[who]():
                        self.found[who] = self.fio()
                return self.found[who].pop(kind)

            return how

        return [Figure(f"guest, {kind}", who, unit, bound(who, kind)) for kind, unit in KINDS for who in states]


def _percentile(side: Mapping[str, Any], name: str) -> float:
    return float(side["clat_ns"]["percentile"][name]) / 1e6


def _wait_for_end(guest: Guest) -> None:
    def ended() -> bool:
        try:
            guest.libvirt.virsh("backup-dumpxml", guest.name)
        except RuntimeError:
            return True
        return False

    wait_until(ended, what="the end of virsh's backup")


@contextlib.contextmanager
def open_guestside(bench: Bench) -> Iterator[Groups]:
    images = {
        "vda": make_dense(bench.folder / "vda.qcow2", bench.scaled(GIB)),
        TOOLS: make_tools_disk(bench.folder / "tools.qcow2", ["fio"]),
    }
    with bench.guest(images, awake=True, memory=MEMORY) as guest:
        guest.run(f"mkdir /tools && mount -t ext4 -o ro /dev/{TOOLS} /tools")
        side = GuestSide(bench.folder, guest, 2 if bench.quick else 4)
        side.fio()  # once unmeasured: fio itself is read into the guest's memory
        yield {"guest": side.figures}


STAGES: Final = (Stage(("guest",), open_guestside),)
