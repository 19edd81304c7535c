# SPDX-License-Identifier: GPL-3.0-or-later
"""What README's Security promises: who can look, what is not shown, and that no name does more than name."""

from __future__ import annotations

import errno
import os
import pwd
import re
import shutil
import stat
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from backupfs import domainxml, launch

from ..faults import Fault
from .conftest import COMMAND, MIB, Mounted, Mounter

Faults = Callable[..., Fault]
STRANGER = "daemon"  # neither who mounts nor QEMU
SECRETS = ("s3cr3tvn", "s3cr3t-environment", "s3cr3t-cookie")


def as_stranger(code: str, *words: str) -> int:
    """Run Python as another user; return the errno that it met, or 0."""
    program = f"import os, socket, sys\ntry:\n    {code}\nexcept OSError as error:\n    sys.exit(error.errno or 255)\n"
    return subprocess.run(
        ["/usr/bin/python3", "-c", program, *words], user=STRANGER, group="nogroup", extra_groups=[], check=False
    ).returncode


@pytest.fixture
def telltale(lab: Libvirt) -> Iterator[Guest]:
    """A guest whose definition holds secrets."""
    with open_guest(lab, [Disk("vda", size=4 * MIB)], start=False) as guest:
        xml = guest.libvirt.virsh("dumpxml", guest.name, "--inactive", "--security-info")
        graphics = f"<graphics type='vnc' passwd='{SECRETS[0]}'><listen type='socket'/></graphics></devices>"
        xml = xml.replace("</devices>", graphics)
        ns = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
        command = (
            f"<qemu:commandline {ns}><qemu:arg value='-name'/><qemu:arg value='debug-threads=on'/>"
            f"<qemu:env name='TOKEN' value='{SECRETS[1]}'/></qemu:commandline></domain>"
        )
        cookies = (
            "<disk type='network' device='cdrom'><driver name='qemu' type='raw'/>"
            "<source protocol='https' name='x.iso'><host name='127.0.0.1' port='1'/>"
            f"<cookies><cookie name='session'>{SECRETS[2]}</cookie></cookies></source>"
            "<target dev='sdz' bus='sata' tray='open'/><readonly/></disk></devices>"
        )
        path = guest.folder / "domain.xml"
        path.write_text(xml.replace("</domain>", command))
        guest.libvirt.virsh("define", str(path))
        guest.start()
        # Only the inactive definition has it: nothing listens there.
        path.write_text(path.read_text().replace("</devices>", cookies))
        guest.libvirt.virsh("define", str(path))
        yield guest


def test_no_secret_is_in_any_file_of_the_mount_nor_in_the_log(telltale: Guest, mount: Mounter) -> None:
    with_secrets = telltale.libvirt.virsh("dumpxml", telltale.name, "--security-info")
    assert SECRETS[0] in with_secrets
    assert SECRETS[1] in with_secrets
    mounted = mount(telltale)
    telltale.libvirt.virsh("checkpoint-create-as", telltale.name, "c1")
    shown = {}
    for folder, _, names in os.walk(mounted.path):
        for name in names:
            if not name.endswith(".raw"):  # a qcow2 file too: its header tells of the domain
                shown[f"{folder}/{name}"] = Path(folder, name).read_bytes().decode(errors="replace")
    for inner in ("status.json", "metrics.prom", "log"):
        shown[inner] = (mounted.path / ".backupfs" / inner).read_text()
    shown["the state folder"] = "".join(
        path.read_bytes().decode(errors="replace")
        for path in Path(mounted.env["STATE_DIRECTORY"]).rglob("*")
        if path.is_file()
    )
    shown["stderr"] = mounted.log
    assert {Path(path).name for path in shown} >= {"domain.xml", "checkpoint.xml", "status.json"}
    for path, text in shown.items():
        for secret in SECRETS:
            assert secret not in text, path
    restored = (mounted.raw / "domain.xml").read_text()
    # What `ps` shows to everybody is no secret, and a restore needs it.
    assert "debug-threads=on" in restored
    # And libvirt takes what is left.
    (telltale.folder / "restored.xml").write_text(restored)
    telltale.libvirt.virsh("define", str(telltale.folder / "restored.xml"))
    mounted.unmount()


def test_another_user_reaches_neither_the_mount_nor_the_sockets_nor_the_state(
    own_guest: Guest, mount: Mounter, fault: Faults
) -> None:
    mounted = mount(own_guest)
    os.listdir(mounted.raw)
    status = mounted.status()
    connect = "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    state = Path(mounted.env["STATE_DIRECTORY"])
    for what, code, path in (
        ("lists the mount", "os.listdir(sys.argv[1])", mounted.path),
        ("connects to the NBD socket", connect, status["socket"]),
        ("sees the control socket", "os.stat(sys.argv[1])", status["control"]),
        ("lists the state folder", "os.listdir(sys.argv[1])", state),
    ):
        tried = fault(f"another user {what}", "Hostile input")
        number = as_stranger(code, str(path))
        assert number == errno.EACCES, what
        tried.saw("answer", errno.errorcode[number])
    for path in (state, *state.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    # Root may, so the paths are right.
    assert os.path.exists(str(status["socket"]))
    mounted.unmount()


def test_allow_other_and_umask_open_as_much_as_they_say(own_guest: Guest, mount: Mounter) -> None:
    for options, listing, reading in (
        ("allow_other", errno.EACCES, errno.EACCES),  # 500 and 400
        ("allow_other,umask=022", 0, 0),
        ("allow_other,umask=027", errno.EACCES, errno.EACCES),
        (f"allow_other,uid={STRANGER}", 0, 0),
        (f"umask=022,uid={STRANGER}", errno.EACCES, errno.EACCES),  # modes alone let nobody in
    ):
        mounted = mount(own_guest, options)
        os.listdir(mounted.raw)
        assert as_stranger("os.listdir(sys.argv[1])", str(mounted.path)) == listing, options
        assert as_stranger("open(sys.argv[1], 'rb').read(1)", str(mounted.image)) == reading, options
        mounted.unmount()


@pytest.mark.parametrize("before", [None, 0o777])
def test_the_fallback_folder_is_qemus_alone(monkeypatch: pytest.MonkeyPatch, before: int | None) -> None:
    identity = str(uuid.uuid4())
    folder = Path("/run/backupfs", identity)
    monkeypatch.setattr(launch, "_libvirt_folders", lambda _uri: [])
    if before is not None:
        folder.mkdir(parents=True)
        folder.chmod(before)
    nobody = pwd.getpwnam("nobody")
    facts = domainxml.DomainFacts("web01", identity, 1, qemu_user=(nobody.pw_uid, nobody.pw_gid))
    domain: Any = SimpleNamespace(uri="qemu:///system", uuid=identity, name="web01")
    state: Any = SimpleNamespace(folder=Path("/nowhere"))
    try:
        path = launch._socket_path(domain, state, facts, "0123456789abcdef")
        assert path == f"{folder}/backupfs-0123456789abcdef.sock"
        found = folder.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, nobody.pw_uid)
        assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o711
        assert as_stranger("os.listdir(sys.argv[1])", str(folder)) == errno.EACCES
        assert as_stranger("os.listdir(sys.argv[1])", str(folder.parent)) == errno.EACCES
    finally:
        shutil.rmtree(folder)


ODD = ["$(touch pwned); `touch pwned` '\"& | \\ é", "-rf", "a,allow_other,b", "..."]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_only_name(lab: Libvirt, mount: Mounter, fault: Faults, tmp_path: Path, name: str) -> None:
    tried = fault(f"a domain and a mount point called `{name.replace('`', '´')}`", "Hostile input")
    with open_guest(lab, [Disk("vda", size=2 * MIB)], start=False) as guest:
        lab.virsh("domrename", "--domain", guest.name, f"--new-name={name}")
        guest.start()
        guest.run("echo truth | dd of=/dev/vda 2>/dev/null; sync")
        path = tmp_path / name
        path.mkdir()
        words = [COMMAND, "-o", f"uri={lab.uri}", "--", name, path]
        subprocess.run(words, env=mount.env(lab), cwd=tmp_path, check=True)
        try:
            tried.reads((path / "raw/vda.raw").read_bytes, b"truth\n" + bytes(2 * MIB - 6))
            assert os.getxattr(path / "raw/vda.raw", "user.backupfs.domain") == name.encode()
            options = subprocess.run(
                ["findmnt", "-n", "-o", "OPTIONS", path], capture_output=True, text=True, check=True
            ).stdout
            assert "allow_other" not in options
            assert as_stranger("os.listdir(sys.argv[1])", str(path)) == errno.EACCES
            subprocess.run([COMMAND, "release", "--", path], env=mount.env(lab), cwd=tmp_path, check=True)
        finally:
            subprocess.run(["umount", "--", path], check=True)
        assert not list(tmp_path.rglob("pwned"))
        assert not Path("pwned").exists()


def test_nothing_is_ever_handed_to_a_shell() -> None:
    source = Path(launch.__file__).parent
    for path in source.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"shell\s*=|os\.system|os\.popen|getoutput|create_subprocess_shell", text), path


def test_a_mount_shows_what_it_may_to_status_of_its_own_user_only(own_guest: Guest, mount: Mounter) -> None:
    mounted: Mounted = mount(own_guest)
    done = subprocess.run(
        ["/usr/bin/python3", "-c", f"open({str(mounted.path / '.backupfs/status.json')!r})"],
        user=STRANGER, group="nogroup", extra_groups=[], capture_output=True, check=False,
    )  # fmt: skip
    assert b"PermissionError" in done.stderr
    mounted.unmount()
