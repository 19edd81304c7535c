# SPDX-License-Identifier: GPL-3.0-or-later
"""With the distribution's own Python packages, which are older than PyPI's: what a .deb depends on."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
from lab import Guest
from lab.image import unpack_packages

from . import conftest
from .conftest import MIB, Mounter
from .test_failures import assert_errno

ROOT = Path(__file__).parents[2]
PYTHON = "/usr/bin/python3"
# And all that they need; rich and defusedxml for our own part.
NAMES = "pyfuse3 trio async-generator attr exceptiongroup idna outcome sniffio sortedcontainers"
OUR_OWN = "rich markdown-it mdurl pygments commonmark defusedxml"


@pytest.fixture(scope="module")
def distribution() -> dict[str, str]:
    """The environment in which Python finds the distribution's packages, and none of PyPI's."""
    folder = (
        unpack_packages([f"python3-{name}" for name in f"{NAMES} {OUR_OWN}".split()]) / "usr/lib/python3/dist-packages"
    )
    return {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}


@pytest.fixture
def command(distribution: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have mounts made by a `backupfs` that runs with them."""
    script = tmp_path / "backupfs"
    script.write_text(f'#!/bin/sh\nexport PYTHONPATH={distribution["PYTHONPATH"]}\nexec {PYTHON} -m backupfs "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(conftest, "COMMAND", script)


def test_these_are_the_distributions(distribution: dict[str, str]) -> None:
    code = "import pyfuse3, trio; print(pyfuse3.__version__, trio.__version__, pyfuse3.__file__, trio.__file__)"
    done = subprocess.run([PYTHON, "-c", code], env=distribution, check=True, capture_output=True, text=True)
    folder = distribution["PYTHONPATH"].partition(":")[0]
    assert done.stdout.count(folder) == 2, done.stdout


def test_a_mount_serves_and_ends(own_guest: Guest, mount: Mounter, command: None, tmp_path: Path) -> None:
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync 2>/dev/null")
    own_guest.pause()
    mounted = mount(own_guest)
    assert sorted(os.listdir(mounted.raw)) == ["domain.xml", "vda.raw"]
    truth = own_guest.copy_disk("vda", tmp_path / "truth")
    subprocess.run(["cmp", truth, mounted.image], check=True)
    with open(mounted.image, "rb") as image:
        assert os.lseek(image.fileno(), 0, os.SEEK_HOLE) == 8 * MIB, mounted.log  # the C extension works with it, too
    assert os.getxattr(mounted.image, "user.backupfs.disk") == b"vda"
    assert_errno(errno.EROFS, (mounted.path / "new").mkdir)
    assert_errno(errno.ENOENT, lambda: os.stat(mounted.path / "nowhere"))
    assert mounted.status()["state"] == "running"
    mounted.release()
    subprocess.run(["cmp", truth, mounted.image], check=True)
    mounted.unmount()


def test_an_error_is_one_sentence(own_guest: Guest, mount: Mounter, command: None) -> None:
    """Trio 0.22 and later ones group errors differently; a person shall see none of it."""
    done = subprocess.run(
        [conftest.COMMAND, "-f", "-o", f"uri={own_guest.libvirt.uri},disks=vdz", own_guest.name, mount.mount_point()],
        env=mount.env(own_guest.libvirt), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "has no such disk" in done.stderr
    assert "Traceback" not in done.stderr
