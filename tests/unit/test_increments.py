# SPDX-License-Identifier: GPL-3.0-or-later
"""Every rule of history, with the change that is lost or invented where it is left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from backupfs.changes import BLOCK, Changes, from_extents, nothing
from backupfs.domainxml import Checkpoint, Reason
from backupfs.extents import DIRTY, Builder
from backupfs.history import ImageIdentity, Record
from backupfs.increments import (
    DOUBTFUL,
    GONE,
    ITSELF,
    NOT_READ,
    UNSETTLED,
    VOID,
    Conclusion,
    DiskNow,
    Plan,
    conclude,
    plan,
)
from backupfs.lineage import Identity, Mark, identify, libvirt_clock, prunable, render_mark

SIZE = 16 * BLOCK
IMAGE = ImageIdentity(1, 2, 3)
BROKEN = Reason("its bitmap is inconsistent", "make a new checkpoint")


def changed(*blocks: int, size: int = SIZE) -> Changes:
    builder = Builder(size)
    for block in range(size // BLOCK):
        builder.append(BLOCK, DIRTY if block in blocks else 0)
    return from_extents(builder.finish())


def blocks(changes: Changes) -> set[int]:
    return {block for start, stop in changes for block in range(start // BLOCK, stop // BLOCK)}


@dataclass
class Host:
    """One disk, and libvirt's checkpoints of it: what each bitmap says is a set of blocks."""

    clock: float | None = 1000.0
    size: int = SIZE
    path: str = "/vda.qcow2"
    image: ImageIdentity | None = IMAGE
    last: int = 0
    live: dict[str, Checkpoint] = field(default_factory=dict)
    bitmaps: dict[str, set[int]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    trusted: list[Identity] = field(default_factory=list)
    planned: Plan | None = None
    chunk: int = BLOCK

    def write(self, *written: int) -> None:
        for dirty in self.bitmaps.values():
            dirty.update(written)

    def create(self, name: str, *, at: int = 500, description: str = "", parent: str | None = "newest") -> None:
        if parent == "newest":
            parent = next(reversed(self.live), None)
        self.live[name] = Checkpoint(name, at, parent, description, ("vda",))
        self.bitmaps[name] = set()

    def delete(self, *names: str) -> None:
        for name in names:
            gone = self.live.pop(name)
            del self.bitmaps[name]
            for other in self.live.values():
                if other.parent == name:
                    self.live[other.name] = replace(other, parent=gone.parent)

    def plan(self, unreadable: Mapping[tuple[str, str], Reason] | None = None) -> Plan:
        self.planned = plan(
            list(self.live.values()),
            {"vda": DiskNow(self.path, self.image)},
            self.records,
            clock=self.clock,
            unreadable=unreadable,
            trusted=self.trusted,
        )
        return self.planned

    def short(self) -> list[str]:
        assert self.planned is not None
        return [job.checkpoint for job in self.planned.short]

    def point(
        self,
        *,
        make: str | None = None,
        failing: Collection[str] = (),
        unread: Collection[str] = (),
        unreadable: Collection[str] = (),
        meanwhile: Sequence[int] = (),
        after: Sequence[Checkpoint] | None = None,
        save: bool = True,
    ) -> Conclusion:
        planned = self.plan({(name, "vda"): BROKEN for name in unreadable})
        readings: dict[tuple[str, str], Changes | Reason] = {}
        for name in (*self.short(), *planned.base.values()):
            if name == planned.base["vda"]:
                self.write(*meanwhile)
            if name not in unread:
                found = changed(*self.bitmaps[name], size=self.size)
                readings[name, "vda"] = BROKEN if name in failing else found
        self.last += 10
        mark = None
        if make is not None:
            mark = Mark(self.last, f"{self.last:032x}")
            self.create(make, at=self.last, description=render_mark(mark))
        found = conclude(
            planned,
            readings,
            list(self.live.values()) if after is None else after,
            {"vda": self.size},
            instant=self.last,
            chunk=self.chunk,
            made=mark,
        )["vda"]
        if save:
            self.records["vda"] = found.record
        return found


def labels(found: Conclusion | Record) -> list[int]:
    record = found.record if isinstance(found, Conclusion) else found
    return [record.labels.newest_in(start, start + BLOCK) for start in range(0, record.size, BLOCK)]


def expect(found: Conclusion, then: int, now: int, *changes: int) -> None:
    assert found.doubt is None
    assert labels(found) == [now if block in changes else then for block in range(SIZE // BLOCK)]


@pytest.fixture
def host() -> Host:
    """A disk with one point, 10, made with a checkpoint of ours."""
    host = Host()
    first = host.point(make="own10")
    assert first.doubt == "nothing is known of it from an earlier point in time"
    assert first.left_out == {"own10": ITSELF}
    assert labels(first) == [10] * 16
    return host


# --- what it is for ------------------------------------------------------------------------------


def test_what_did_not_change_keeps_its_label_and_the_rest_gets_the_new_one(host: Host) -> None:
    host.write(3, 4)
    expect(host.point(make="own20"), 10, 20, 3, 4)
    host.write(7)
    assert labels(host.point()) == [10] * 3 + [20, 20] + [10] * 2 + [30] + [10] * 8
    host.write(8)
    # own20 is older than point 30: what it has of before is labelled anew.
    assert labels(host.point())[7:9] == [40, 40]


def test_steady_state_costs_one_job_and_every_increment_is_exact(host: Host) -> None:
    truth: dict[str, set[int]] = {"own10": set()}
    for number in range(2, 10):
        host.write(number)
        for name, dirty in truth.items():
            dirty.add(number)
            assert dirty == host.bitmaps[name]
        found = host.point(make=f"own{number}0")
        assert host.short() == []
        assert {name: blocks(each) for name, each in found.increments.items()} == truth
        assert found.left_out == {f"own{number}0": ITSELF}
        truth[f"own{number}0"] = set()


def test_older_bases_are_read_before_the_real_job_and_get_what_was_written_meanwhile(host: Host) -> None:
    host.records.clear()
    host.create("monday")
    host.write(1)
    host.create("tuesday")
    host.write(2)
    found = host.point(meanwhile=(3,))
    assert host.short() == ["own10", "monday"]
    assert host.planned is not None
    assert host.planned.base == {"vda": "tuesday"}
    assert {name: blocks(each) for name, each in found.increments.items()} == {
        "tuesday": {2, 3},
        "monday": {1, 2, 3},
        "own10": {1, 2, 3},
    }


def test_with_keep_1_unchanged_data_keep_their_labels_and_pruned_checkpoints_stay_bases(host: Host) -> None:
    for number in range(2, 7):
        host.write(number)
        found = host.point(make=f"own{number}0")
        host.delete(*prunable(list(host.live.values()), 1))
        assert list(host.live) == [f"own{number}0"]
    assert labels(found) == [10, 10, 20, 30, 40, 50, 60] + [10] * 9
    for instant, since in ((10, {2, 3, 4, 5, 6}), (30, {4, 5, 6}), (60, set())):
        changes = found.record.changed_since(instant)
        assert changes is not None
        assert blocks(changes) == since


# --- labels: rules that lose or invent a change where they are left out ----------------------------


def test_foreign_checkpoint_remade_within_its_second_does_not_count_as_the_one_it_was(host: Host) -> None:
    host.delete("own10")
    host.create("foreign", at=999)
    assert host.point().left_out == {"foreign": UNSETTLED}
    assert host.planned is not None
    assert host.planned.unsettled == ("foreign",)
    host.write(5)
    host.delete("foreign")
    host.create("foreign", at=999)  # the same in everything that libvirt tells
    host.clock = 2000.0
    found = host.point()
    assert labels(found)[5] == 30
    assert found.doubt is not None


def test_foreign_checkpoint_of_two_seconds_ago_counts(host: Host) -> None:
    host.delete("own10")
    host.create("foreign", at=998)
    assert "foreign" in host.point().increments
    host.write(5)
    expect(host.point(), 20, 30, 5)


def test_foreign_checkpoint_that_stayed_the_same_while_the_caller_waited_counts(host: Host) -> None:
    host.clock = None  # of another host
    host.delete("own10")
    host.create("foreign", at=999)
    host.trusted = [identify(host.live["foreign"])]
    assert "foreign" in host.point().increments
    host.trusted = []
    host.write(5)
    expect(host.point(), 20, 30, 5)


def test_checkpoint_that_could_not_be_read_stays_settled(host: Host) -> None:
    host.create("foreign", at=997)
    host.point(failing=["foreign"])
    host.clock = None  # libvirtd is reached by another way now
    host.write(1)
    found = host.point()
    assert blocks(found.increments["foreign"]) == {1}
    assert labels(found)[1] == 30


def test_what_settled_once_is_settled_on_another_disk_too(host: Host) -> None:
    host.clock = None
    host.path = "/moved.qcow2"
    assert list(host.point().increments) == ["own10"]


def test_checkpoint_deleted_and_remade_later_is_another_one(host: Host) -> None:
    host.delete("own10")
    host.create("monday")
    host.point()
    host.write(5)
    host.delete("monday")
    host.create("monday", at=700)
    found = host.point()
    assert labels(found) == [30] * 16
    assert found.doubt == "no checkpoint of the last point in time is left to tell what has changed since"


def test_copy_of_our_own_description_proves_nothing(host: Host) -> None:
    host.write(5)
    copied = host.live["own10"].description
    host.delete("own10")
    host.create("own10", at=700, description=copied)
    assert labels(host.point())[5] == 20


def test_copy_of_our_own_description_settles_nothing(host: Host) -> None:
    host.create("copy", at=999, description=host.live["own10"].description)
    assert host.point().left_out == {"copy": UNSETTLED}


def test_clock_of_another_host_is_known_by_what_it_gave_to_our_own_checkpoints() -> None:
    # It may be an hour behind: by our clock a checkpoint of now would be settled, and is not.
    assert libvirt_clock([], None) is None
    made = [Identity("own1", 1200, Mark(4800, "0" * 32)), Identity("own2", 1100, Mark(4900, "0" * 32))]
    assert libvirt_clock(made, None) == 1200
    assert libvirt_clock(made, 1000.5) == 1000.5


def test_redefined_checkpoint_is_another_one(host: Host) -> None:
    host.create("foreign", at=100)
    host.delete("own10")
    host.point()
    host.write(5)
    host.delete("foreign")
    host.create("new", at=600)
    # creationTime before the last point, and so it seems to have existed then.
    host.live["new"] = replace(host.live["new"], creation_time=105)
    assert labels(host.point())[5] == 30


def test_checkpoints_that_changed_places_are_not_trusted(host: Host) -> None:
    host.create("monday")
    host.create("tuesday")
    host.point()
    host.delete("own10")
    host.write(5)
    facts = host.live["monday"]
    host.delete("monday")
    host.create("monday")
    host.live["monday"] = replace(host.live["monday"], creation_time=facts.creation_time)
    found = host.point()
    assert labels(found)[5] == 30
    assert found.doubt is not None


def test_old_image_with_its_bitmap_put_back_over_the_file_is_noticed(host: Host) -> None:
    host.create("monday")
    host.write(1)
    host.point()
    copied = set(host.bitmaps["monday"])
    host.write(2)
    expect(host.point(), 10, 30, 1, 2)
    host.bitmaps["monday"] = copied  # block 2 is as it was
    found = host.point()
    assert found.doubt is not None
    assert "changes since monday are gone from its bitmap" in found.doubt
    assert labels(found) == [40] * 16
    # Its bitmap by the name of monday may be that of an earlier monday.
    assert found.increments == {}
    assert found.left_out == {"own10": VOID, "monday": VOID}
    # Nor does a redefinition make it another one.
    host.live["monday"] = replace(host.live["monday"], creation_time=501)
    host.create("tuesday")
    host.write(3)
    again = host.point(make="own50")
    assert again.left_out == {"own10": VOID, "monday": VOID, "own50": ITSELF}
    assert blocks(again.increments["tuesday"]) == {3}
    host.write(4)
    expect(host.point(), 50, 60, 4)


def test_old_image_put_back_is_noticed_by_a_bitmap_that_a_short_job_reads(host: Host) -> None:
    host.write(2)
    host.point()
    host.bitmaps["own10"] = set()
    host.create("foreign")
    host.write(7)
    found = host.point()
    assert host.short() == ["own10"]
    assert labels(found) == [30] * 16
    assert found.doubt is not None
    assert "are gone" in found.doubt


@pytest.mark.parametrize(
    "other", [replace(IMAGE, device=9), replace(IMAGE, inode=9), replace(IMAGE, birth=9), None], ids=str
)
def test_another_file_at_the_same_path_is_noticed(host: Host, other: ImageIdentity | None) -> None:
    host.create("new")
    host.point()
    host.image = other
    found = host.point()
    assert found.doubt == "its image is another file than at the last point in time"
    assert labels(found) == [30] * 16
    # Whose bitmaps are in it, nobody knows.
    assert host.planned is not None
    assert (host.short(), host.planned.base) == ([], {})
    assert found.left_out == {"own10": VOID, "new": VOID}
    assert host.point(make="own40").left_out == {"own10": VOID, "new": VOID, "own40": ITSELF}
    host.write(3)
    expect(host.point(), 40, 50, 3)


def test_disk_on_another_path_is_another_disk(host: Host) -> None:
    host.path = "/other.qcow2"
    found = host.point()
    assert found.doubt == "nothing is known of it from an earlier point in time"
    assert found.record.since == 20
    assert found.record.changed_since(10) is None


def test_lost_record_makes_everything_changed_and_pruned_checkpoints_unusable(host: Host) -> None:
    host.write(1)
    host.point()
    assert host.records["vda"].changed_since(10) is not None
    host.records.clear()
    found = host.point()
    assert labels(found) == [30] * 16
    assert found.record.changed_since(20) is None
    assert found.record.changed_since(30) == nothing(SIZE)


def test_doubt_makes_pruned_checkpoints_whole_increments(host: Host) -> None:
    host.image = None
    changes = host.point().record.changed_since(10)
    assert changes is not None
    assert blocks(changes) == set(range(16))


@pytest.mark.parametrize("size", [SIZE + BLOCK, SIZE - BLOCK])
def test_resized_disk_is_all_new_and_its_older_checkpoints_have_no_increment(host: Host, size: int) -> None:
    host.create("monday")
    host.point()
    host.size = size
    host.create("unseen")
    found = host.point(make="own30")
    assert found.doubt == f"it was resized from {SIZE} to {size} bytes"
    assert set(labels(found)) == {30}
    assert found.increments == {}
    assert found.left_out == {"own10": VOID, "monday": VOID, "unseen": VOID, "own30": ITSELF}
    host.write(2)
    again = host.point()
    assert again.doubt is None
    assert again.left_out == {"own10": VOID, "monday": VOID, "unseen": VOID}
    assert blocks(again.increments["own30"]) == {2}
    assert host.point().left_out == again.left_out
    # Back to the size that it had: what was cut off stays so.
    host.size = SIZE
    host.create("own50")
    host.point()
    assert host.point().left_out == dict.fromkeys(("own10", "monday", "unseen", "own30", "own50"), VOID)


def test_resize_between_two_readings_of_a_first_point_is_noticed() -> None:
    host = Host()
    host.create("monday")
    host.create("tuesday")
    planned = host.plan()
    readings: dict[tuple[str, str], Changes | Reason] = {
        ("monday", "vda"): changed(1),
        ("tuesday", "vda"): changed(1, size=2 * SIZE),
    }
    live = list(host.live.values())
    found = conclude(planned, readings, live, {"vda": 2 * SIZE}, instant=10, chunk=1)["vda"]
    assert found.left_out == {"monday": VOID, "tuesday": VOID}
    assert all(one.void for one in found.record.seen)


def test_bitmap_that_cannot_be_read_is_not_an_empty_one(host: Host) -> None:
    host.write(5)
    found = host.point(failing=["own10"])
    assert labels(found) == [20] * 16
    assert found.left_out == {"own10": BROKEN}
    assert found.increments == {}
    found = host.point(unread=["own10"])
    assert found.left_out == {"own10": NOT_READ}


def test_base_that_libvirt_refuses_is_left_out_of_the_next_plan(host: Host) -> None:
    host.create("monday")
    host.write(5)
    host.point()
    host.write(6)
    found = host.point(unreadable=["monday"])
    assert host.planned is not None
    assert host.planned.base == {"vda": "own10"}
    assert found.left_out == {"monday": BROKEN}
    expect(found, 10, 30, 5, 6)


def test_point_that_is_not_after_the_last_one_is_in_doubt(host: Host) -> None:
    host.write(5)
    host.last = -5
    found = host.point()
    assert found.doubt == "its last point in time, 10, is not before this one, 5"
    assert (labels(found), found.record.since) == ([5] * 16, 5)
    # Nor is anything that was read then taken for older than this.
    host.last = 10
    host.point(make="own20")
    host.last = -5
    found = host.point()
    assert found.left_out == {"own10": DOUBTFUL}
    assert list(found.increments) == ["own20"]


def test_another_chunk_size_makes_all_chunks_new_and_nothing_else(host: Host) -> None:
    host.point()
    assert host.records["vda"].chunk_label(0, BLOCK) == 10
    host.chunk = 2 * BLOCK
    host.write(7)
    found = host.point().record
    assert found.labels.newest_in(0, BLOCK) == 10
    assert [found.chunk_label(0, 2 * BLOCK), found.chunk_label(6 * BLOCK, 8 * BLOCK)] == [30, 30]
    host.write(2)
    found = host.point().record
    assert [found.chunk_label(0, 2 * BLOCK), found.chunk_label(2 * BLOCK, 4 * BLOCK)] == [30, 40]


# --- increments ----------------------------------------------------------------------------------


def test_younger_foreign_checkpoint_costs_one_short_job_whatever_the_number_of_older_ones(host: Host) -> None:
    for number in range(2, 6):
        host.write(number)
        host.point(make=f"own{number}0")
    host.write(8)  # before the foreign one: its bitmap does not have it
    host.create("foreign")
    host.write(9)
    found = host.point(meanwhile=(10,))
    assert host.short() == ["own50"]
    assert {name: blocks(each) for name, each in found.increments.items()} == host.bitmaps
    assert blocks(found.increments["foreign"]) == {9, 10}
    expected = {2: 20, 3: 30, 4: 40, 5: 50, 8: 60, 9: 60, 10: 60}
    assert labels(found) == [expected.get(block, 10) for block in range(16)]


def test_two_younger_foreign_checkpoints_cost_one_job_more(host: Host) -> None:
    host.point(make="own20")
    host.create("foreign1")
    host.create("foreign2")
    host.point()
    assert host.short() == ["own20", "foreign1"]
    host.point()
    assert host.short() == []


def test_checkpoint_deleted_while_the_point_begins_has_no_increment(host: Host) -> None:
    host.create("monday")
    host.write(5)
    found = host.point(after=[host.live["own10"]])
    assert found.left_out == {"monday": GONE, "own10": NOT_READ}
    assert labels(found) == [20] * 16
    found = host.point(after=[host.live["monday"]], save=False)
    assert found.left_out == {"own10": GONE}
    assert list(found.increments) == ["monday"]


def test_checkpoint_remade_while_the_point_begins_is_another_one(host: Host) -> None:
    host.write(5)
    remade = replace(host.live["own10"], creation_time=999)
    host.bitmaps["own10"] = set()  # as read: the new one's
    found = host.point(after=[remade])
    assert found.left_out == {"own10": GONE}
    assert labels(found)[5] == 20


def test_bridge_that_fails_takes_with_it_what_it_should_carry(host: Host) -> None:
    host.point(make="own20")
    host.create("foreign")
    host.write(5)
    found = host.point(failing=["own20"])
    assert found.left_out == {"own20": BROKEN, "own10": DOUBTFUL}
    assert list(found.increments) == ["foreign"]
    assert labels(found) == [30] * 16


def test_what_may_be_younger_than_the_bridge_is_read_anew(host: Host) -> None:
    """A redefinition has lost a parent: nothing but a bitmap tells what is older."""
    host.write(1)
    host.create("one", at=600)
    host.write(2)
    host.point()
    assert host.planned is not None
    assert host.planned.base == {"vda": "one"}
    host.live["one"] = replace(host.live["one"], parent=None)
    host.write(3)
    found = host.point()
    assert host.short() == ["own10"]
    assert blocks(found.increments["own10"]) == {1, 2, 3}
    assert blocks(found.increments["one"]) == {2, 3}
    # And what may have too much is not built on: else the next reading would seem to lack it.
    assert [one.identity.name for one in found.record.seen if one.changed is None] == ["own10"]


def test_wrong_guess_of_the_order_gives_too_much_and_never_too_little(host: Host) -> None:
    host.write(1)
    host.create("younger", at=5, parent=None)  # by its creationTime the older one
    host.write(2)
    found = host.point()
    assert blocks(found.increments["own10"]) == {1, 2}
    assert blocks(found.increments["younger"]) == {1, 2}
    host.write(3)
    found = host.point()
    assert found.doubt is None
    assert labels(found)[1:4] == [30, 30, 30]


def test_carried_over_by_a_bridge_that_may_be_younger_than_the_base_is_not_built_on(host: Host) -> None:
    host.point(make="own20")
    host.create("foreign", at=900, parent="own10")
    found = host.point()
    assert host.planned is not None
    assert (host.short(), host.planned.base) == (["own20"], {"vda": "foreign"})
    assert set(found.increments) == {"own10", "own20", "foreign"}
    assert [one.identity.name for one in found.record.seen if one.changed is not None] == ["foreign"]


def test_what_was_not_settled_when_one_disk_was_resized_is_not_settled_for_the_other(host: Host) -> None:
    host.create("foreign", at=999)
    host.size = 2 * SIZE
    assert host.point().left_out == {"own10": VOID, "foreign": UNSETTLED}
    live = [replace(one, disks=("vda", "vdb")) for one in host.live.values()]
    disks = {"vda": DiskNow(host.path, host.image), "vdb": DiskNow("/vdb", None)}
    planned = plan(live, disks, host.records, clock=1000.5)
    assert planned.base == {"vdb": "own10"}
    assert planned.unsettled == ("foreign",)


def test_disk_without_checkpoints_is_new_at_every_point() -> None:
    host = Host()
    host.point()
    found = host.point()
    assert host.planned is not None
    assert (host.planned.short, host.planned.base, found.increments) == ((), {}, {})
    assert labels(found) == [20] * 16


def test_each_disk_has_its_own_base_and_jobs_are_shared() -> None:
    def checkpoint(name: str, parent: str | None, *disks: str) -> Checkpoint:
        return Checkpoint(name, 5, parent, "", disks)

    live = [
        checkpoint("c3", "c2", "vda"),
        checkpoint("c1", None, "vda", "vdb"),
        checkpoint("c2", "c1", "vda", "vdb"),
    ]
    disks = {name: DiskNow(f"/{name}", None) for name in ("vda", "vdb", "vdc")}
    planned = plan(live, disks, {}, clock=100)
    assert [(job.checkpoint, job.disks) for job in planned.short] == [("c1", ("vda", "vdb")), ("c2", ("vda",))]
    assert planned.base == {"vda": "c3", "vdb": "c2"}
    readings = {
        ("c1", "vda"): changed(1),
        ("c1", "vdb"): changed(2),
        ("c2", "vda"): changed(3),
        ("c2", "vdb"): changed(4),
        ("c3", "vda"): changed(5),
    }
    found = conclude(planned, readings, live, {"vda": SIZE, "vdb": SIZE}, instant=9, chunk=1)
    assert {name: blocks(each) for name, each in found["vdb"].increments.items()} == {"c2": {4}, "c1": {2, 4}}
    # Order is libvirt's, over checkpoints that do not have the disk as well.
    assert [one.identity.name for one in found["vda"].record.seen] == ["c1", "c2", "c3"]


def test_order_is_kept_over_checkpoints_without_the_disk() -> None:
    live = [
        Checkpoint("a", 9, None, "", ("vda",)),
        Checkpoint("b", 8, "a", "", ()),
        Checkpoint("c", 7, "b", "", ("vda",)),
    ]
    planned = plan(live, {"vda": DiskNow("/a", None)}, {}, clock=100)
    readings = {("a", "vda"): changed(1, 2), ("c", "vda"): changed(2)}
    found = conclude(planned, readings, live, {"vda": SIZE}, instant=9, chunk=1)["vda"]
    assert [one.identity.name for one in found.record.seen] == ["a", "c"]
