# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backupfs import mountpoint
from backupfs.errors import MissingDependency, MountPointError

INFO = r"""22 27 0:21 / /proc rw shared:1 - proc proc rw
36 35 0:47 / /mnt/web\04001 rw,nosuid shared:2 master:1 - fuse.backupfs web\134\011x rw
37 35 0:48 / /mnt/web\04001 rw - fuse.backupfs other rw
odd line
"""


def test_mountinfo_is_parsed_and_unescaped() -> None:
    found = mountpoint.parse_mountinfo(INFO)
    assert found[1] == mountpoint.Mount("0:47", "/mnt/web 01", "fuse.backupfs", "web\\\tx")
    assert len(found) == 3


def test_the_mount_on_top_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "info").write_text(INFO)
    monkeypatch.setattr(mountpoint, "MOUNTINFO", str(tmp_path / "info"))
    found = mountpoint.mount_at("/mnt/web 01")
    assert found is not None
    assert found.source == "other"
    assert mountpoint.mount_at("/mnt") is None
    with pytest.raises(MountPointError, match="already mounted: other"):
        mountpoint.check_mount_point("/mnt/web 01")


def test_mount_point_must_be_there_and_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert mountpoint.check_mount_point(str(tmp_path / "empty")) == str((tmp_path / "empty").resolve())
    (tmp_path / "link").symlink_to("empty")
    assert mountpoint.check_mount_point(str(tmp_path / "link")).endswith("/empty")
    for path, reason in ((tmp_path, "not empty"), (tmp_path / "none", "no such"), (tmp_path / "file", "not a dir")):
        (tmp_path / "file").touch()
        with pytest.raises(MountPointError, match=reason):
            mountpoint.check_mount_point(str(path))


def test_a_mount_over_what_the_backup_needs_is_refused() -> None:
    mountpoint.check_overlap("/mnt/a", ["/mnt/ab/disk", "/var/x"])
    for path in ("/mnt/a", "/mnt/a/disk", "/mnt/a/b/../disk"):
        with pytest.raises(MountPointError, match="would hide"):
            mountpoint.check_overlap("/mnt/a", [path])


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(MissingDependency, match="install the package fuse3"):
        mountpoint.check_tools()


@pytest.mark.parametrize(("before", "after"), [("128", "1024"), ("4096", "4096")])
def test_read_ahead_is_raised_and_never_lowered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, before: str, after: str
) -> None:
    monkeypatch.setattr(mountpoint, "BDI", str(tmp_path))
    (tmp_path / "0:47").mkdir()
    told = tmp_path / "0:47/read_ahead_kb"
    told.write_text(before)
    mountpoint.raise_read_ahead("0:47")
    assert told.read_text() == after
    assert mountpoint.read_ahead("0:47") == int(after) * 1024
    mountpoint.raise_read_ahead("0:48")  # where there is no sysfs it is no failure
    assert mountpoint.read_ahead("0:48") == 0
