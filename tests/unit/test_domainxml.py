# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from backupfs import domainxml
from backupfs.errors import BadXml, DiskUnusable, UsageError

DOMAIN = """<domain id='7'><name>web01</name><uuid>u-u</uuid>
<os><nvram>/nv/web01.fd</nvram></os>
<seclabel type='dynamic' model='dac'><label>+64055:+105</label></seclabel>
<devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/a.qcow2'/>
  <backingStore type='file'><source file='/i/base'/></backingStore><target dev='vda' bus='virtio'/></disk>
<disk type='block' device='disk'><driver type='raw'/><source dev='/dev/x'/><target dev='vdb' bus='virtio'/></disk>
<disk type='network' device='disk'><source protocol='rbd' name='p/i'><host name='mon'/></source>
  <target dev='vdc'/></disk>
<disk type='file' device='cdrom'><source file='/i/c.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
<disk type='file' device='disk'><target dev='sdb' bus='scsi'/></disk>
<disk type='block' device='lun'><source dev='/dev/y'/><target dev='sdc' bus='scsi'/></disk>
<disk type='volume' device='disk'><source pool='p' volume='v'/><target dev='vdd'/></disk>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0' state='connected'/></channel>
<graphics type='vnc' passwd='secret' passwdValidTo='x' port='1'/>
</devices></domain>"""


def test_domain_facts_are_read() -> None:
    assert domainxml.parse_domain(DOMAIN) == domainxml.DomainFacts(
        "web01", "u-u", 7, "/nv/web01.fd", (64055, 105), agent_connected=True, agent_present=True
    )
    bare = domainxml.parse_domain("<domain><os><nvram type='file'><source file='/n'/></nvram></os></domain>")
    assert (bare.id, bare.nvram, bare.qemu_user, bare.agent_present) == (-1, "/n", None, False)


@pytest.mark.parametrize(
    ("label", "user"),
    [
        ("+0:+0", (0, 0)),
        ("107:108", (107, 108)),
        ("libvirt-qemu:kvm", None),
        ("+1:+" + "9" * 5000, None),
        ("", None),
    ],
)
def test_qemu_user_is_read_where_it_is_a_number(label: str, user: tuple[int, int] | None) -> None:
    xml = f"<domain><seclabel model='dac'><label>{label}</label></seclabel></domain>"
    assert domainxml.parse_domain(xml).qemu_user == user


@pytest.mark.parametrize(
    ("nvram", "path"),
    [
        ("<nvram>\n /n </nvram>", "/n"),
        ("<nvram template='/t'/>", None),
        ("<nvram type='block'><source dev='/dev/n'/></nvram>", "/dev/n"),
        ("<nvram type='network'><source protocol='nbd' name='n'/></nvram>", None),
    ],
)
def test_nvram_is_found_where_it_is_a_local_file(nvram: str, path: str | None) -> None:
    assert domainxml.parse_domain(f"<domain><os>{nvram}</os></domain>").nvram == path


def test_disks_are_read_with_their_chains() -> None:
    disks = {disk.target: disk for disk in domainxml.parse_disks(DOMAIN)}
    assert disks["vda"].chain == ("/i/a.qcow2", "/i/base")
    assert (disks["vda"].format, disks["vda"].bus) == ("qcow2", "virtio")
    assert disks["vdc"].source == "rbd://mon/p/i"
    assert disks["vdd"].source == "p/v"
    assert disks["sda"].read_only
    assert disks["sdb"].source is None
    (odd,) = disks_of("<disk type='file' device='cdrom'><source startupPolicy='optional'/><target dev='sda'/></disk>")
    assert odd.source is None
    assert not disks["vda"].transient
    assert (disks["vda"].encrypted, disks["vda"].secret) == (False, None)


def disks_of(*elements: str) -> tuple[domainxml.Disk, ...]:
    return domainxml.parse_disks(f"<domain><devices>{''.join(elements)}</devices></domain>")


def disk_xml(target: str = "vda", file: str = "/i/a", inner: str = "", more: str = "") -> str:
    return f"<disk type='file'><source file='{file}'>{inner}</source>{more}<target dev='{target}'/></disk>"


def select(
    disks: tuple[domainxml.Disk, ...],
    only: list[str] | None = None,
    exclude: tuple[str, ...] = (),
    scratch: str | None = None,
) -> domainxml.Selection:
    return domainxml.select_disks(disks, domain="web01", only=only, exclude=exclude, scratch=scratch)


def test_every_local_file_of_a_disk_is_in_its_chain_once() -> None:
    base = "<backingStore><source file='/i/b'/><backingStore><source file='/i/a'/></backingStore></backingStore>"
    (disk,) = disks_of(disk_xml(inner="<dataStore><source file='/i/d'/></dataStore>", more=base + "<transient/>"))
    assert disk.chain == ("/i/a", "/i/d", "/i/b")
    assert disk.transient


LUKS = "<encryption format='luks'><secret type='passphrase' {}/></encryption>"


@pytest.mark.parametrize(("reference", "secret"), [("uuid='u'", ("uuid", "u")), ("usage='n'", ("usage", "n"))])
def test_scratch_of_an_encrypted_disk_is_encrypted_alike(reference: str, secret: tuple[str, str]) -> None:
    disks = disks_of(disk_xml(inner=LUKS.format(reference)), disk_xml("vdb", "/i/b"))
    assert (disks[0].encrypted, disks[0].secret) == (True, secret)
    xml = domainxml.render_backup(disks, disks, socket="/s", scratches={"vda": "/i/a.s", "vdb": "/i/b.s"})
    how, value = secret
    assert (
        f'<scratch file="/i/a.s"><encryption format="luks"><secret type="passphrase" {how}="{value}" />'
        "</encryption></scratch>"
    ) in xml
    assert '<scratch file="/i/b.s" />' in xml


def test_old_blocks_of_an_encrypted_base_are_encrypted_too() -> None:
    luks = LUKS.format("uuid='u'")
    base = f"<backingStore><source file='/i/b'>{luks}</source></backingStore>"
    (disk,) = disks_of(disk_xml(more=base))
    assert disk.secret == ("uuid", "u")


@pytest.mark.parametrize("secret", ["<secret type='volume' uuid='u'/>", "<secret type='passphrase'/>", ""])
def test_a_disk_whose_scratch_could_not_be_encrypted_is_an_error(secret: str) -> None:
    disks = disks_of(disk_xml(inner=f"<encryption format='luks'>{secret}</encryption>"))
    with pytest.raises(DiskUnusable, match="exclude=vda"):
        select(disks)
    assert "vda" in select(disks, exclude=("vda",)).left_out


def test_what_can_never_be_in_a_backup_is_left_out_with_its_reason() -> None:
    chosen = domainxml.select_disks(
        domainxml.parse_disks(DOMAIN), domain="web01", only=None, exclude=["vdd"], scratch="/s"
    )
    assert [disk.target for disk in chosen.taking] == ["vda", "vdb", "vdc"]
    assert {name: reason.text for name, reason in chosen.left_out.items()} == {
        "sda": "a cdrom",
        "sdb": "an empty drive",
        "sdc": "a SCSI LUN that is passed through",
        "vdd": "named by exclude=",
    }


def test_only_the_named_disks_take_part() -> None:
    chosen = domainxml.select_disks(
        domainxml.parse_disks(DOMAIN), domain="web01", only=["vda"], exclude=[], scratch=None
    )
    assert [disk.target for disk in chosen.taking] == ["vda"]
    assert chosen.left_out["vdb"].text == "not named by disks="


def test_a_disk_without_room_for_scratch_is_an_error_not_left_out() -> None:
    with pytest.raises(DiskUnusable, match=r"vdb: it is a block disk.*scratch=DIR") as caught:
        select(domainxml.parse_disks(DOMAIN))
    assert caught.value.exit_status == 7


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("/dev/vg/root", "it is a device"),  # beside it is the host's memory
        ("a.img", "'a.img' is not an absolute path"),
        ("/i/" + "ä" * 120, "its file's name is so long"),
    ],
)
def test_a_file_with_no_room_beside_it_needs_a_scratch_folder(file: str, why: str) -> None:
    disks = disks_of(disk_xml(file=file))
    with pytest.raises(DiskUnusable, match=f"{why}.*scratch=DIR"):
        select(disks)
    assert select(disks, scratch="/s").taking == disks


def test_an_image_in_shared_memory_has_its_scratch_beside_it() -> None:
    disks = disks_of(disk_xml(file="/dev/shm/a"))
    assert select(disks).taking == disks


def test_two_disks_of_one_file_never_share_a_scratch_file() -> None:
    disks = disks_of(disk_xml("vda"), disk_xml("vdb"), disk_xml("vdc", "/i/c"))
    with pytest.raises(DiskUnusable, match="disk vdb: it is the same file as vda"):
        select(disks)
    assert select(disks, exclude=("vdb",)).taking == (disks[0], disks[2])
    taking = select(disks, scratch="/s").taking
    assert len({domainxml.scratch_path(disk, "j", "/s", "d") for disk in taking}) == 3


def test_a_disk_that_is_asked_for_and_can_never_be_is_an_error() -> None:
    disks = domainxml.parse_disks(DOMAIN)
    with pytest.raises(DiskUnusable, match="disk sda: it is a cdrom; take it out of disks="):
        select(disks, only=["vda", "sda"])
    assert select(disks, only=["vda", "sda"], exclude=("sda",)).left_out["sda"].text == "a cdrom"


def test_unknown_disk_names_are_errors() -> None:
    for arguments in ({"only": ["nope"], "exclude": []}, {"only": None, "exclude": ["nope"]}):
        with pytest.raises(UsageError, match="nope: web01 has no such disk; it has vda"):
            domainxml.select_disks(domainxml.parse_disks(DOMAIN), domain="web01", scratch="/s", **arguments)  # type: ignore[arg-type]


def test_unsuitable_target_names_and_kinds_are_refused() -> None:
    hostile = "<domain><devices><disk type='file'><source file='/a'/><target dev='../x'/></disk></devices></domain>"
    with pytest.raises(DiskUnusable, match="cannot be a file's"):
        domainxml.select_disks(domainxml.parse_disks(hostile), domain="d", only=None, exclude=[], scratch=None)
    long = disks_of(disk_xml("v" * 101))
    with pytest.raises(DiskUnusable, match="cannot be a file's"):
        select(long)
    vhost = disks_of("<disk type='vhostuser'><source path='/a' dir='/x'/><target dev='vda'/></disk>")
    assert "vhostuser" in select(vhost).left_out["vda"].text


def test_backup_job_names_every_disk_and_reads_back() -> None:
    disks = domainxml.parse_disks(DOMAIN)
    xml = domainxml.render_backup(disks, disks[:2], socket="/s&<", scratches={"vda": "/i/a.s", "vdb": "/i/b.s"})
    assert xml.count("<disk ") == len(disks)
    job = domainxml.parse_backup(xml)
    assert (job.mode, job.socket, job.scratches) == ("pull", "/s&<", {"vda": "/i/a.s", "vdb": "/i/b.s"})
    assert xml.count('backup="no"') == len(disks) - 2
    assert job.exports == {"vda": "vda", "vdb": "vdb"}
    assert job.where == "/s&<"
    indexed = domainxml.parse_backup("<domainbackup><disks><disk name='vda' index='3'/></disks></domainbackup>")
    assert (indexed.socket, indexed.indexes) == (None, {"vda": 3})


@pytest.mark.parametrize(
    ("xml", "where"),
    [
        ("<domainbackup mode='pull'><server name='h' port='1'/></domainbackup>", "h:1"),
        ("<domainbackup mode='pull'><server transport='tcp' name='h'/></domainbackup>", "h:10809"),
        ("<domainbackup mode='pull'><server/></domainbackup>", "another transport"),
        ("<domainbackup/>", "files of its own"),
    ],
)
def test_where_a_foreign_job_serves_can_be_told(xml: str, where: str) -> None:
    job = domainxml.parse_backup(xml)
    assert job.socket is None
    assert job.where == where


def test_scratch_lies_beside_the_disk_or_in_the_folder() -> None:
    disk = domainxml.parse_disks(DOMAIN)[0]
    assert domainxml.scratch_path(disk, "j1", None, "web01") == "/i/a.qcow2.backupfs-j1"
    assert domainxml.scratch_path(disk, "j1", "/s", "we/../b") == "/s/we_.._b-vda.backupfs-j1"
    longest = replace(disk, target="v" * domainxml.LONGEST_TARGET)
    name = os.path.basename(domainxml.scratch_path(longest, "0123456789abcdef", "/s", "d" * 300))
    assert len(name) <= 255


def test_checkpoint_is_read() -> None:
    xml = """<domaincheckpoint><name>mon</name><parent><name>sun</name></parent><creationTime>17</creationTime>
    <description>d</description><disks><disk name='vda' checkpoint='bitmap'/><disk name='vdb' checkpoint='no'/></disks>
    </domaincheckpoint>"""
    assert domainxml.parse_checkpoint(xml) == domainxml.Checkpoint("mon", 17, "sun", "d", ("vda",))


def test_secrets_are_taken_out() -> None:
    shown = domainxml.strip_secrets(DOMAIN)
    assert "secret" not in shown
    assert "passwd" not in shown
    assert 'port="1"' in shown
    qemu = (
        "<domain xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><qemu:commandline>"
        "<qemu:env name='A' value='pw'/></qemu:commandline></domain>"
    )
    assert "pw" not in domainxml.strip_secrets(qemu)
    assert "qemu:env" in domainxml.strip_secrets(qemu)


def test_cookies_of_a_disk_read_over_http_are_taken_out() -> None:
    disk = disk_xml(inner="<host name='h'/><cookies><cookie name='a'>secret</cookie></cookies>")
    shown = domainxml.strip_secrets(f"<domain><devices>{disk}</devices></domain>")
    assert "cookie" not in shown
    assert "secret" not in shown
    assert '<host name="h" />' in shown


def test_a_definition_without_secrets_stays_as_it_was() -> None:
    plain = "<domain  type='kvm'><!-- by hand --><metadata><x:a xmlns:x='http://x'/></metadata></domain>\n"
    assert domainxml.strip_secrets(plain) == plain
    assert domainxml.strip_secrets(plain.strip()) == plain


def test_xml_nested_too_deeply_is_an_error() -> None:
    deep = "<a>" * 100_000 + "<graphics passwd='p'/>" + "</a>" * 100_000
    with pytest.raises(BadXml, match="nested too deeply"):
        domainxml.strip_secrets(deep)


def test_host_uuid_is_read_and_nothing_else_can_be_one() -> None:
    assert domainxml.parse_host_uuid("<capabilities><host><uuid>AB-12</uuid></host></capabilities>") == "ab-12"
    for odd in ("<capabilities/>", "<capabilities><host><uuid>../..</uuid></host></capabilities>"):
        assert domainxml.parse_host_uuid(odd) == "unknown"


@pytest.mark.parametrize(
    ("parse", "xml"),
    [
        (domainxml.parse_domain, ""),
        (domainxml.parse_domain, "<domain"),
        (domainxml.parse_domain, "<domain id='x'/>"),
        (domainxml.parse_domain, "<domain id='-2'/>"),
        (domainxml.parse_domain, "<domain>\ud800</domain>"),
        (domainxml.parse_domain, "<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>"),
        (domainxml.parse_domain, "<!DOCTYPE d SYSTEM 'file:///etc/passwd'><domain/>"),
        (domainxml.parse_disks, "<domain><devices><disk/></devices></domain>"),
        (domainxml.parse_disks, "<domain><devices><disk><target dev=''/></disk></devices></domain>"),
        (domainxml.parse_backup, "<domainbackup><disks><disk name='a' index='x'/></disks></domainbackup>"),
        (domainxml.parse_checkpoint, "<domaincheckpoint><creationTime>soon</creationTime></domaincheckpoint>"),
        (domainxml.parse_checkpoint, "<domaincheckpoint><creationTime>-1</creationTime></domaincheckpoint>"),
        # No file's time could hold it.
        (domainxml.parse_checkpoint, f"<a><creationTime>{10**30}</creationTime></a>"),
        (domainxml.parse_checkpoint, f"<a><creationTime>{'9' * 5000}</creationTime></a>"),
    ],
)
def test_bad_xml_is_one_error(parse: Callable[[str], object], xml: str) -> None:
    with pytest.raises(BadXml) as caught:
        parse(xml)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/", "a\0", "a\nb", "a\x9b2J", "x" * 256, "ä" * 128, "\udc80"])
def test_names_that_cannot_be_files_are_refused(name: str) -> None:
    assert domainxml.file_name(name) is None


@pytest.mark.parametrize("name", ["monday", "domäne 1", "...", "-rf", "a" * 255, " "])
def test_names_that_can_be_files_stay_as_they_are(name: str) -> None:
    assert domainxml.file_name(name) == name
