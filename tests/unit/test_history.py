# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import json
import subprocess
import sys
import zlib
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from backupfs.changes import BLOCK, everything, from_bounds, nothing
from backupfs.history import MAGIC, Damaged, ImageIdentity, Record, Seen, bounded, decode, encode
from backupfs.labels import uniform
from backupfs.lineage import Identity, Mark

SIZE = 20 * BLOCK - 7
OWNER = "host/domain"


def record(**fields: Any) -> Record:
    found = Record(
        disk="vda",
        path="/images/\udcff.qcow2",
        image=ImageIdentity(64769, 12, 1_763_999_999_123_456_789),
        size=SIZE,
        instant=200,
        since=100,
        labels=uniform(SIZE, 100).relabel(from_bounds(SIZE, array("I", [2, 5])), 200),
        seen=(
            Seen(Identity("monday", 90, None), everything(SIZE)),
            Seen(Identity("lost", 91, None), None),
            Seen(Identity("void", 91, None), None, void=True),
            Seen(Identity("own", 92, Mark(100, "0" * 32)), from_bounds(SIZE, array("I", [2, 5]))),
        ),
        chunk=4 * BLOCK,
        chunk_floor=150,
    )
    return replace(found, **fields)


def rewritten(change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a file whose checksum is right and whose header is not."""
    unpacked = zlib.decompress(encode(record(), OWNER).partition(b"\n")[2])
    stop = 4 + int.from_bytes(unpacked[:4], "big")
    header = json.loads(unpacked[4:stop])
    change(header)
    text = json.dumps(header).encode()
    body = zlib.compress(len(text).to_bytes(4, "big") + text + unpacked[stop:])
    return MAGIC + b"%08x\n" % zlib.crc32(body) + body


@pytest.mark.parametrize(
    "fields", [{}, {"image": None}, {"seen": ()}, {"size": 0, "labels": uniform(0, 5), "seen": ()}]
)
def test_record_comes_back_as_it_was(fields: dict[str, Any]) -> None:
    assert decode(encode(record(**fields), OWNER), OWNER) == record(**fields)


def test_any_flipped_bit_and_any_cut_is_noticed() -> None:
    contents = encode(record(), OWNER)
    for place in range(len(contents)):
        damaged = bytearray(contents)
        damaged[place] ^= 1 << place % 8
        for broken in (bytes(damaged), contents[:place]):
            with pytest.raises(Damaged):
                decode(broken, OWNER)


def test_record_of_another_domain_is_none() -> None:
    with pytest.raises(Damaged, match="written for other/domain"):
        decode(encode(record(), "other/domain"), OWNER)


@pytest.mark.parametrize("piece", [1, 3, 7, 64])
def test_record_is_read_in_pieces_of_any_length(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backupfs.history._PIECE", piece)
    assert decode(encode(record(), OWNER), OWNER) == record()


def test_what_follows_a_record_is_noticed() -> None:
    unpacked = zlib.decompress(encode(record(), OWNER).partition(b"\n")[2])
    for body in (zlib.compress(unpacked + b"x"), zlib.compress(unpacked)[:-1], zlib.compress(unpacked[:-1])):
        with pytest.raises(Damaged):
            decode(MAGIC + b"%08x\n" % zlib.crc32(body) + body, OWNER)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.update(byteorder="middle"),
        lambda header: header.pop("size"),
        lambda header: header.update(size="20"),
        lambda header: header.update(size=True),
        lambda header: header.update(instant=-1),
        lambda header: header.update(instant=199),
        lambda header: header.update(since=201),
        lambda header: header.update(chunk_floor=201),
        lambda header: header.update(labels=[2, "I"]),
        lambda header: header.update(labels=[10**9, "I"]),
        lambda header: header.update(labels=[-1, "I"]),
        lambda header: header.update(labels=[3, "b"]),
        lambda header: header.update(labels=[3, "d"]),
        lambda header: header.update(labels=3),
        lambda header: header.update(image=[1, 2]),
        lambda header: header["seen"][0].update(bounds=4),
        lambda header: header["seen"].pop(),
        lambda header: header.update(size=2**50),
    ],
)
def test_header_that_contradicts_the_rest_is_noticed(change: Callable[[dict[str, Any]], object]) -> None:
    assert decode(rewritten(lambda _: None), OWNER) == record()
    with pytest.raises(Damaged):
        decode(rewritten(change), OWNER)


def test_chunk_files_are_as_new_as_their_size() -> None:
    assert record().chunk_label(0, BLOCK) == 150
    assert record().chunk_label(0, 3 * BLOCK) == 200


def test_what_changed_before_the_history_is_not_known() -> None:
    assert record().changed_since(99) is None
    assert record().changed_since(100) == from_bounds(SIZE, array("I", [2, 5]))


def test_oldest_sets_are_left_out_where_there_are_too_many_runs() -> None:
    one = from_bounds(SIZE, array("I", [0, 1, 2, 3]))
    seen = [Seen(Identity(name, 1, None), one) for name in "abc"]
    kept = [each.changed is not None for each in bounded(seen, most=3)]
    assert kept == [False, True, True]
    kept = [each.changed is not None for each in bounded(seen, most=0)]
    assert kept == [False, False, True]
    assert bounded(seen) == tuple(seen)
    spoiled = [Seen(Identity("a", 1, None), None, void=True)]
    assert bounded([*spoiled, *seen], most=0)[0] == spoiled[0]


def test_thin_disk_of_sixteen_tebibytes_takes_a_few_hundred_bytes() -> None:
    size = 2**44
    labels = uniform(size, 100).relabel(from_bounds(size, array("I", [2**20, 2**21])), 200)
    seen = (Seen(Identity("own", 92, Mark(100, "0" * 32)), nothing(size)),)
    assert len(encode(record(size=size, labels=labels, seen=seen), OWNER)) < 600


MEMORY = """
from array import array
from backupfs.changes import BLOCK, from_bounds, from_extents, nothing, union
from backupfs.extents import DIRTY, Builder
from backupfs.history import Record, Seen, decode, encode
from backupfs.labels import uniform
from backupfs.lineage import Identity

def peak():
    with open("/proc/self/status") as file:  # getrusage tells the parent's, too
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

before = peak()
size = 2**21 * BLOCK
builder = Builder(size)
for _ in range(2**20):  # every second block
    builder.append(BLOCK, DIRTY)
    builder.append(BLOCK, 0)
changes = from_extents(builder.finish())
del builder
labels = uniform(size, 100).relabel(changes, 200)
record = Record("vda", "/a", None, size, 200, 100, labels, (Seen(Identity("own", 9, None), changes),), BLOCK, 100)
contents = encode(record, "owner")
del record, labels, changes
found = decode(contents, "owner")
assert (len(found.labels), len(found.seen[0].changed)) == (2**21, 2**20)
print(peak() - before)
"""


def test_two_million_extents_take_less_than_60_megabytes() -> None:
    """The bitmap, the set, the labels that follow from it, the file, and what comes back from the file."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60e6, done.stdout
