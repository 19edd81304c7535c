# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import re

import pytest

from backupfs.domainxml import parse_disks
from backupfs.errors import BadXml
from backupfs.restorexml import render_restore

XML = """<domain type='kvm'><name>web01</name><metadata><app:note xmlns:app="urn:app">x</app:note></metadata><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none' discard_no_unref='on'><metadata_cache>
<max_size unit='bytes'>1000</max_size></metadata_cache></driver><source file='/images/vda.qcow2'>
<encryption format='luks'/><slices><slice type='storage' offset='0' size='1'/></slices><dataStore type='file'/>
</source><backingStore type='file'><format type='qcow2'/></backingStore><mirror/><encryption format='luks'/>
<target dev='vda' bus='virtio'/><serial>one</serial></disk>
<disk type='block' device='disk'><source dev='/dev/vg/web'/><target dev='vdb' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='/iso'/><target dev='sda'/></disk>
<disk><source file='/x'/></disk>
</devices></domain>"""


def squeezed(xml: str) -> str:
    return re.sub(r"\s*\n\s*", "", xml).replace("></source>", " />")


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_the_disks_are_described_as_the_files_that_lie_beside(form: str) -> None:
    found = squeezed(render_restore(XML, ["vda", "vdb"], form))
    more = ' discard_no_unref="on"' if form == "qcow2" else ""
    cache = '<metadata_cache><max_size unit="bytes">1000</max_size></metadata_cache>' if form == "qcow2" else ""
    assert (
        f'<disk type="file" device="disk"><driver name="qemu" type="{form}" cache="none"{more}'
        + (f">{cache}</driver>" if cache else " />")
        + '<source file="/images/vda.qcow2" /><target dev="vda" bus="virtio" /><serial>one</serial></disk>'
        f'<disk type="block" device="disk"><driver name="qemu" type="{form}" /><source dev="/dev/vg/web" />'
        '<target dev="vdb" bus="virtio" /></disk>'
    ) in found


def test_what_is_not_in_the_form_stays_as_it_is() -> None:
    found = render_restore(XML, ["vdb"], "qcow2")
    assert "<mirror" in found
    assert '<driver name="qemu" type="raw" />' in found  # the cdrom's
    assert render_restore(XML, [], "raw") == XML
    once = render_restore(XML, ["vda", "vdb"], "qcow2")
    assert render_restore(once, ["vda", "vdb"], "qcow2") == once
    assert [disk.format for disk in parse_disks(XML.replace("<disk><source file='/x'/></disk>", ""))] == [
        "qcow2",
        "raw",
        "raw",
    ]


def test_what_is_no_xml_is_refused() -> None:
    with pytest.raises(BadXml):
        render_restore("<domain>", ["vda"], "raw")
