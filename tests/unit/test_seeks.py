# SPDX-License-Identifier: GPL-3.0-or-later
"""What can be told without a mount; the rest is in tests/integration/test_seeks.py."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import backupfs
from backupfs import _libfuse
from backupfs.seeks import Seeks


async def never(_handle: int, _offset: int, _whence: int) -> int:
    raise AssertionError


def test_the_extension_compiles_without_a_warning() -> None:
    compiler = shutil.which("gcc")
    assert compiler, "contrib/setup installs gcc"
    source = Path(backupfs.__file__).with_name("_libfuse.c")
    subprocess.run(
        [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-D_FILE_OFFSET_BITS=64", "-fsyntax-only",
         f"-I{sysconfig.get_path('include')}", source],
        check=True,
    )  # fmt: skip


def test_the_extension_counts_sessions_and_not_intentions() -> None:
    seeks = Seeks(never)
    seeks.listen()
    assert _libfuse.sessions() == 0
    assert seeks.why_not is not None
    assert "pyfuse3 does not take the C extension up" in seeks.why_not
    seeks.end()
    assert _libfuse.end() == 0
