# SPDX-License-Identifier: GPL-3.0-or-later
"""Maps against a bytearray that holds the flags of each byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backupfs.extents import ZERO, Builder, ExtentMap, combine
from backupfs.image import RawImage

runs = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3)), max_size=30)


def built(pieces: list[tuple[int, int]]) -> tuple[ExtentMap, bytes]:
    plain = b"".join(bytes([flags]) * length for length, flags in pieces)
    builder = Builder(len(plain))
    for length, flags in pieces:
        builder.append(length, flags)
    return builder.finish(), plain


def flat(found: ExtentMap, start: int, stop: int) -> bytes:
    position, out = start, b""
    for begin, end, flags in found.iter_range(start, stop):
        assert begin == position < end
        out += bytes([flags]) * (end - begin)
        position = end
    assert position == stop
    return out


@given(runs, st.data())
def test_any_range_of_any_map_is_what_was_put_in(pieces: list[tuple[int, int]], data: st.DataObject) -> None:
    found, plain = built(pieces)
    start = data.draw(st.integers(0, len(plain)))
    stop = data.draw(st.integers(start, len(plain)))
    assert flat(found, start, stop) == plain[start:stop]
    for flag in (1, 2):
        assert found.total(flag) == sum(bool(byte & flag) for byte in plain)
        rest = [bool(byte & flag) for byte in plain[start:]]
        for wanted in (True, False):
            expected = start + rest.index(wanted) if wanted in rest else None
            assert found.find(start, flag, wanted) == expected


@given(runs, runs)
def test_combining_is_byte_by_byte(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    first, plain = built(one)
    second, more = built(other)
    size = min(len(plain), len(more))
    first, plain = built([(1, byte) for byte in plain[:size]])
    second, more = built([(1, byte) for byte in more[:size]])
    both = combine(first, second, lambda a, b: a & b)
    assert flat(both, 0, size) == bytes(a & b for a, b in zip(plain, more, strict=True))
    # As few extents as can be.
    assert len(both) == sum(
        1 for i, byte in enumerate(flat(both, 0, size)) if i == 0 or byte != flat(both, 0, size)[i - 1]
    )


@given(runs)
async def test_seeks_walk_over_exactly_the_bytes_that_are_not_zero(pieces: list[tuple[int, int]]) -> None:
    found, plain = built(pieces)
    image = RawImage(None, found)
    seen = bytearray(len(plain))
    position = 0
    while (start := await image.seek(position, data=True)) is not None:
        stop = await image.seek(start, data=False)
        assert stop is not None
        assert position <= start < stop
        seen[start:stop] = b"\1" * (stop - start)
        position = stop
    assert seen == bytes(not byte & ZERO for byte in plain)
