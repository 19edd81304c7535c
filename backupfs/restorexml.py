# SPDX-License-Identifier: GPL-3.0-or-later
"""The definition that lies beside copied disks, and fits them. Pure.

    of the domain                          beside vda.raw
    <disk type='file' device='disk'>       <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>     <driver name='qemu' type='raw'/>
      <source file='/images/vda.qcow2'/>     <source file='/images/vda.qcow2'/>
      <backingStore>…</backingStore>
      <encryption>…</encryption>
    </disk>                                </disk>

The image of a form is one file, in the form's format, in plain text; so the definition says so.
With the domain's own, QEMU would refuse the image, or take a raw disk's first bytes for another
format's header. Where the disks lie is left as it was: only who restores knows where they
will lie, and in most cases it is there.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Collection
from typing import Final

from backupfs.domainxml import parse_root, render_root

# Elements of a disk that tell of a file which is not the one that is there.
_OF_DISK: Final = ("backingStore", "mirror", "encryption")
_OF_SOURCE: Final = ("encryption", "slices", "dataStore")
# What only a qcow2 driver takes; libvirt refuses it with any other.
_OF_QCOW2: Final = "metadata_cache"
_QCOW2_ONLY: Final = "discard_no_unref"


def render_restore(xml: str, disks: Collection[str], form: str) -> str:
    """Return the definition *xml* with the disks of the targets *disks* as files in the format *form*.

    All else stays as it is; where nothing has to change, to the byte. Raises BadXml.
    """
    root = parse_root(xml, "the domain's definition")
    before = render_root(root)
    for disk in root.findall("devices/disk"):
        target = disk.find("target")
        if target is not None and target.get("dev") in disks:
            _describe(disk, form)
    after = render_root(root)
    return xml if after == before else after


def _describe(disk: ET.Element, form: str) -> None:
    _drop(disk, _OF_DISK)
    for source in disk.findall("source"):
        _drop(source, _OF_SOURCE)
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", name="qemu")
        disk.insert(0, driver)
    driver.set("type", form)
    if form != "qcow2":
        _drop(driver, (_OF_QCOW2,))
        driver.attrib.pop(_QCOW2_ONLY, None)


def _drop(element: ET.Element, tags: Collection[str]) -> None:
    for child in [child for child in element if child.tag in tags]:
        element.remove(child)
