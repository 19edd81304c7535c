# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import errno
import json
import os
import pwd
import stat
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from backupfs.errors import DomainInUse, StateFolderError
from backupfs.state import JobRecord, State, WatchLock, next_instant, open_state, open_watch_lock, state_folder

RECORD = JobRecord("j1", "/s/backupfs-j1.sock", ("/i/a.backupfs-j1",), 3, 1.5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    return tmp_path / "host/uuid"


def test_state_outlives_its_process(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert (state.last_instant, state.job) == (0, None)
        state.advance_to(100)
        state.record_job(RECORD)
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert (state.last_instant, state.job) == (100, RECORD)
        state.forget_job()
        state.forget_job()
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.job is None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert not list(folder.glob("*.new"))


def test_labels_never_go_back() -> None:
    assert next_instant(10.0, 5) == 10
    assert next_instant(10.1, 5) == 11
    assert next_instant(10.1, 11) == 12
    assert next_instant(10.1, 4000) == 4001
    assert next_instant(10.000001, 10) == 11


def test_a_label_that_was_reserved_is_taken_without_a_write_and_never_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last() -> int:
        with open_state("host", "uuid", domain="d", holder="/mnt") as state:
            return state.last_instant

    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.advance_to(100)
        state.reserve(90)  # nothing to do
        state.reserve(130)
        monkeypatch.setattr(os, "fsync", lambda descriptor: pytest.fail("a write while the guest may be frozen"))
        state.take(110)
        monkeypatch.undo()
        assert state.last_instant == 110
    monkeypatch.setenv("STATE_DIRECTORY", str(folder.parents[1]))
    assert last() == 130  # as after a crash
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.reserve(160)
        state.take(140)
        state.settle()
        assert next_instant(1.0, state.last_instant) == 141
    assert last() == 140
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.reserve(150)
        state.take(155)  # the freeze took longer than was thought: durable all the same
        assert state.last_instant == 155
    assert last() == 155


def test_the_label_is_on_disk_before_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append(f"fsync {kind}")
        fsync(descriptor)

    def note_replace(self: Path, target: Path) -> Path:
        done.append(f"rename to {target.name}")
        return replace(self, target)

    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(Path, "replace", note_replace)
        state.advance_to(7)
    assert done == ["fsync file", "rename to instant", "fsync folder"]


def test_second_holder_is_told_who_is_first(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt/a"):
        with pytest.raises(DomainInUse, match=f"already mounted by process {os.getpid()} at /mnt/a"):
            with open_state("host", "uuid", domain="d", holder="/mnt/b"):
                pass
    with open_state("host", "uuid", domain="d", holder="/mnt/b"):
        pass


def test_a_second_holder_learns_what_it_can(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt/\udcff"):
        with pytest.raises(DomainInUse, match="at /mnt/\ufffd"):
            with open_state("host", "uuid", domain="d", holder="/mnt/b"):
                pass
        (folder / "lock").write_bytes(b"")
        with pytest.raises(DomainInUse, match="already mounted by another process"):
            with open_state("host", "uuid", domain="d", holder="/mnt/b"):
                pass


def test_programs_that_are_started_do_not_keep_the_lock(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass
    finally:
        child.communicate()


def test_the_lock_goes_with_its_process(folder: Path) -> None:
    code = (
        "import os, signal\nfrom backupfs.state import open_state\n"
        "with open_state('host', 'uuid', domain='d', holder='x'):\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        pass


@pytest.mark.expects_warning
@pytest.mark.parametrize("damage", [b"", b"00000000 {}", b"garbage", b"\xff\xfe"])
def test_damaged_files_are_told_of_and_labels_go_on(folder: Path, damage: bytes, logged_warnings: list[str]) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.advance_to(5)
        state.record_job(RECORD)
    (folder / "instant").write_bytes(damage)
    (folder / "job").write_bytes(damage)
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.last_instant > 1_700_000_000
        assert state.job is None
    assert len(logged_warnings) == 2


@pytest.mark.expects_warning
def test_labels_go_on_after_damage_though_the_clock_stepped_back(folder: Path, logged_warnings: list[str]) -> None:
    ahead = int(time.time()) + 7200
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.advance_to(ahead)
    with open(folder / "instant", "r+b") as file:
        file.write(b"x")
    os.utime(folder / "instant", (ahead, ahead))  # the disk did it, not a program
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.last_instant == ahead
    assert f"labels go on from {ahead}" in logged_warnings[0]


def test_the_label_is_in_the_time_of_its_file(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.advance_to(4_000_000_000)
    assert (folder / "instant").stat().st_mtime == 4_000_000_000


def written(value: object) -> bytes:
    body = json.dumps(value).encode()
    return b"%08x " % zlib.crc32(body) + body


@pytest.mark.expects_warning
@pytest.mark.parametrize("value", [{"instant": "5"}, {"instant": -1}, {"instant": True}, {}, [], None])
def test_a_label_of_another_kind_is_taken_for_damaged(folder: Path, value: object, logged_warnings: list[str]) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        (folder / "instant").write_bytes(written(value))
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.last_instant > 1_700_000_000
    assert len(logged_warnings) == 1


@pytest.mark.expects_warning
@pytest.mark.parametrize(
    "change",
    [
        {"job_id": ""},
        {"job_id": 5},
        {"scratches": [1]},
        {"scratches": "/i"},
        {"socket": None},
        {"began": "x"},
        {"frozen": "no"},
    ],
)
def test_a_job_of_another_kind_is_not_taken_for_ours(
    folder: Path, change: dict[str, object], logged_warnings: list[str]
) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        (folder / "job").write_bytes(written({**asdict(RECORD), **change}))
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.job is None
    assert "virsh domjobabort" in logged_warnings[0]
    assert not (folder / "job").exists()


def test_a_job_of_a_later_version_is_still_ours(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        (folder / "job").write_bytes(written({**asdict(RECORD), "watchdog": 5}))
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.job == RECORD


@pytest.mark.parametrize("key", ["..", ".", "", "a/b", "a\0", "-rf", "x" * 200])
def test_no_key_leads_out_of_the_folder(tmp_path: Path, key: str) -> None:
    for keys in ((key, "uuid"), ("host", key)):
        with pytest.raises(StateFolderError, match="cannot be the name"):
            with open_state(*keys, domain="d", holder="/mnt"):
                pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["", "host", "host/uuid"])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, which: str) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        pass
    (tmp_path / which).chmod(0o770)
    with pytest.raises(StateFolderError, match="others may write to it; run `chmod go-w"):
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = tmp_path.stat()
    other = os.stat_result((owner.st_mode, *owner[1:4], 12345, *owner[5:]))
    monkeypatch.setattr(Path, "stat", lambda self, *, follow_symlinks=True: other)
    with pytest.raises(StateFolderError, match=f"belongs to user 12345; give it to {os.geteuid()}"):
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass


def test_a_lock_that_leads_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        pass
    (folder / "lock").unlink()
    (folder / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StateFolderError):
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_files_that_cannot_be_used_are_errors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        (folder / "job").mkdir()
        with pytest.raises(StateFolderError, match="cannot remove job"):
            state.forget_job()
    with pytest.raises(StateFolderError, match="cannot read job"):
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass
    (folder / "job").rmdir()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(StateFolderError, match="cannot lock it: No space"):
            with open_state("host", "uuid", domain="d", holder="/mnt"):
                pass
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        pass  # the lock was let go


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "file"))
    with pytest.raises(StateFolderError):
        with open_state("host", "uuid", domain="d", holder="/mnt"):
            pass


def test_a_write_that_fails_is_an_error_and_keeps_the_old(folder: Path) -> None:
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        state.advance_to(5)
        (folder / "instant.new").mkdir()
        with pytest.raises(StateFolderError, match="cannot write instant"):
            state.advance_to(6)
        assert state.last_instant == 5
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.last_instant == 5


def test_where_the_state_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", "/a:/b")
    assert state_folder() == Path("/a")
    monkeypatch.setenv("STATE_DIRECTORY", "a")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert state_folder() == Path("/var/lib/backupfs")
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert state_folder() == Path("/x/backupfs")
    monkeypatch.setenv("XDG_STATE_HOME", "x")
    monkeypatch.setenv("HOME", "/h")
    assert state_folder() == Path("/h/.local/state/backupfs")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "geteuid", lambda: 0x7FFFFFF0)
    with pytest.raises(StateFolderError, match="set XDG_STATE_HOME"):
        state_folder()
    monkeypatch.undo()
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    uid = os.geteuid() or 65534
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert state_folder() == Path(pwd.getpwuid(uid).pw_dir, ".local/state/backupfs")


def test_a_record_says_whether_the_guest_may_be_frozen(folder: Path) -> None:
    for frozen in (True, False):
        with open_state("host", "uuid", domain="d", holder="/mnt") as state:
            state.record_job(replace(RECORD, frozen=frozen))
        with open_state("host", "uuid", domain="d", holder="/mnt") as state:
            assert state.job == replace(RECORD, frozen=frozen)


def test_a_record_of_a_version_that_never_froze_still_counts(folder: Path) -> None:
    old = asdict(RECORD)
    del old["frozen"]
    with open_state("host", "uuid", domain="d", holder="/mnt"):
        (folder / "job").write_bytes(written(old))
    with open_state("host", "uuid", domain="d", holder="/mnt") as state:
        assert state.job == RECORD
        assert not RECORD.frozen


def test_watch_lock_is_held_until_all_who_have_the_file_are_gone(tmp_path: Path) -> None:
    with open_watch_lock(tmp_path) as mine:
        assert mine.take()
        assert mine.take(), "again is no harm"
        assert mine.holder == f"process {os.getpid()}"
        # The watchdog's copy of the open file, by inheritance.
        inherited = WatchLock(tmp_path, os.dup(mine.file))
    with open_watch_lock(tmp_path) as next_one:
        assert not next_one.take()
        assert next_one.holder == f"process {os.getpid()}"
        os.close(inherited.file)
        assert next_one.take()


def test_watch_lock_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(StateFolderError, match="cannot open watchdog"):
        with open_watch_lock(tmp_path / "gone"):
            pass
    with pytest.raises(StateFolderError, match="cannot lock it"):
        WatchLock(tmp_path, os.open("/", os.O_PATH)).take()


def test_job_is_read_again(tmp_path: Path) -> None:
    record = JobRecord("j", "/s-j", ("/x-j",), 1, 5.0)
    one, other = State(tmp_path), State(tmp_path)
    one.record_job(record)
    other.reload_job()
    assert other.job == record
    other.forget_job()
    one.reload_job()
    assert one.job is None
