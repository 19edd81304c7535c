# SPDX-License-Identifier: GPL-3.0-or-later
"""The soak test's own judgement: one instant passes, two do not."""

from __future__ import annotations

import pytest
from lab import soak


@pytest.mark.parametrize("found", [[7, 7, 7, 7], [8, 8, 7, 7], [8, 7, 7, 7], [8, 8, 8, 8]])
def test_numbers_of_one_instant_pass(found: list[int]) -> None:
    soak.check_generations(found)


@pytest.mark.parametrize("found", [[7, 8, 8, 8], [8, 7, 8, 7], [9, 8, 8, 7], [9, 7, 7, 7], [8, 8, 6, 7]])
def test_numbers_of_two_instants_do_not(found: list[int]) -> None:
    with pytest.raises(soak.Wrong, match="a mix of instants"):
        soak.check_generations(found)


def test_numbers_are_read_where_the_guest_writes_them() -> None:
    image = bytearray(soak.BLOCKS * soak.MIB)
    for number in range(soak.BLOCKS):
        image[number * soak.MIB : number * soak.MIB + soak.BLOCK] = b"%04096d" % (40 - number)
    assert soak.generations(bytes(image)) == list(range(40, 40 - soak.BLOCKS, -1))
    image[3 * soak.MIB + 5] = 0
    with pytest.raises(soak.Wrong, match="block 3"):
        soak.generations(bytes(image))
