# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from backupfs.extents import DIRTY, ZERO, Builder
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
