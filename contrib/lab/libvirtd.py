# SPDX-License-Identifier: GPL-3.0-or-later
"""A libvirtd of one's own.

It runs as `nobody` with its own HOME and XDG folders, which makes it a session daemon: no
AppArmor, no chown, no state outside its folder, and as many of them side by side as one likes.
It differs from the system's in the URI (`…:///session`) and in QEMU running as the daemon's user.
Clients may be root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket as sockets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import libvirt

USER = "nobody"
START_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    # Else a test run that is killed would leave the daemon, and the daemon its guests.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _listens(path: Path) -> bool:
    # That the socket is there is not enough: on a busy machine it may be bound and not listen yet.
    with sockets.socket(sockets.AF_UNIX) as trying:
        return trying.connect_ex(str(path)) == 0


@dataclass(eq=False)
class Libvirt:
    """A running libvirtd. `uri` reaches it, `env` is what a client's environment must hold."""

    folder: Path
    env: dict[str, str]
    socket: Path
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def uri(self) -> str:
        return f"qemu+unix:///session?socket={self.socket}"

    @property
    def images(self) -> Path:
        """Where the guests' disks lie."""
        return self.folder / "images"

    def connect(self) -> libvirt.virConnect:
        """Open a connection; the caller closes it."""
        return libvirt.open(self.uri)

    def virsh(self, *words: str) -> str:
        """Run virsh on it; return what it printed."""
        done = subprocess.run(["virsh", "-q", "-c", self.uri, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    @property
    def pid(self) -> int:
        """The daemon's process."""
        return self._daemons[-1].pid

    def kill(self) -> None:
        """Kill the daemon as a crash would; the guests run on."""
        daemon = self._daemons[-1]
        daemon.kill()
        daemon.wait()

    def start(self) -> None:
        """Start the daemon; return when it answers."""
        if not self._daemons:
            self._spawn("virtlogd", self.folder / "run/libvirt/virtlogd-sock")
        self._spawn("libvirtd", self.socket)
        libvirt.open(self.uri).close()

    def _spawn(self, program: str, socket: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            socket.unlink()
        path = shutil.which(program) or f"/usr/sbin/{program}"
        with open(self.folder / f"{program}.log", "ab") as log:
            daemon = subprocess.Popen(
                [path],
                env={**os.environ, **self.env},
                user=USER,
                group="nogroup",
                extra_groups=[],
                umask=0o022,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._daemons.append(daemon)
        deadline = time.monotonic() + START_SECONDS
        while not _listens(socket):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{program} did not start: {(self.folder / f'{program}.log').read_text()}")
            time.sleep(0.01)  # the daemon is not ours to be told by, and inotify is not in the standard library

    def _stop(self) -> None:
        # A killed daemon is started once more: only it knows the guests that are left.
        if self._daemons and self._daemons[-1].poll() is not None:
            with contextlib.suppress(RuntimeError, libvirt.libvirtError):
                self.start()
        with contextlib.suppress(libvirt.libvirtError):
            connection = self.connect()
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                with contextlib.suppress(libvirt.libvirtError):
                    domain.destroy()
            connection.close()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_left_over_guests()

    def _kill_left_over_guests(self) -> None:
        """Kill QEMUs of this folder that libvirtd did not end (SIGSTOPped ones, say)."""
        for pidfile in (self.folder / "run/libvirt/qemu/run").glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                pid = int(pidfile.read_text())
                if str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def open_libvirt(folder: Path) -> Iterator[Libvirt]:
    """Start a libvirtd in *folder*, which must be new; end it and all its guests on the way out.

    The folder's path must be short (sockets lie in it) and open to others (QEMU is `nobody`).
    """
    folder.mkdir(mode=0o755)
    folders = {name: folder / name for name in ("home", "run", "config", "cache", "data", "images")}
    for path in folders.values():
        path.mkdir(mode=0o755)
    shared_cache = Path("/var/tmp/backupfs-lab-cache")  # QEMU's first probe costs a second or more
    shared_cache.mkdir(mode=0o755, exist_ok=True)
    for path in (folder, *folders.values(), shared_cache):
        shutil.chown(path, USER, "nogroup")
    folders["run"].chmod(0o700)
    env = {
        "HOME": str(folders["home"]),
        "XDG_RUNTIME_DIR": str(folders["run"]),
        "XDG_CONFIG_HOME": str(folders["config"]),
        "XDG_CACHE_HOME": str(shared_cache),
        "XDG_DATA_HOME": str(folders["data"]),
    }
    found = Libvirt(folder, env, folders["run"] / "libvirt/libvirt-sock")
    try:
        found.start()
        yield found
    finally:
        found._stop()
        shutil.rmtree(folder, ignore_errors=True)
