# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast it is, beside its rivals on the same export. Run by contrib/bench, never by the tests.

    images ──► guests ──► one backup job ──┬── backupfs, its mount
                                           ├── nbdfuse, as shipped and reading 1 MiB ahead
               the rivals ask the job's    ├── qemu-storage-daemon's FUSE export
               own NBD server              ├── nbdcopy: no file system, the practical limit
                                           └── a pyfuse3 file system that answers from memory

Law: what is compared was measured in one run, in turn, round by round, with nothing of it in
the page cache of any mount; the images are, so that no figure is the disk's. A figure is data:
who did what, its unit, its targets, and how one round of it is measured.
"""
