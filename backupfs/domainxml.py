# SPDX-License-Identifier: GPL-3.0-or-later
"""Libvirt's XML: what is read out of it, and the backup job's that is written. Pure.

The XML comes from a guest's host, which a guest may have taken over: it is parsed without
entities, and no name in it is trusted to be a file name before `file_name` has said so.
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from backupfs.errors import BadXml, DiskUnusable, UsageError

LONGEST_NAME: Final = 255  # bytes in a file name
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_LABEL: Final = re.compile(r"\+(\d+):\+(\d+)")

ET.register_namespace("qemu", "http://libvirt.org/schemas/domain/qemu/1.0")


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is not there, and what would bring it."""

    text: str
    cure: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A `<disk>`. `source` is a path or a network name; `chain` all local files it consists of."""

    target: str
    device: str
    bus: str
    source_type: str
    format: str
    source: str | None
    chain: tuple[str, ...] = ()
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """What backupfs wants to know of a domain; `id` is -1 unless it runs."""

    name: str
    uuid: str
    id: int
    nvram: str | None = None
    qemu_user: tuple[int, int] | None = None  # uid, gid
    agent_connected: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """Which disks take part in the backup, and why the others do not."""

    taking: tuple[Disk, ...]
    left_out: Mapping[str, Reason] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BackupJob:
    """A `<domainbackup>`. `socket` is None where it does not serve on a unix socket."""

    mode: str
    socket: str | None
    scratches: Mapping[str, str] = field(default_factory=dict)  # by target
    indexes: Mapping[str, int] = field(default_factory=dict)  # of the scratch nodes, by target


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A `<domaincheckpoint>`. `creation_time` is by libvirtd's clock, and orders nothing."""

    name: str
    creation_time: int
    parent: str | None = None
    description: str = ""
    disks: tuple[str, ...] = ()


def _parse(xml: str, what: str) -> ET.Element:
    try:
        root = defusedxml.ElementTree.fromstring(xml, forbid_dtd=True)
    except (ET.ParseError, DefusedXmlException, ValueError) as error:
        raise BadXml(what, str(error) or type(error).__name__) from error
    assert isinstance(root, ET.Element)
    return root


def _integer(text: str | None, what: str, default: int | None = None) -> int:
    if text is None and default is not None:
        return default
    try:
        return int((text or "").strip())
    except ValueError:
        raise BadXml(what, f"{text!r} is not a number") from None


def file_name(name: str) -> str | None:
    """Return *name* if it may be a file's name as it stands, else None."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return None
    fits = 0 < len(encoded) <= LONGEST_NAME and name not in (".", "..")
    return name if fits and "/" not in name and not _CONTROL.search(name) else None


# --- reading -----------------------------------------------------------------------------------


def parse_host_uuid(capabilities: str) -> str:
    """Return the UUID of libvirt's host; "unknown" where it tells none."""
    text = _parse(capabilities, "the host's capabilities").findtext("host/uuid")
    return text.strip().lower() if text and re.fullmatch(r"[0-9a-fA-F-]{1,64}", text.strip()) else "unknown"


def parse_domain(xml: str) -> DomainFacts:
    """Read a domain's definition."""
    root = _parse(xml, "the domain's definition")
    nvram = root.find("os/nvram")
    path = None
    if nvram is not None:
        source = nvram.find("source")
        path = source.get("file") if source is not None else (nvram.text or "").strip() or None
    user = None
    for label in root.findall("seclabel[@model='dac']/label"):
        if match := _LABEL.fullmatch((label.text or "").strip()):
            user = int(match[1]), int(match[2])
    agents = root.findall("devices/channel/target[@name='org.qemu.guest_agent.0']")
    return DomainFacts(
        name=root.findtext("name") or "",
        uuid=root.findtext("uuid") or "",
        id=_integer(root.get("id"), "the domain's definition", -1),
        nvram=path,
        qemu_user=user,
        agent_connected=any(agent.get("state") == "connected" for agent in agents),
    )


def parse_disks(xml: str) -> tuple[Disk, ...]:
    """Read the disks out of a live definition, in its order."""
    return tuple(_disk(element) for element in _parse(xml, "the domain's definition").findall("devices/disk"))


def _disk(element: ET.Element) -> Disk:
    target, driver, source = element.find("target"), element.find("driver"), element.find("source")
    if target is None or not target.get("dev"):
        raise BadXml("the domain's definition", "a disk without a target")
    return Disk(
        target=target.get("dev", ""),
        device=element.get("device", "disk"),
        bus=target.get("bus", ""),
        source_type=element.get("type", "file"),
        format=(driver.get("type") if driver is not None else None) or "raw",
        source=_source(source),
        chain=tuple(_chain(element)),
        read_only=element.find("readonly") is not None,
    )


def _source(source: ET.Element | None) -> str | None:
    if source is None:
        return None
    for attribute in ("file", "dev", "dir"):
        if source.get(attribute):
            return source.get(attribute)
    if source.get("protocol"):
        host = source.find("host")
        at = (host.get("name") or host.get("socket") or "") if host is not None else ""
        return f"{source.get('protocol')}://{at}/{source.get('name', '')}"
    if source.get("volume"):
        return f"{source.get('pool', '')}/{source.get('volume')}"
    return None


def _chain(element: ET.Element) -> Iterator[str]:
    for source in element.iter("source"):
        for attribute in ("file", "dev"):
            if path := source.get(attribute):
                yield path


def parse_backup(xml: str) -> BackupJob:
    """Read a backup job."""
    root = _parse(xml, "the backup job")
    server = root.find("server")
    scratches, indexes = {}, {}
    for disk in root.findall("disks/disk"):
        scratch = disk.find("scratch")
        if scratch is not None and (path := scratch.get("file") or scratch.get("dev")):
            scratches[disk.get("name", "")] = path
        if (index := disk.get("index")) is not None:
            indexes[disk.get("name", "")] = _integer(index, "the backup job")
    return BackupJob(
        mode=root.get("mode", "push"),
        socket=server.get("socket") if server is not None else None,
        scratches=scratches,
        indexes=indexes,
    )


def parse_checkpoint(xml: str) -> Checkpoint:
    """Read a checkpoint."""
    root = _parse(xml, "the checkpoint")
    return Checkpoint(
        name=root.findtext("name") or "",
        creation_time=_integer(root.findtext("creationTime"), "the checkpoint", 0),
        parent=root.findtext("parent/name"),
        description=root.findtext("description") or "",
        disks=tuple(
            disk.get("name", "") for disk in root.findall("disks/disk") if disk.get("checkpoint", "bitmap") == "bitmap"
        ),
    )


def strip_secrets(xml: str) -> str:
    """Return *xml* without what libvirt itself shows only to those allowed to see secrets."""
    root = _parse(xml, "the definition")
    for element in root.iter():
        if element.tag == "graphics":
            element.attrib.pop("passwd", None)
            element.attrib.pop("passwdValidTo", None)
        # QEMU's command line and environment by hand: passwords are passed so.
        if element.tag.endswith("}env"):
            element.attrib.pop("value", None)
    return ET.tostring(root, encoding="unicode") + "\n"


# --- choosing ----------------------------------------------------------------------------------


def select_disks(
    disks: tuple[Disk, ...],
    *,
    domain: str,
    only: Collection[str] | None,
    exclude: Collection[str],
    scratch: str | None,
) -> Selection:
    """Decide which disks take part.

    What can never be in a backup (cdroms, floppies, empty drives, passed-through LUNs) is left
    out with its reason. A disk that could be, but not as things are, raises DiskUnusable: left
    out in silence it would be missed at the restore. A name that no disk has raises UsageError.
    """
    names = [disk.target for disk in disks]
    for option, wanted in (("disks", only or ()), ("exclude", exclude)):
        for name in wanted:
            if name not in names:
                raise UsageError(f"{option}={name}: {domain} has no such disk; it has {', '.join(names) or 'none'}")
    taking, left_out = [], {}
    for disk in disks:
        reason = _never(disk)
        if reason is None and only is not None and disk.target not in only:
            reason = Reason("not named by disks=", f"add it: -o disks=…:{disk.target}")
        if reason is None and disk.target in exclude:
            reason = Reason("named by exclude=", "leave it out of exclude=")
        if reason is not None:
            left_out[disk.target] = reason
            continue
        _check_usable(disk, domain, scratch)
        taking.append(disk)
    return Selection(tuple(taking), left_out)


def _never(disk: Disk) -> Reason | None:
    if disk.device in ("cdrom", "floppy"):
        return Reason(f"a {disk.device}", "copy its medium from where it lies")
    if disk.device == "lun":
        return Reason("a SCSI LUN that is passed through", "back it up where it is provided, or inside the guest")
    if disk.source is None:
        return Reason("an empty drive", "nothing to do")
    if disk.source_type in ("vhostuser", "vhostvdpa", "nvme", "dir"):
        return Reason(f"QEMU does not do the I/O of a {disk.source_type} disk", "back it up where it is provided")
    return None


def _check_usable(disk: Disk, domain: str, scratch: str | None) -> None:
    if file_name(disk.target + ".inc.qcow2") is None:
        raise DiskUnusable(
            domain,
            ascii(disk.target),
            "its name cannot be a file's",
            f"leave it out: -o exclude={disk.target!a}",
        )
    if disk.source_type != "file" and scratch is None:
        raise DiskUnusable(
            domain,
            disk.target,
            f"it is a {disk.source_type} disk, so there is no folder beside it for the scratch file",
            f"name one with -o scratch=DIR, or leave the disk out with -o exclude={disk.target}",
        )


# --- writing -----------------------------------------------------------------------------------


def scratch_path(disk: Disk, job_id: str, folder: str | None, domain: str) -> str:
    """Return where QEMU shall save the old blocks: beside the disk, or in *folder*."""
    if folder is None:
        assert disk.source is not None  # select_disks saw to it
        return f"{disk.source}.backupfs-{job_id}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", domain)[:100]
    return os.path.join(folder, f"{safe}-{disk.target}.backupfs-{job_id}")


def render_backup(
    disks: tuple[Disk, ...], taking: tuple[Disk, ...], *, socket: str, scratches: Mapping[str, str]
) -> str:
    """Write a pull-mode job's XML.

    Every disk is named, also those that take no part: one that is not makes libvirt guess.
    """
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        if disk not in taking:
            ET.SubElement(listed, "disk", name=disk.target, backup="no")
            continue
        element = ET.SubElement(listed, "disk", name=disk.target, backup="yes", type="file", exportname=disk.target)
        ET.SubElement(element, "driver", type="qcow2")
        ET.SubElement(element, "scratch", file=scratches[disk.target])
    return ET.tostring(root, encoding="unicode")
