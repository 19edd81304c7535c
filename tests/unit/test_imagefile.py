# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from backupfs.imagefile import identify_image, qcow2_version


def test_identity_is_what_stat_tells(tmp_path: Path) -> None:
    image = tmp_path / "a\udcff.qcow2"
    image.write_bytes(b"image")
    told = subprocess.run(["stat", "-c", "%d %i %.9W", image], capture_output=True, text=True, check=True).stdout
    device, inode, birth = told.split()
    found = identify_image(str(image))
    assert found is not None
    assert (found.device, found.inode) == (int(device), int(inode)) == (image.stat().st_dev, image.stat().st_ino)
    # Where the file system keeps no birth time, stat says 0 too.
    assert found.birth == int(birth.replace(".", ""))


def test_writing_changes_nothing_and_a_copy_put_back_is_another(tmp_path: Path) -> None:
    image, copy = tmp_path / "a", tmp_path / "b"
    image.write_bytes(b"image")
    first = identify_image(str(image))
    shutil.copy2(image, copy)
    with image.open("ab") as file:
        file.write(b"more")
    assert identify_image(str(image)) == first
    copy.replace(image)
    assert identify_image(str(image)) != first


def test_link_is_its_target(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "link").symlink_to("a")
    assert identify_image(str(tmp_path / "link")) == identify_image(str(tmp_path / "a"))


def test_what_is_no_file_has_no_identity(tmp_path: Path) -> None:
    assert identify_image(os.devnull) is None
    with pytest.raises(FileNotFoundError, match="gone"):
        identify_image(str(tmp_path / "gone"))


def test_file_system_without_birth_times_is_no_error() -> None:
    # procfs keeps none.
    found = identify_image("/proc/self/status")
    assert found is not None
    assert found.birth == 0


def test_the_version_of_a_qcow2_image_is_read_and_of_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "image"
    assert qcow2_version(str(path)) is None
    for contents, version in (
        (b"QFI\xfb\0\0\0\3more", 3),
        (b"QFI\xfb\0\0\0\2", 2),
        (b"QFI\xfb\0", None),
        (bytes(8), None),
    ):
        path.write_bytes(contents)
        assert qcow2_version(str(path)) == version
