# SPDX-License-Identifier: GPL-3.0-or-later
"""The one part that is not Python; all else about the build is in pyproject.toml.

Optional: without a compiler or libfuse's headers backupfs installs all the same, and
`backupfs status` says what it lacks.
"""

import shlex
import subprocess

from setuptools import Extension, setup


def fuse_flags() -> list[str]:
    """Ask where libfuse's headers are; without pkg-config look where compilers look anyway."""
    try:
        asked = subprocess.run(["pkg-config", "--cflags", "fuse3"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    # The sources say <fuse3/…>, for which pkg-config's folder is one too deep.
    return [word.removesuffix("/fuse3") for word in shlex.split(asked.stdout)]


setup(
    ext_modules=[
        Extension(
            "backupfs._libfuse",
            sources=["backupfs/_libfuse.c"],
            extra_compile_args=[*fuse_flags(), "-D_FILE_OFFSET_BITS=64", "-fvisibility=hidden", "-Wall", "-Wextra"],
            optional=True,
        )
    ]
)
