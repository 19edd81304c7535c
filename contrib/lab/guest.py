# SPDX-License-Identifier: GPL-3.0-or-later
"""A small Linux guest that does what it is told.

    host   guest.run("dd …") ──"7 dd …"──► unix socket ─► virtio-serial ─► sh     guest
           output, status    ◄──"…\\1 7 0"──────────────────────────────────┘

It runs under TCG: nested KVM opens where it does not work, and a guest this small boots in three
seconds without.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import quoteattr

import libvirt

from lab.image import make_boot
from lab.libvirtd import Libvirt

MIB = 2**20
BOOT_SECONDS = 120.0
COMMAND_SECONDS = 120.0
MEMORY = 160  # MiB; enough for busybox, and quickly booted
AGENT_PORT = "org.qemu.guest_agent.0"

_names = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk to give a guest. `path`: an image, device, socket or medium that is there already."""

    target: str = "vda"
    size: int = 64 * MIB
    format: str = "qcow2"
    bus: str = "virtio"
    device: str = "disk"
    kind: str = "file"
    ext4: bool = False
    backed: bool = False  # the image is an overlay over a base that holds the contents
    read_only: bool = False
    path: Path | None = None
    options: str = ""  # of qemu-img create

    def xml(self, path: Path | None) -> str:
        attribute = "dev" if self.kind == "block" else "file"
        source = f"<source {attribute}={quoteattr(str(path))}/>" if path else ""
        if self.kind == "network":  # an NBD server on a unix socket
            source = f"<source protocol='nbd'><host transport='unix' socket={quoteattr(str(path))}/></source>"
        return (
            f"<disk type='{self.kind}' device='{self.device}'>"
            f"<driver name='qemu' type='{self.format}' discard='unmap'/>{source}"
            f"<target dev='{self.target}' bus='{self.bus}'/>{'<readonly/>' if self.read_only else ''}</disk>"
        )


class CommandFailed(Exception):
    """A command in the guest ended with another status than 0."""


@dataclass(eq=False)
class Guest:
    """A running guest. `paths` are the images by target.

    Told what to do by virsh, for the daemon may have been restarted under a connection; and by UUID, for the
    domain may have been renamed.
    """

    libvirt: Libvirt
    name: str
    uuid: str
    folder: Path
    paths: dict[str, Path]
    domain: libvirt.virDomain
    _socket: socket.socket | None = None
    _commands: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def start(self) -> None:
        """Boot it; return when it takes commands."""
        self.libvirt.virsh("start", self.uuid)
        self._connect()

    def _connect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(BOOT_SECONDS)
        self._socket.connect(str(self.folder / "shell"))
        # Sent before the guest listens, it waits in the socket.
        self.run("true", timeout=BOOT_SECONDS)

    def reboot_by(self, deed: Callable[[], object]) -> None:
        """Do what makes the guest boot anew within the same QEMU; return when it takes commands again."""
        question = "cat /proc/sys/kernel/random/boot_id"
        before = self.run(question)
        deed()
        deadline = time.monotonic() + BOOT_SECONDS
        while True:
            # On the same connection: without one, the old guest would power itself off. What was sent to the
            # guest that is no more is lost, so it is sent again.
            with contextlib.suppress(TimeoutError):
                if before not in self.run(question, timeout=5.0):
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} does not boot")

    def run(self, command: str, *, timeout: float = COMMAND_SECONDS) -> str:
        """Run a shell command of one line in the guest; return its output, raise CommandFailed."""
        assert self._socket is not None
        assert "\n" not in command
        number = next(self._commands)
        self._socket.settimeout(timeout)
        self._socket.sendall(f"{number} {command}\n".encode())
        answer = b""
        mark = b"\x01%d " % number
        while mark not in answer or not answer.endswith(b"\n"):
            chunk = self._socket.recv(65536)
            if not chunk:
                raise ConnectionError(f"{self.name} went away during: {command}")
            answer += chunk
        output, _, status = answer.rpartition(mark)
        text = output.decode(errors="replace")
        if int(status):
            raise CommandFailed(f"{command!r} in {self.name} ended with {int(status)}: {text}")
        return text.strip()

    def start_agent(self, *words: str) -> None:
        """Start the guest agent in a guest made with `agent=True`; return when libvirt sees it.

        *words* are qemu-ga's own.
        """
        self.run_agent(*words)
        self.wait_agent("connected")

    def run_agent(self, *words: str) -> None:
        """Start it, whatever libvirt sees of it: 9.0 sees nothing while a job runs."""
        # No udev names the port. The state folder is not on a disk: it is written while they are frozen.
        self.run(
            f"qemu-ga -d -m virtio-serial -p $(port {AGENT_PORT}) -t /run -f /run/qemu-ga.pid -l /run/qemu-ga.log "
            + " ".join(words)
        )

    def signal_agent(self, name: str) -> None:
        """Send the guest agent a signal, in the guest."""
        self.run(f"kill -{name} $(cat /run/qemu-ga.pid)")

    def kill_agent(self) -> None:
        """Kill the guest agent; return when it has let go of its port."""
        # Nobody reaps it there, so it stays as a zombie. One that was started while they were frozen has no pid file.
        self.run(
            "for p in $(pidof qemu-ga); do kill -KILL $p; "
            "while grep -q '^State:.[^Z]' /proc/$p/status; do usleep 10000; done; done; rm -f /run/qemu-ga.pid"
        )

    def wait_agent(self, wanted: str, timeout: float = 30.0) -> None:
        """Wait until libvirt says that the agent's channel is "connected" or "disconnected"."""
        deadline = time.monotonic() + timeout
        while f"name='{AGENT_PORT}' state='{wanted}'" not in self.libvirt.virsh("dumpxml", self.name):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the guest agent of {self.name} is not {wanted}")
            time.sleep(0.02)  # by polling, as for the state

    def start_writer(self, folder: str = "/mnt") -> None:
        """Begin to write to *folder* in the guest without end."""
        loop = (
            f"i=0; while :; do dd if=/dev/urandom of={folder}/w$((i%40)) bs=64k count=4 conv=fsync 2>/dev/null; "
            f"date +%s.$i > {folder}/last; sync; i=$((i+1)); done"
        )
        self.run(f"({loop}) & echo $! > /tmp/writer")

    def stop_writer(self) -> None:
        """End the writer, and have what it wrote written."""
        self.run("kill $(cat /tmp/writer); sync")

    def pause(self) -> None:
        self.libvirt.virsh("suspend", self.uuid)

    def resume(self) -> None:
        self.libvirt.virsh("resume", self.uuid)

    def destroy(self) -> None:
        """Pull the plug."""
        with contextlib.suppress(RuntimeError):
            self.libvirt.virsh("destroy", self.uuid)

    @property
    def state(self) -> str:
        """What virsh domstate says."""
        return self.libvirt.virsh("domstate", self.uuid)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int((self.libvirt.folder / f"run/libvirt/qemu/run/{self.name}.pid").read_text())

    def signal(self, number: signal.Signals) -> None:
        """Send QEMU a signal."""
        os.kill(self.pid, number)

    def copy_disk(self, target: str, to: Path) -> Path:
        """Copy a paused guest's disk with qemu-img: the truth that the tests compare with."""
        subprocess.run(
            ["qemu-img", "convert", "-U", "-O", "raw", str(self.paths[target]), str(to)],
            check=True,
            capture_output=True,
        )
        return to

    def wait_state(self, wanted: str, timeout: float = 30.0) -> None:
        """Wait until virsh says so."""
        deadline = time.monotonic() + timeout
        while self.state != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} is {self.state}, not {wanted}")
            time.sleep(0.05)  # by polling: what libvirt says is what is asked about


def make_image(disk: Disk, folder: Path) -> Path | None:
    """Make the image of *disk* in *folder*, or return the one that it names."""
    if disk.path is not None:
        return disk.path
    if disk.device != "disk":
        return None
    raw = folder / f"{disk.target}.img"
    with open(raw, "wb") as file:
        file.truncate(disk.size)
    if disk.ext4:
        _run("mke2fs", "-q", "-F", "-t", "ext4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", raw)
    path = raw
    if disk.format != "raw":
        path = folder / f"{disk.target}.{disk.format}"
        options = ("-o", disk.options) if disk.options else ()
        _run("qemu-img", "convert", "-O", disk.format, *options, raw, path)
        raw.unlink()
    if disk.backed:
        overlay = folder / f"{disk.target}.overlay.qcow2"
        _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", disk.format, overlay)
        path = overlay
    for image in folder.iterdir():
        shutil.chown(image, "nobody", "nogroup")
    return path


def _run(*words: str | Path) -> None:
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def domain_xml(
    name: str,
    identity: str,
    folder: Path,
    disks: Sequence[tuple[Disk, Path | None]],
    *,
    agent: bool,
    extra: str,
    memory: int = MEMORY,
) -> str:
    """Write the definition of a guest that boots from the lab's kernel."""
    drawn = "".join(disk.xml(path) for disk, path in disks)
    agent_xml = f"<channel type='unix'><target type='virtio' name='{AGENT_PORT}'/></channel>" if agent else ""
    return f"""<domain type='qemu'><name>{name}</name><uuid>{identity}</uuid>
<memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type>
<kernel>{folder}/vmlinuz</kernel><initrd>{folder}/initrd</initrd>
<cmdline>console=ttyS0 quiet panic=-1 mitigations=off</cmdline>{extra}</os>
<features><acpi/></features><on_reboot>restart</on_reboot>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<controller type='scsi' model='virtio-scsi'/><controller type='usb' model='none'/>
{drawn}
<serial type='file'><source path='{folder}/console'/></serial>
<channel type='unix'><source mode='bind' path='{folder}/shell'/>
<target type='virtio' name='org.backupfs.shell'/></channel>{agent_xml}
<memballoon model='none'/></devices></domain>"""


@contextlib.contextmanager
def open_guest(
    lab: Libvirt,
    disks: Sequence[Disk],
    *,
    agent: bool = False,
    extra: str = "",
    start: bool = True,
    memory: int = MEMORY,
) -> Iterator[Guest]:
    """Define and boot a guest with *disks*; destroy and undefine it on the way out.

    *extra* goes into `<os>` (an `<nvram>`, say); *memory* is in MiB.
    """
    name = f"guest{os.getpid()}-{next(_names)}"
    identity = str(uuid.uuid4())
    folder = lab.images / name
    folder.mkdir(mode=0o755)
    boot = make_boot()
    shutil.copy(boot.kernel, folder / "vmlinuz")
    shutil.copy(boot.initrd, folder / "initrd")
    paths = [(disk, make_image(disk, folder)) for disk in disks]
    for path in (folder, *folder.iterdir()):
        shutil.chown(path, "nobody", "nogroup")
    connection = lab.connect()
    guest = None
    try:
        xml = domain_xml(
            name, identity, folder, paths, agent=agent, extra=extra.replace("{folder}", str(folder)), memory=memory
        )
        domain = connection.defineXML(xml)
        guest = Guest(
            lab,
            name,
            identity,
            folder,
            {disk.target: path for disk, path in paths if path is not None},
            domain,
        )
        if start:
            guest.start()
        yield guest
    finally:
        if guest is not None and guest._socket is not None:
            guest._socket.close()
        for words in (("destroy", identity), ("undefine", identity, "--checkpoints-metadata", "--nvram")):
            with contextlib.suppress(RuntimeError):
                lab.virsh(*words)
        with contextlib.suppress(libvirt.libvirtError):
            connection.close()
        shutil.rmtree(folder, ignore_errors=True)
