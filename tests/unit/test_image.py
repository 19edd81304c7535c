# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from backupfs.extents import DIRTY, ZERO, Builder, seek_dense, uniform
from backupfs.image import Literal, RawImage, Span, Zeros


def test_raw_image_makes_up_zeros_only_where_the_map_says_zero() -> None:
    builder = Builder(30)
    for flags in (0, ZERO, DIRTY):
        builder.append(10, flags)
    image = RawImage("vda", builder.finish())
    assert (image.size, image.allocated) == (30, 20)
    assert list(image.segments(5, 25)) == [Span("vda", 5, 5), Zeros(10), Span("vda", 20, 5)]


def test_literal_knows_its_length() -> None:
    assert Literal(b"abc").length == 3


async def test_a_hole_ends_at_data_and_the_end_of_the_image_is_a_hole() -> None:
    builder = Builder(30)
    for flags in (DIRTY, ZERO, ZERO | DIRTY, 0):
        builder.append(10 if not flags else 5 if flags & ZERO else 10, flags)
    image = RawImage("vda", builder.finish())
    assert [await image.seek(offset, data=True) for offset in (0, 9, 10, 19, 20, 29, 30, 31, -1)] == [
        0, 9, 20, 20, 20, 29, None, None, None,
    ]  # fmt: skip
    assert [await image.seek(offset, data=False) for offset in (0, 9, 10, 19, 20, 29, 30, 31, -1)] == [
        10, 10, 10, 19, 30, 30, None, None, None,
    ]  # fmt: skip


async def test_no_data_is_found_in_a_hole_that_reaches_to_the_end() -> None:
    image = RawImage("vda", uniform(10, ZERO))
    assert [await image.seek(offset, data=True) for offset in (0, 9)] == [None, None]
    assert [await image.seek(offset, data=False) for offset in (0, 9)] == [0, 9]


async def test_a_dense_file_answers_as_an_image_without_zeros_does() -> None:
    image = RawImage("vda", uniform(10, DIRTY))
    for offset in range(-1, 12):
        for data in (True, False):
            assert seek_dense(10, offset, data=data) == await image.seek(offset, data=data)
    assert seek_dense(0, 0, data=True) is seek_dense(0, 0, data=False) is None
