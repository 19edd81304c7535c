# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from backupfs.changes import BLOCK, nothing
from backupfs.errors import StateFolderError
from backupfs.history import Record, Seen
from backupfs.labels import uniform
from backupfs.lineage import Identity, Mark
from backupfs.store import OwnCheckpoint, Store, open_store

SIZE = 4 * BLOCK
OWN = OwnCheckpoint("own", 9, Mark(10, "0" * 32), "<domaincheckpoint/>")


def record(disk: str = "vda", path: str = "/a.qcow2", instant: int = 10) -> Record:
    seen = (Seen(OWN.identity, nothing(SIZE)),)
    return Record(disk, path, None, SIZE, instant, instant, uniform(SIZE, instant), seen, BLOCK, instant)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path, "host", "domain")


def again(store: Store, host: str = "host", domain: str = "domain") -> Store:
    return open_store(store.folder.parent, host, domain)


def test_history_outlives_its_process(store: Store) -> None:
    assert store.load("vda", "/a.qcow2") is None
    store.save([record(), record("vdb")])
    store.keep(OWN)
    assert again(store).load("vda", "/a.qcow2") == record()
    assert again(store).load("vdb", "/a.qcow2") == record("vdb")
    assert again(store).checkpoints == {"own": OWN}
    assert OWN.identity == Identity("own", 9, Mark(10, "0" * 32))
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in store.folder.iterdir()} == {0o600}


def test_disk_on_another_path_starts_anew_and_the_old_path_is_forgotten(store: Store) -> None:
    store.save([record(), record("vdb")])
    assert store.load("vda", "/b.qcow2") is None
    store.save([record(path="/b.qcow2")])
    # Back on the old path: nobody knows what was written there meanwhile.
    assert store.load("vda", "/a.qcow2") is None
    assert store.load("vda", "/b.qcow2") is not None
    assert store.load("vdb", "/a.qcow2") is not None


def test_disks_whose_names_look_alike_have_files_of_their_own(store: Store) -> None:
    disks = ["vda", "vda-", "vda.", "vd/a", "\udcff", "v" * 30, "v" * 31, "", "ä"]
    store.save([record(disk) for disk in disks])
    for disk in disks:
        assert store.load(disk, "/a.qcow2") == record(disk)
        store.save([record(disk, instant=11)])
    assert len(os.listdir(store.folder)) == len(disks)


@pytest.mark.expects_warning
@pytest.mark.parametrize(("host", "domain"), [("replica", "domain"), ("host", "clone")])
def test_replica_with_the_same_domain_uuid_has_a_history_of_its_own(
    store: Store, host: str, domain: str, logged_warnings: list[str]
) -> None:
    store.save([record()])
    store.keep(OWN)
    copied = again(store, host, domain)  # the state folder, copied along
    assert copied.load("vda", "/a.qcow2") is None
    assert copied.checkpoints == {}
    assert len(logged_warnings) == 2
    assert "written for host/domain" in logged_warnings[1]


@pytest.mark.expects_warning
@pytest.mark.parametrize("contents", [b"", b"nonsense", b"backupfs history 1 00000000\n"])
def test_damaged_record_is_thrown_away_with_a_line_in_the_log(
    store: Store, contents: bytes, logged_warnings: list[str]
) -> None:
    store.save([record()])
    (path,) = store.folder.iterdir()
    path.write_bytes(contents)
    assert store.load("vda", "/a.qcow2") is None
    assert "all of vda counts as changed" in logged_warnings[0]
    assert not path.exists()
    store.save([record()])
    assert store.load("vda", "/a.qcow2") == record()


@pytest.mark.expects_warning
def test_record_under_another_ones_name_is_thrown_away(store: Store, logged_warnings: list[str]) -> None:
    store.save([record()])
    (path,) = store.folder.iterdir()
    store.save([record("vdb")])
    (other,) = set(store.folder.iterdir()) - {path}
    path.replace(other)
    assert store.load("vdb", "/a.qcow2") is None
    assert "written for vda" in logged_warnings[0]


@pytest.mark.expects_warning
@pytest.mark.parametrize(
    "body", [b"", b"nonsense", b"[]", b"{}", b'{"owner": "host/domain", "checkpoints": [{"name": "a"}]}', b'"text"']
)
def test_damaged_list_of_checkpoints_is_thrown_away_and_the_records_stay(
    store: Store, body: bytes, logged_warnings: list[str]
) -> None:
    store.save([record()])
    store.keep(OWN)
    (store.folder / "checkpoints").write_bytes(b"%08x " % zlib.crc32(body) + body)
    assert again(store).checkpoints == {}
    assert "checkpoints is damaged" in logged_warnings[0]
    assert again(store).load("vda", "/a.qcow2") == record()
    assert len(logged_warnings) == 1


@pytest.mark.expects_warning
def test_checkpoints_with_a_wrong_checksum_are_thrown_away(store: Store, logged_warnings: list[str]) -> None:
    store.keep(OWN)
    path = store.folder / "checkpoints"
    path.write_bytes(path.read_bytes().replace(b"own", b"won", 2))
    assert again(store).checkpoints == {}
    assert "checksum" in logged_warnings[0]


def test_pruned_checkpoint_stays_without_the_map_and_a_deleted_one_goes(store: Store) -> None:
    other = replace(OWN, name="other")
    store.keep(OWN)
    store.keep(other)
    store.mark_pruned("own")
    assert again(store).checkpoints == {"own": replace(OWN, pruned=True), "other": other}
    store.drop("own")
    store.drop("never there")
    assert again(store).checkpoints == {"other": other}


def test_forget_leaves_nothing(store: Store) -> None:
    store.save([record(), record("vdb")])
    store.keep(OWN)
    store.forget()
    assert os.listdir(store.folder) == []
    assert store.checkpoints == {}
    assert again(store).load("vda", "/a.qcow2") is None


def test_record_is_on_disk_before_save_returns(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), rename(*names)))
    store.save([record()])
    assert done == ["fsync", "rename", "fsync"]


def test_half_written_file_of_a_killed_process_is_removed(store: Store) -> None:
    store.save([record()])
    (path,) = store.folder.iterdir()
    path.with_name(path.name + ".new").write_bytes(b"half")
    assert again(store).load("vda", "/a.qcow2") == record()
    assert list(store.folder.iterdir()) == [path]


def test_folder_that_cannot_be_used_is_an_error(store: Store) -> None:
    store.save([record()])
    (path,) = store.folder.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(StateFolderError, match="cannot write vda-"):
        store.save([record()])
    with pytest.raises(StateFolderError, match="cannot read vda-"):
        store.load("vda", "/a.qcow2")
    (store.folder / "folder.new").mkdir()
    with pytest.raises(StateFolderError, match="cannot remove what is thrown away"):
        again(store)
    (store.folder.parent / "file").touch()
    with pytest.raises(StateFolderError, match="cannot make it"):
        open_store(store.folder.parent / "file", "host", "domain")
    store.folder.rename(store.folder.parent / "moved")
    with pytest.raises(StateFolderError, match="cannot list it"):
        store.forget()


def test_file_that_is_gone_already_can_be_removed(store: Store) -> None:
    store._remove(["never there"])
