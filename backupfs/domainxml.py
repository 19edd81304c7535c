# SPDX-License-Identifier: GPL-3.0-or-later
"""Libvirt's XML: what is read out of it, and the backup job's that is written. Pure.

    live definition ─parse_disks─► disks ─select_disks─► taking ─render_backup─► backupBegin
                                              └────────► left out, each with reason and cure

Law: the XML comes from a guest's host, which a guest may have taken over. It is parsed without
entities, every way in which it can be wrong is `BadXml`, and no name in it is trusted to be a file
name before `file_name` has said so.
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
LONGEST_TARGET: Final = 100  # bytes; libvirt's own are a few, and more must fit into one name with it
LONGEST_DOMAIN: Final = 100  # characters of its name in a scratch file's
SCRATCH_SUFFIX: Final = 40  # bytes, at least those of ".backupfs-" and a job's identifier
LARGEST_NUMBER: Final = 2**33  # as a time the year 2242; far beyond, it does not fit a file's
NBD_PORT: Final = "10809"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_LABEL: Final = re.compile(r"\+?([0-9]{1,10}):\+?([0-9]{1,10})")

_QEMU: Final = "http://libvirt.org/schemas/domain/qemu/1.0"
QEMU_ENV: Final = f"{{{_QEMU}}}env"

ET.register_namespace("qemu", _QEMU)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is not there, and what would bring it."""

    text: str
    cure: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A `<disk>`. `source` is a path or a network name; `chain` all local files it consists of.

    `encrypted` is set where any layer of it is; `secret` is then how libvirt's own XML refers to
    the passphrase: an attribute's name and value, ("uuid", …) or ("usage", …).
    """

    target: str
    device: str
    bus: str
    source_type: str
    format: str
    source: str | None
    chain: tuple[str, ...] = ()
    read_only: bool = False
    transient: bool = False
    encrypted: bool = False
    secret: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class DomainFacts:
    """What backupfs wants to know of a domain; `id` is -1 unless it runs."""

    name: str
    uuid: str
    id: int
    nvram: str | None = None
    qemu_user: tuple[int, int] | None = None  # uid, gid
    agent_connected: bool = False
    agent_present: bool = False  # there is a channel for one


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
    exports: Mapping[str, str] = field(default_factory=dict)  # NBD export names, by target
    tcp: str | None = None  # HOST:PORT

    @property
    def where(self) -> str:
        """Say, for a person, where the job's data goes."""
        return self.socket or self.tcp or ("files of its own" if self.mode == "push" else "another transport")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A `<domaincheckpoint>`. `creation_time` is by libvirtd's clock, and orders nothing."""

    name: str
    creation_time: int
    parent: str | None = None
    description: str = ""
    disks: tuple[str, ...] = ()


def parse_root(xml: str, what: str) -> ET.Element:
    """Return the root element, without entities ever being expanded; raise BadXml, which names *what*."""
    try:
        root = defusedxml.ElementTree.fromstring(xml, forbid_dtd=True)
    except (ET.ParseError, DefusedXmlException, ValueError) as error:
        raise BadXml(what, str(error) or type(error).__name__) from error
    assert isinstance(root, ET.Element)
    return root


def _integer(text: str | None, what: str, default: int) -> int:
    """Return the number in *text*, *default* if there is none; it may be the default, or 0 and more."""
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError:
        number = LARGEST_NUMBER
    if number != default and not 0 <= number < LARGEST_NUMBER:
        raise BadXml(what, f"{text[:40]!a} is not a number that can stand there")
    return number


def file_name(name: str) -> str | None:
    """Return *name* if it may be a file's name as it stands, else None.

    Refused are what the kernel refuses (empty, `/`, NUL, more than 255 bytes), what means another
    directory (`.`, `..`), what is not UTF-8 (it comes as surrogates), and control characters: the
    kernel would take those, but each script that lists such a name could be led astray.
    """
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return None
    fits = 0 < len(encoded) <= LONGEST_NAME and name not in (".", "..")
    return name if fits and "/" not in name and not _CONTROL.search(name) else None


# --- reading -----------------------------------------------------------------------------------


def parse_host_uuid(capabilities: str) -> str:
    """Return the UUID of libvirt's host; "unknown" where it tells none."""
    text = parse_root(capabilities, "the host's capabilities").findtext("host/uuid")
    return text.strip().lower() if text and re.fullmatch(r"[0-9a-fA-F-]{1,64}", text.strip()) else "unknown"


def parse_domain(xml: str) -> DomainFacts:
    """Read a domain's definition."""
    root = parse_root(xml, "the domain's definition")
    nvram = root.find("os/nvram")
    path = None
    if nvram is not None:
        source = nvram.find("source")
        path = (nvram.text or "").strip() or None if source is None else source.get("file") or source.get("dev")
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
        agent_present=bool(agents),
    )


def parse_disks(xml: str) -> tuple[Disk, ...]:
    """Read the disks out of a live definition, in its order."""
    return tuple(_disk(element) for element in parse_root(xml, "the domain's definition").findall("devices/disk"))


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
        chain=tuple(dict.fromkeys(_chain(element))),
        read_only=element.find("readonly") is not None,
        transient=element.find("transient") is not None,
        encrypted=element.find(".//encryption") is not None,
        secret=_secret(element),
    )


def _secret(disk: ET.Element) -> tuple[str, str] | None:
    """Return how the outermost encrypted layer's passphrase is referred to; libvirt keeps it."""
    for secret in disk.findall(".//encryption/secret[@type='passphrase']"):
        for attribute in ("uuid", "usage"):
            if value := secret.get(attribute):
                return attribute, value
    return None


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
    root = parse_root(xml, "the backup job")
    server = root.find("server")
    scratches, indexes, exports = {}, {}, {}
    for disk in root.findall("disks/disk"):
        scratch = disk.find("scratch")
        if scratch is not None and (path := scratch.get("file") or scratch.get("dev")):
            scratches[disk.get("name", "")] = path
        if (index := disk.get("index")) is not None:
            indexes[disk.get("name", "")] = _integer(index, "the backup job", 0)
        if export := disk.get("exportname"):
            exports[disk.get("name", "")] = export
    tcp = None
    if server is not None and server.get("name"):
        tcp = f"{server.get('name')}:{server.get('port', NBD_PORT)}"
    return BackupJob(
        mode=root.get("mode", "push"),
        socket=server.get("socket") if server is not None else None,
        scratches=scratches,
        indexes=indexes,
        exports=exports,
        tcp=tcp,
    )


def parse_checkpoint(xml: str) -> Checkpoint:
    """Read a checkpoint."""
    root = parse_root(xml, "the checkpoint")
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
    """Return *xml* without what libvirt shows only to those who are allowed to see secrets.

    That is what VIR_DOMAIN_XML_SECURE adds, and VIR_DOMAIN_XML_MIGRATABLE with it (compared on
    libvirt 9.0): the passwords of graphics and the cookies of disks read over HTTP. All other
    secrets are only referred to, by UUID. Where there is none the text is returned as it was, to
    the byte; else prefixes of namespaces, comments and quotes may change, and no meaning.
    """
    root = parse_root(xml, "the definition")
    found = False
    for element in list(root.iter()):
        if element.tag == "graphics":
            for name in ("passwd", "passwdValidTo"):
                found |= element.attrib.pop(name, None) is not None
        elif element.tag == "source":
            for cookies in element.findall("cookies"):
                element.remove(cookies)
                found = True
        # QEMU's environment by hand: passwords are passed so.
        elif element.tag == QEMU_ENV:
            found |= element.attrib.pop("value", None) is not None
    if not found:
        return xml if xml.endswith("\n") else xml + "\n"
    return render_root(root)


def render_root(root: ET.Element) -> str:
    """Write a definition that was read, and changed since; raise BadXml."""
    try:
        return ET.tostring(root, encoding="unicode") + "\n"
    except RecursionError:
        raise BadXml("the definition", "its elements are nested too deeply") from None


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
    out in silence it would be missed at the restore. So does one that `disks=` asks for by name
    and that can never be. A name that no disk has raises UsageError.
    """
    names = [disk.target for disk in disks]
    for option, wanted in (("disks", only or ()), ("exclude", exclude)):
        for name in wanted:
            if name not in names:
                raise UsageError(f"{option}={name}: {domain} has no such disk; it has {', '.join(names) or 'none'}")
    taking, left_out = [], {}
    for disk in disks:
        reason = _never(disk)
        if reason is not None and only is not None and disk.target in only and disk.target not in exclude:
            raise DiskUnusable(domain, disk.target, f"it is {reason.text}", f"take it out of disks=; {reason.cure}")
        if reason is None and only is not None and disk.target not in only:
            reason = Reason("not named by disks=", f"add it: -o disks=…:{disk.target}")
        if reason is None and disk.target in exclude:
            reason = Reason("named by exclude=", "leave it out of exclude=")
        if reason is not None:
            left_out[disk.target] = reason
            continue
        _check_usable(disk, domain, scratch)
        taking.append(disk)
    if scratch is None:
        _check_apart(taking, domain)
    return Selection(tuple(taking), left_out)


def _never(disk: Disk) -> Reason | None:
    if disk.device in ("cdrom", "floppy"):
        return Reason(f"a {disk.device}", "copy its medium from where it lies")
    if disk.device == "lun":
        return Reason("a SCSI LUN that is passed through", "back it up where it is provided, or inside the guest")
    if disk.source is None:
        return Reason("an empty drive", "nothing to do")
    if disk.source_type in ("vhostuser", "vhostvdpa", "nvme", "dir"):
        return Reason(
            f"a {disk.source_type} disk, of which QEMU cannot make a backup", "back it up where it is provided"
        )
    return None


def _check_usable(disk: Disk, domain: str, scratch: str | None) -> None:
    if file_name(disk.target) is None or len(disk.target.encode()) > LONGEST_TARGET:
        raise DiskUnusable(
            domain,
            ascii(disk.target),
            "its name cannot be a file's",
            f"leave it out: -o exclude={disk.target!a}",
        )
    if disk.encrypted and disk.secret is None:
        raise DiskUnusable(
            domain,
            disk.target,
            "it is encrypted, but not with a passphrase of libvirt's that the scratch file could have too",
            f"leave it out: -o exclude={disk.target}",
        )
    if scratch is None and (why := _no_room_beside(disk)) is not None:
        raise DiskUnusable(
            domain,
            disk.target,
            f"{why}, so there is no folder beside it for the scratch file",
            f"name one with -o scratch=DIR, or leave the disk out with -o exclude={disk.target}",
        )


def _no_room_beside(disk: Disk) -> str | None:
    """Say why a scratch file cannot lie beside the disk, or None if it can."""
    if disk.source_type != "file":
        return f"it is a {disk.source_type} disk"
    path = disk.source or ""
    if not path.startswith("/"):
        return f"{path!a} is not an absolute path"
    # A device given as a file: the folder beside it is devtmpfs, which is the host's memory.
    if path.startswith("/dev/") and not path.startswith("/dev/shm/"):  # noqa: S108
        return "it is a device"
    if len(os.path.basename(path).encode(errors="surrogateescape")) > LONGEST_NAME - SCRATCH_SUFFIX:
        return "its file's name is so long"
    return None


def _check_apart(taking: list[Disk], domain: str) -> None:
    """See that no two disks are one file: beside it, they would share a scratch file too."""
    first: dict[str | None, str] = {}
    for disk in taking:
        other = first.setdefault(disk.source, disk.target)
        if other != disk.target:
            raise DiskUnusable(
                domain,
                disk.target,
                f"it is the same file as {other}, and their scratch files would be one",
                f"name a folder with -o scratch=DIR, or leave one out with -o exclude={disk.target}",
            )


# --- writing -----------------------------------------------------------------------------------


def scratch_path(disk: Disk, job_id: str, folder: str | None, domain: str) -> str:
    """Return where QEMU shall save the old blocks: beside the disk, or in *folder*.

    *disk* is one that `select_disks` takes. The name ends with the job's, which is never used
    again, so that whoever removes it later removes nobody else's file.
    """
    if folder is None:
        assert disk.source is not None
        return f"{disk.source}.backupfs-{job_id}"
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", domain)[:LONGEST_DOMAIN]
    return os.path.join(folder, f"{safe}-{disk.target}.backupfs-{job_id}")


def render_backup(
    disks: tuple[Disk, ...],
    taking: tuple[Disk, ...],
    *,
    socket: str,
    scratches: Mapping[str, str],
    bases: Mapping[str, str] | None = None,
    bitmap: str = "",
) -> str:
    """Write a pull-mode job's XML.

    *bases* are the checkpoints that changes are counted from, by target; over NBD each disk's is
    called *bitmap*.

    Every disk is named, also those that take no part: one that is not makes libvirt guess. The
    old blocks of an encrypted disk reach QEMU in the clear: their scratch file is encrypted with
    the disk's own passphrase.
    """
    root = ET.Element("domainbackup", mode="pull")
    ET.SubElement(root, "server", transport="unix", socket=socket)
    listed = ET.SubElement(root, "disks")
    for disk in disks:
        if disk not in taking:
            ET.SubElement(listed, "disk", name=disk.target, backup="no")
            continue
        element = ET.SubElement(listed, "disk", name=disk.target, backup="yes", type="file", exportname=disk.target)
        if base := (bases or {}).get(disk.target):
            for key, value in (("backupmode", "incremental"), ("incremental", base), ("exportbitmap", bitmap)):
                element.set(key, value)
        else:
            element.set("backupmode", "full")
        ET.SubElement(element, "driver", type="qcow2")
        scratch = ET.SubElement(element, "scratch", file=scratches[disk.target])
        if disk.encrypted:
            assert disk.secret is not None  # select_disks saw to it
            how, value = disk.secret
            encryption = ET.SubElement(scratch, "encryption", format="luks")
            ET.SubElement(encryption, "secret", {"type": "passphrase", how: value})
    return ET.tostring(root, encoding="unicode")
