# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import pytest

from backupfs.qcow2layout import TooLarge, lay_out

TIB = 2**40


def test_the_parts_follow_each_other() -> None:
    layout = lay_out(16 * TIB, l2=5, data=100)
    assert (layout.l1_entries, layout.l1) == (32768, 4)
    assert (layout.first_block, layout.first_l1, layout.first_l2, layout.first_data) == (2, 3, 7, 12)
    assert layout.clusters == 112


@pytest.mark.parametrize("data", [*range(1, 400), 32758, 32759, 32760, 10**5, 10**7])
def test_refcounts_count_themselves_with_no_block_too_many(data: int) -> None:
    layout = lay_out(data * 512, l2=0, data=data, bits=9)
    per_block, per_table = 256, 64
    assert layout.refcount_blocks == -(-layout.clusters // per_block)
    assert layout.refcount_tables == -(-layout.refcount_blocks // per_table)


def test_odd_sizes_become_whole_sectors() -> None:
    assert [lay_out(size, l2=0, data=0).disk_size for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_what_qemu_would_not_open_is_refused() -> None:
    assert lay_out(2**51, l2=0, data=0).l1_entries * 8 == 2**25
    with pytest.raises(TooLarge, match=r"QEMU opens no .* 2251799813685760 bytes"):
        lay_out(2**51 + 1, l2=0, data=0)
    # Nor where the disk itself would do, but not the file, which has its tables besides.
    with pytest.raises(TooLarge):
        lay_out(2**51, l2=2**22, data=2**35)
