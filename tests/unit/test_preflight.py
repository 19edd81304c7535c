# SPDX-License-Identifier: GPL-3.0-or-later
"""What must be so before a job may begin, on real folders; QEMU is played by this process."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from backupfs import preflight
from backupfs.errors import ScratchFull, ScratchUnusable
from backupfs.preflight import SEARCH, WRITE, Qemu, check_scratch, find_qemu, kind_of, may, parse_ids
from backupfs.scratch import Reserve

NOTHING = Reserve(size=0)


def check(folder: Path | str, reserve: Reserve = NOTHING, uri: str = "qemu:///session") -> None:
    check_scratch([str(folder)], reserve, domain="web01", uuid="u", uri=uri)


def play(monkeypatch: pytest.MonkeyPatch, uid: int, pid: int | None = None) -> None:
    qemu = Qemu(pid or os.getpid(), uid, frozenset())
    monkeypatch.setattr(preflight, "find_qemu", lambda *_: qemu)


def test_folder_with_room_is_fine(tmp_path: Path) -> None:
    check(tmp_path)


def test_less_room_than_the_reserve_is_enospc_and_says_the_cure(tmp_path: Path) -> None:
    with pytest.raises(ScratchFull) as caught:
        check(tmp_path, Reserve(size=2**60))
    assert caught.value.errno == errno.ENOSPC
    for word in ("web01", str(tmp_path), kind_of(str(tmp_path)), "scratch-reserve="):
        assert word in str(caught.value)


def test_missing_folder_and_a_file_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, reason in (("gone", "no such file"), ("file", "not a directory")):
        with pytest.raises(ScratchUnusable, match=reason):
            check(tmp_path / name)


def test_folder_that_qemu_may_not_use_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, 12345)
    tmp_path.chmod(0o700)
    with pytest.raises(ScratchUnusable, match="user 12345"):
        check(tmp_path)
    with pytest.raises(ScratchUnusable, match="may not enter it"):
        check(tmp_path, uri="qemu:///system")
    tmp_path.chmod(0o701)
    check(tmp_path, uri="qemu:///system")  # libvirtd makes the file there
    with pytest.raises(ScratchUnusable, match="may not write there"):
        check(tmp_path)
    tmp_path.chmod(0o703)
    check(tmp_path)


def test_acl_is_not_second_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, 12345)
    tmp_path.chmod(0o700)
    monkeypatch.setattr(os, "listxattr", lambda _: ["system.posix_acl_access"])
    check(tmp_path)

    def unsupported(_: Any) -> list[str]:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "listxattr", unsupported)
    with pytest.raises(ScratchUnusable):
        check(tmp_path)


def test_folder_that_is_another_one_to_qemu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, 0)
    check(tmp_path)
    real = os.stat

    def another(path: Any, **more: Any) -> os.stat_result:
        # As when a file system was mounted here after QEMU started.
        return real("/" if str(path).startswith("/proc/") else path, **more)

    monkeypatch.setattr(os, "stat", another)
    with pytest.raises(ScratchUnusable, match="mounted after the guest started"):
        check(tmp_path)


@pytest.mark.parametrize(("error", "refused"), [(FileNotFoundError, True), (PermissionError, False)])
def test_what_cannot_be_looked_at_is_not_held_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError], refused: bool
) -> None:
    play(monkeypatch, 12345)
    real = os.stat

    def hidden(path: Any, **more: Any) -> os.stat_result:
        if str(path).startswith("/proc/"):
            raise error
        return real(path, **more)

    monkeypatch.setattr(os, "stat", hidden)
    if refused:
        with pytest.raises(ScratchUnusable):
            check(tmp_path)
    else:
        check(tmp_path)


@pytest.mark.parametrize(
    ("uid", "groups", "mode", "wanted", "allowed"),
    [
        (0, [], 0o000, WRITE, True),
        (5, [], 0o300, SEARCH | WRITE, True),
        (5, [7], 0o077, SEARCH, False),  # the owner's bits alone count for the owner
        (6, [7], 0o030, SEARCH | WRITE, True),
        (6, [7], 0o010, SEARCH | WRITE, False),
        (6, [], 0o001, SEARCH, True),
        (6, [], 0o770, SEARCH, False),
    ],
)
def test_mode_bits(uid: int, groups: list[int], mode: int, wanted: int, allowed: bool) -> None:
    status = os.stat_result((0o40000 | mode, 1, 1, 1, 5, 7, 0, 0, 0, 0))
    assert may(status, Qemu(1, uid, frozenset(groups)), wanted) is allowed


def test_ids_are_those_that_files_are_checked_against() -> None:
    text = "Name:\tqemu\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t9 10 \n"
    assert parse_ids(text) == (4, frozenset({8, 9, 10}))
    for damaged in ("", "Uid:\t1\nGid:\t1\nGroups:\n", "Uid:\ta\tb\tc\td\nGid:\t1\t1\t1\t1\nGroups:\n"):
        with pytest.raises(ValueError):
            parse_ids(damaged)


def test_qemu_is_found_by_its_pid_file_and_known_by_its_uuid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert find_qemu("web01", "u", "qemu:///session") is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = tmp_path / "libvirt/qemu/run"
    folder.mkdir(parents=True)
    assert find_qemu("web01", "u", "qemu:///session") is None, "it does not run"
    (folder / "web01.pid").write_text(f"{os.getpid()}\n")
    word = Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    found = find_qemu("web01", word, "qemu:///session")
    assert found is not None
    assert (found.pid, found.uid) == (os.getpid(), os.geteuid())
    assert find_qemu("web01", "another", "qemu:///session") is None, "an old file"
    (folder / "web01.pid").write_text("nonsense")
    assert find_qemu("web01", word, "qemu:///session") is None
    assert find_qemu("no such domain", word, "qemu:///system") is None


def test_kind_of_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind_of("/proc") == "proc"
    # A device that mountinfo does not have, as btrfs's subvolumes: by the path above it.
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **more: os.stat_result((0, 0, 2**40, *[0] * 7)) if path == "/proc/sys"
                        else real(path, **more))  # fmt: skip
    assert kind_of("/proc/sys") == "proc"
    monkeypatch.setattr(preflight.mountpoint, "read_mounts", list)
    assert kind_of("/proc/sys") == "unknown file system"
