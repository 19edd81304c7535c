# SPDX-License-Identifier: GPL-3.0-or-later
"""Mount a libvirt domain as a directory: its disks as files, as they were at one instant."""

__version__ = "0.1.0"
