# SPDX-License-Identifier: GPL-3.0-or-later
"""A checkpoint's XML and its name, as we write them. Pure.

    checkpoint=daily-%a ─name_checkpoint─► daily-mon ─render_checkpoint─► backupBegin(…, checkpoint)

Every disk is named in it, also those without: one that is not makes libvirt guess, and fail.
"""

from __future__ import annotations

import itertools
import re
import time
import xml.etree.ElementTree as ET
from collections.abc import Collection
from typing import Final

from backupfs.domainxml import Disk, Reason, parse_root, render_root

# Libvirt's own rule (domaincheckpoint.rng).
_NAME: Final = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]*")
LONGEST_CHECKPOINT: Final = 200  # libvirt adds a suffix to make it a file's name, and fails after the bitmap is made
QCOW2_V2: Final = 2


def why_bad_name(name: str) -> str | None:
    """Say why libvirt can have no checkpoint called *name*; None if it can."""
    if not _NAME.fullmatch(name):
        return "a name has letters from a to z, digits, and _ . - in it, and no dot at its begin"
    if len(name) > LONGEST_CHECKPOINT:
        return f"it is longer than {LONGEST_CHECKPOINT} characters"
    return None


def name_checkpoint(template: str, now: float, taken: Collection[str]) -> str:
    """Return the name that *template* (as strftime(3) has it) makes of *now*, with a number where it is *taken*."""
    name = time.strftime(template, time.localtime(now))
    if name not in taken:
        return name
    return next(made for number in itertools.count(2) if (made := f"{name}-{number}") not in taken)


def why_no_bitmap(disk: Disk, qcow2_version: int | None = None) -> Reason | None:
    """Say why *disk* cannot hold the bitmap of a checkpoint; None if it can, as far as is known."""
    if disk.format != "qcow2":
        return Reason(
            f"a {disk.format} disk cannot hold the bitmap of a checkpoint",
            f"`qemu-img convert -O qcow2` it, or copy raw/{disk.target}.raw whole",
        )
    if disk.read_only:
        return Reason("a read-only disk has no checkpoint, for nothing changes in it", "copy it once")
    if disk.transient:
        return Reason("a transient disk has no checkpoint: it is thrown away with the guest", "copy it whole")
    if qcow2_version == QCOW2_V2:
        return Reason(
            "a qcow2 disk of version 2 cannot hold the bitmap of a checkpoint",
            "`qemu-img amend -o compat=1.1` it while the guest is off",
        )
    return None


def render_checkpoint(name: str, description: str, disks: Collection[Disk], tracked: Collection[str]) -> str:
    """Write a checkpoint's XML: with a bitmap on the disks *tracked*, and none on the others."""
    root = ET.Element("domaincheckpoint")
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "description").text = description
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        ET.SubElement(listed, "disk", name=disk.target, checkpoint="bitmap" if disk.target in tracked else "no")
    return ET.tostring(root, encoding="unicode")


def render_redefinition(xml: str, known: Collection[str], otherwise: str | None) -> str:
    """Return a checkpoint's XML with a parent that libvirt knows: its own, *otherwise*, or none; raise BadXml."""
    root = parse_root(xml, "the checkpoint")
    parent = root.findtext("parent/name")
    if parent in known:
        return xml
    for element in root.findall("parent"):
        root.remove(element)
    if otherwise is not None:
        ET.SubElement(ET.SubElement(root, "parent"), "name").text = otherwise
    return render_root(root)
