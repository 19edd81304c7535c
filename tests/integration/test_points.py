# SPDX-License-Identifier: GPL-3.0-or-later
"""Points in time: how they begin, who holds them, how they end, and that no two are ever mixed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lab import Disk, Guest, Libvirt, open_guest

from .conftest import MIB, Mounter, wait_until


@pytest.fixture(scope="module")
def marked_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest with two raw-written disks, so that each instant can be told by its bytes."""
    with open_guest(lab, [Disk("vda", size=16 * MIB), Disk("vdb", size=16 * MIB)]) as guest:
        yield guest


def mark(guest: Guest, letter: str) -> None:
    """Fill both disks' first 8 MiB with *letter*, at one time."""
    guest.run(
        f"for d in vda vdb; do tr '\\0' {letter} < /dev/zero | dd of=/dev/$d bs=1M count=8 iflag=fullblock "
        "conv=notrunc 2>/dev/null; done; sync"
    )


def letter(path: Path, offset: int = 0) -> str:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), 1, offset).decode()


def assert_eio(caught: pytest.ExceptionInfo[OSError]) -> None:
    assert caught.value.errno == errno.EIO


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def test_only_a_look_inside_raw_begins_a_point(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    subprocess.run(["ls", "-la", mounted.path], check=True, capture_output=True)
    subprocess.run(["stat", mounted.raw], check=True, capture_output=True)
    assert "<domain" in (mounted.path / "domain.xml").read_text()
    assert len((mounted.path / "domain.xml").read_bytes()) == (mounted.path / "domain.xml").stat().st_size
    assert os.listdir(mounted.path / "checkpoints") == []
    assert sorted(os.listdir(mounted.path)) == ["checkpoints", "domain.xml", "qcow2", "raw"]
    assert mounted.status()["state"] == "idle"
    os.stat(mounted.raw / "vda.raw")
    assert mounted.status()["state"] == "running"
    mounted.unmount()


def test_begin_command_waits_for_the_command(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest, "begin=command")
    with pytest.raises(OSError) as caught:
        os.listdir(mounted.raw)
    assert_eio(caught)
    assert "backupfs begin" in mounted.log
    assert mounted.command("begin").returncode == 0
    assert "vda.raw" in os.listdir(mounted.raw)
    mounted.unmount()


def test_who_stays_in_an_ended_point_gets_eio_and_a_new_look_gets_the_next(marked_guest: Guest, mount: Mounter) -> None:
    mark(marked_guest, "A")
    mounted = mount(marked_guest)
    held = os.open(mounted.image, os.O_RDONLY)
    with working_directory(mounted.raw):
        assert os.pread(held, 1, 0) == b"A"
        listing = os.open(".", os.O_RDONLY)
        mark(marked_guest, "B")
        assert letter(mounted.image) == "A"
        mounted.release()

        def assert_all_over() -> None:
            for attempt in (
                lambda: os.pread(held, MIB, 4 * MIB),  # not in the page cache
                lambda: open("vda.raw", "rb"),
                lambda: os.stat("vdb.raw"),
                lambda: os.listdir("."),
                lambda: os.stat("vda.raw", dir_fd=listing),
            ):
                with pytest.raises(OSError) as caught:
                    attempt()
                assert_eio(caught)

        assert_all_over()
        # Another process begins the next point by its path; this one still stands in the old.
        other = subprocess.run(["head", "-c1", mounted.image], check=True, capture_output=True)
        assert other.stdout == b"B"
        assert_all_over()
        # Nothing of the old page cache is served for the new point.
        assert letter(mounted.image) == "B"
        assert letter(mounted.image, 4 * MIB) == "B"
        for descriptor in (held, listing):
            # The kernel itself says EIO when a file of an inode that is no more is closed.
            with contextlib.suppress(OSError):
                os.close(descriptor)
    mounted.unmount()


def test_inode_numbers_are_the_same_from_mount_to_mount(marked_guest: Guest, mount: Mounter) -> None:
    first = mount(marked_guest)
    numbers = [first.image.stat().st_ino, first.raw.stat().st_ino]
    first.release()
    assert [first.image.stat().st_ino, first.raw.stat().st_ino] == numbers
    first.unmount()
    second = mount(marked_guest)
    assert [second.image.stat().st_ino, second.raw.stat().st_ino] == numbers
    second.unmount()


def test_an_idle_point_ends_and_a_held_one_does_not(marked_guest: Guest, mount: Mounter) -> None:
    mark(marked_guest, "A")
    mounted = mount(marked_guest, "idle=1")
    # A process that opened a file, closed it, and lives on between two files.
    reader = subprocess.Popen(
        ["sh", "-c", f"read a < {mounted.raw}/domain.xml; echo ready; read go; head -c1 {mounted.raw}/vda.raw"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"ready\n"
    mark(marked_guest, "B")
    # Longer than idle=, stopped by a slow target.
    reader.send_signal(signal.SIGSTOP)
    point = mounted.status()["point"]
    time.sleep(2.5)  # the passing of time is what is tested
    assert mounted.status()["point"] == point
    assert reader.pid in mounted.status()["holders"]
    reader.send_signal(signal.SIGCONT)
    reader.stdin.write(b"go\n")
    reader.stdin.close()
    assert reader.stdout.read() == b"A"
    reader.wait()
    reader.stdout.close()
    mounted.wait_log("ends: idle")
    wait_until(lambda: mounted.status()["state"] == "idle")
    assert letter(mounted.image) == "B"
    with open(mounted.image, "rb"):
        time.sleep(2.5)  # as above
        assert mounted.status()["state"] == "running"
    mounted.wait_log("ends: idle")
    mounted.unmount()


@pytest.mark.parametrize("tool", ["cp", "rsync", "tar"])
def test_a_copy_half_way_when_its_point_ends_fails_and_mixes_nothing(
    marked_guest: Guest, mount: Mounter, tmp_path: Path, tool: str
) -> None:
    mark(marked_guest, "A")
    mounted = mount(marked_guest)
    target = tmp_path / "copy"
    target.mkdir()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # Each is stopped after its first disk: by its own output, or by tar's full pipe.
    copy = {
        "cp": ["cp", "-rv", str(mounted.raw), str(target)],
        "rsync": ["rsync", "-av", "--inplace", f"{mounted.raw}/", f"{target}/raw/"],
        "tar": ["tar", "-cf", str(fifo), "-C", str(mounted.path), "raw"],
    }[tool]
    process = subprocess.Popen(copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    if tool == "tar":
        pipe = open(fifo, "rb")  # held until the point has ended
        begun = pipe.read(MIB)
    else:
        wait_until(lambda: mounted.status()["disks"].get("vda", {}).get("read", 0) > 0)
    process.send_signal(signal.SIGSTOP)
    mark(marked_guest, "B")
    mounted.release()
    # A second process begins the next point.
    assert letter(mounted.raw / "vdb.raw", 5 * MIB) == "B"
    process.send_signal(signal.SIGCONT)
    if tool == "tar":
        (tmp_path / "tar").write_bytes(begun + pipe.read())
        pipe.close()
        subprocess.run(["tar", "-xf", tmp_path / "tar", "-C", target], check=False, capture_output=True)
    output = process.communicate()[0]
    copied = {name: (target / "raw" / name) for name in ("vda.raw", "vdb.raw") if (target / "raw" / name).exists()}
    letters = {chr(byte) for path in copied.values() for byte in set(path.read_bytes()) - {0}}
    assert "B" not in letters, f"{tool} read two instants: {output!r}"
    # Either it was done before the point ended, or it says that it failed.
    complete = all((target / "raw" / name).exists() for name in ("vda.raw", "vdb.raw"))
    if process.returncode == 0:
        assert complete
        assert all(path.read_bytes()[: 8 * MIB] == b"A" * 8 * MIB for path in copied.values())
    mounted.unmount()


def test_instants_never_repeat_and_carry_the_time(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    seen = []
    for _ in range(3):
        before = time.time()
        modified = mounted.image.stat().st_mtime
        after = time.time()
        assert before <= modified <= after + 0.01
        assert modified == int(modified)
        seen.append(modified)
        mounted.release()
    assert seen == sorted(set(seen))
    assert int(os.getxattr(mounted.image, "user.backupfs.instant")) > seen[-1]
    mounted.unmount()


def test_labels_run_ahead_of_a_clock_that_stepped_back(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    first = int(mounted.image.stat().st_mtime)
    mounted.unmount()
    # As after a step of the clock by an hour: the state folder knows a label of the future.
    (instant,) = Path(mounted.env["STATE_DIRECTORY"]).rglob("instant")

    body = json.dumps({"instant": first + 3600}).encode()
    instant.write_bytes(b"%08x " % zlib.crc32(body) + body)
    again = mount(marked_guest)
    begun = time.monotonic()
    assert int(again.image.stat().st_mtime) == first + 3601
    assert time.monotonic() - begun < 5, "it must not wait for the clock"
    assert "clock" in again.log
    again.unmount()


def test_nothing_can_be_written(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    attempts = [
        lambda: open(mounted.image, "wb"),
        lambda: open(mounted.image, "r+b"),
        lambda: open(mounted.raw / "new", "wb"),
        lambda: os.mkdir(mounted.path / "new"),
        lambda: os.rename(mounted.image, mounted.raw / "other"),
        lambda: os.unlink(mounted.image),
        lambda: os.chmod(mounted.image, 0o777),
        lambda: os.chown(mounted.image, 1, 1),
        lambda: os.utime(mounted.image),
        lambda: os.truncate(mounted.image, 0),
        lambda: os.symlink("x", mounted.raw / "y"),
        lambda: os.link(mounted.image, mounted.raw / "z"),
        lambda: os.setxattr(mounted.image, "user.x", b"y"),
        lambda: os.removexattr(mounted.image, "user.backupfs.instant"),
        lambda: os.rmdir(mounted.raw),
    ]
    for attempt in attempts:
        with pytest.raises(OSError) as caught:
            attempt()
        assert caught.value.errno == errno.EROFS
    mounted.unmount()


def test_attributes_are_as_documented(marked_guest: Guest, mount: Mounter) -> None:
    mark(marked_guest, "A")
    mounted = mount(marked_guest)
    status = mounted.image.stat()
    assert status.st_mode & 0o7777 == 0o400
    assert mounted.raw.stat().st_mode & 0o7777 == 0o500
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert status.st_blksize == MIB
    assert 8 * MIB <= status.st_blocks * 512 < 16 * MIB
    space = os.statvfs(mounted.path)
    assert space.f_blocks * space.f_frsize == 32 * MIB
    assert space.f_bfree == 0
    names = os.listxattr(mounted.image)
    assert {"user.backupfs.domain", "user.backupfs.disk", "user.backupfs.instant"} <= set(names)
    assert os.getxattr(mounted.image, "user.backupfs.disk") == b"vda"
    with pytest.raises(OSError):
        os.getxattr(mounted.image, "user.other")
    mounted.unmount()
    open_to_all = mount(marked_guest, "allow_other,umask=022,uid=nobody,gid=nogroup")
    status = open_to_all.image.stat()
    assert status.st_mode & 0o7777 == 0o444
    assert status.st_uid == 65534
    seen = subprocess.run(["head", "-c1", open_to_all.image], user="nobody", capture_output=True, check=True)
    assert seen.stdout == b"A"
    open_to_all.unmount()


def test_checkpoints_of_others_come_and_go(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    virsh = marked_guest.libvirt.virsh
    virsh("checkpoint-create-as", marked_guest.name, "monday")
    try:
        wait_until(lambda: os.listdir(mounted.path / "checkpoints") == ["monday"])
        xml = (mounted.path / "checkpoints/monday/checkpoint.xml").read_text()
        assert "<name>monday</name>" in xml
        assert mounted.status()["state"] == "idle"
    finally:
        virsh("checkpoint-delete", marked_guest.name, "monday")
    wait_until(lambda: os.listdir(mounted.path / "checkpoints") == [])
    mounted.unmount()


def test_status_speaks_to_people_and_to_programs(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    mounted.image.read_bytes()
    text = mounted.command("status")
    assert text.returncode == 0, text.stderr
    for word in (marked_guest.name, "running", "vda", "vdb", "16.0 MiB"):
        assert word in text.stdout

    told = json.loads(mounted.command("status", "--json").stdout)
    assert told["disks"]["vda"]["size"] == 16 * MIB
    assert told["disks"]["vda"]["read"] > 0
    metrics = (mounted.path / ".backupfs/metrics.prom").read_text()
    assert f'backupfs_disk_size_bytes{{domain="{marked_guest.name}"' in metrics
    assert "begins" in (mounted.path / ".backupfs/log").read_text()
    assert mounted.command("release").stdout == "released\n"
    mounted.unmount()


def test_root_has_the_kernel_read_a_megabyte_ahead(marked_guest: Guest, mount: Mounter) -> None:
    mounted = mount(marked_guest)
    os.listdir(mounted.path)
    device = os.stat(mounted.path).st_dev
    kernel = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert int(kernel.read_text()) == 1024
    assert mounted.status()["read_ahead"] == MIB
    assert "read-ahead" not in mounted.command("status").stdout
    kernel.write_text("128")
    mounted.unmount()


def test_direct_io_asks_again_each_time_and_reads_the_same(marked_guest: Guest, mount: Mounter) -> None:
    mark(marked_guest, "D")
    mounted = mount(marked_guest, "direct_io")
    want = b"D" * 8 * MIB + bytes(8 * MIB)
    assert mounted.image.read_bytes() == want
    once = mounted.status()["disks"]["vda"]["read"]
    assert mounted.image.read_bytes() == want
    assert mounted.status()["disks"]["vda"]["read"] >= once + 8 * MIB
    mounted.unmount()
