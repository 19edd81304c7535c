# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m backupfs`."""

from backupfs.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
