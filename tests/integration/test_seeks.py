# SPDX-License-Identifier: GPL-3.0-or-later
"""SEEK_DATA and SEEK_HOLE through real mounts: exact to the byte, and never a reader left waiting."""

from __future__ import annotations

import contextlib
import errno
import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Disk, Guest, Libvirt, open_guest

import backupfs

from .bare_mount import EXTENTS
from .conftest import MIB, Mounter, wait_until

ROOT = Path(__file__).parents[2]
Extents = list[tuple[int, int]]


def walk(path: Path) -> Extents:
    """Return where the data is, as a tool finds it that asks."""
    found = []
    position = 0
    while isinstance(start := seek(path, position, os.SEEK_DATA), int):
        stop = seek(path, start, os.SEEK_HOLE)
        assert isinstance(stop, int), stop
        found.append((start, stop))
        position = stop
    assert start == "ENXIO"
    return found


def seek(path: Path, offset: int, whence: int) -> int | str:
    """Return what lseek says: an offset, or the name of its error."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(file, offset, whence)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        with contextlib.suppress(OSError):  # the mount may be dead by now
            os.close(file)


def copy_without_extension(folder: Path) -> None:
    """Make of backupfs what it is where there was no compiler."""
    package = Path(backupfs.__file__).parent
    shutil.copytree(package, folder / "backupfs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # An editable installation would look for it in the checkout, too.
    (folder / "backupfs/_libfuse.py").write_text("raise ImportError('No module named backupfs._libfuse')\n")


# --- without a domain ------------------------------------------------------------------------------


class Bare:
    """A process that serves `bare_mount`."""

    def __init__(self, path: Path, words: list[str], env: dict[str, str]) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, *words, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **env}
        )
        self.why_not = self.line().removeprefix("ready ")

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().removesuffix("\n")

    def end(self) -> None:
        """See that it ends as it should."""
        assert self.line() == "ended"
        assert self.process.wait(30) == 0


@contextlib.contextmanager
def open_bare(words: list[str] | None = None, **env: str) -> Iterator[Bare]:
    path = Path(tempfile.mkdtemp(prefix="backupfs-test-", dir="/tmp"))
    bare = Bare(path, words or ["-m", "tests.integration.bare_mount"], env)
    try:
        yield bare
    finally:
        subprocess.run(["umount", "-l", path], check=False, capture_output=True)
        if bare.process.poll() is None:
            bare.process.kill()
        bare.process.wait()
        assert bare.process.stdout is not None
        bare.process.stdout.close()
        path.rmdir()


def test_seeks_are_exact_to_the_byte() -> None:
    with open_bare() as bare:
        assert bare.why_not == "None"
        position, expected = 0, []
        for length, flags in EXTENTS:
            if not flags:
                expected.append((position, position + length))
            position += length
        size, disk, text = position, bare.path / "disk", bare.path / "text"
        assert walk(disk) == expected
        plain = [flags for length, flags in EXTENTS[:5] for _ in range(length)]
        for offset in (0, 1, 4095, 4096, 4097, 9095, 9096, 9097, 9098, 17287, 17288, 17799):
            later = range(offset, len(plain))
            assert seek(disk, offset, os.SEEK_DATA) == next(at for at in later if not plain[at])
            assert seek(disk, offset, os.SEEK_HOLE) == next((at for at in later if plain[at]), 17800)
        # The disk ends in a hole, the text in data.
        assert [seek(disk, size - 1, whence) for whence in (os.SEEK_DATA, os.SEEK_HOLE)] == ["ENXIO", size - 1]
        assert [seek(text, 4, whence) for whence in (os.SEEK_DATA, os.SEEK_HOLE)] == [4, 5]
        for path, end in ((disk, size), (text, 5)):
            for offset in (end, end + 1, 2**62, -1):
                assert [seek(path, offset, whence) for whence in (os.SEEK_DATA, os.SEEK_HOLE)] == ["ENXIO"] * 2
        assert seek(disk, 0, 9) == "EINVAL"
        assert seek(disk, 0, os.SEEK_END) == size
        subprocess.run(["umount", bare.path], check=True)
        bare.end()


def test_an_error_that_nobody_expects_is_eio_and_the_mount_goes_on() -> None:
    with open_bare() as bare:
        assert seek(bare.path / "broken", 0, os.SEEK_DATA) == "EIO"
        assert seek(bare.path / "text", 0, os.SEEK_HOLE) == 5


@pytest.mark.parametrize("how", ["signal", "kill"])
def test_a_seek_in_flight_is_answered_when_the_session_ends(how: str) -> None:
    with open_bare() as bare:
        answers: list[int | str] = []
        readers = [
            threading.Thread(target=lambda: answers.append(seek(bare.path / "stuck", 0, os.SEEK_DATA)))
            for _ in range(3)
        ]
        for reader in readers:
            reader.start()
        assert bare.line() == "stuck"  # the others wait for the file's lock, in the kernel
        assert seek(bare.path / "text", 0, os.SEEK_HOLE) == 5
        if how == "kill":
            bare.process.kill()
        else:
            bare.process.send_signal(signal.SIGTERM)
            bare.end()
        for reader in readers:
            reader.join(30)
        assert len(answers) == 3
        assert set(answers) <= {"EIO", "ECONNABORTED", "ENOTCONN"}
        if how == "signal":
            assert "EIO" in answers


def test_many_seekers_at_once_each_get_their_own_answer() -> None:
    with open_bare() as bare:
        first = walk(bare.path / "disk")
        wrong: list[object] = []

        def ask() -> None:
            wrong.extend(found for _ in range(50) if (found := walk(bare.path / "disk")) != first)
            wrong.extend(found for _ in range(50) if (found := walk(bare.path / "text")) != [(0, 5)])

        seekers = [threading.Thread(target=ask) for _ in range(8)]
        for seeker in seekers:
            seeker.start()
        for seeker in seekers:
            seeker.join()
        assert wrong == []


def test_an_installation_without_the_extension_says_so_and_works(tmp_path: Path) -> None:
    copy_without_extension(tmp_path)
    # `-m` would put the checkout first.
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, '.']; import trio\n"
    code += "from tests.integration.bare_mount import main; trio.run(main, sys.argv[1])"
    with open_bare(["-c", code]) as bare:
        assert bare.why_not.startswith("the C extension is not there")
        assert "install gcc" in bare.why_not
        check_all_is_data(bare.path)


def test_a_pyfuse3_bound_to_libfuse_already_is_noticed() -> None:
    code = "import sys, pyfuse3, trio; sys.path.insert(0, '.')\n"
    code += "from tests.integration.bare_mount import main; trio.run(main, sys.argv[1])"
    with open_bare(["-c", code], LD_BIND_NOW="1") as bare:
        assert bare.why_not.startswith("pyfuse3 does not take the C extension up")
        check_all_is_data(bare.path)


def test_symbols_bound_at_load_do_not_matter() -> None:
    with open_bare(LD_BIND_NOW="1") as bare:
        assert bare.why_not == "None"
        assert len(walk(bare.path / "disk")) == 3


def check_all_is_data(path: Path) -> None:
    size = sum(length for length, _ in EXTENTS)
    assert walk(path / "disk") == [(0, size)]
    assert (path / "text").read_bytes() == b"12345"
    with open(path / "disk", "rb") as disk:
        disk.seek(65536)  # beyond the data, of which there is none to read
        assert disk.read() == bytes(size - 65536)


# --- a guest ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thin_guest(lab: Libvirt) -> Iterator[Guest]:
    """A guest whose 64 GiB disk holds a few MiB, here and there, up to its last bytes."""
    with open_guest(lab, [Disk("vda", size=64 * 1024 * MIB)]) as guest:
        for position in (0, 5, 7000, 30001, 65535):
            guest.run(f"dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek={position} conv=notrunc")
        guest.run("dd if=/dev/urandom of=/dev/vda bs=4k count=1 seek=999999 conv=notrunc; sync")
        yield guest


def lie_in(parts: Extents, wholes: Extents) -> bool:
    """Tell whether each of *parts* lies in one of *wholes*."""
    return all(any(start <= begin and end <= stop for start, stop in wholes) for begin, end in parts)


def qemu_map(guest: Guest) -> Extents:
    """Return where qemu-img finds data in a paused guest's disk."""
    told: list[dict[str, Any]] = json.loads(
        subprocess.run(
            ["qemu-img", "map", "-U", "--output=json", guest.paths["vda"]], check=True, capture_output=True
        ).stdout
    )
    found: Extents = []
    for extent in told:
        if extent["zero"]:
            continue
        start, stop = extent["start"], extent["start"] + extent["length"]
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, stop))
    return found


@pytest.mark.parametrize("options", ["", "direct_io"])
def test_seeks_find_what_qemu_img_finds_and_copies_read_data_only(
    thin_guest: Guest, mount: Mounter, tmp_path: Path, options: str
) -> None:
    mounted = mount(thin_guest, options)
    thin_guest.pause()
    truth = thin_guest.copy_disk("vda", tmp_path / "truth")
    expected = qemu_map(thin_guest)
    os.listdir(mounted.raw)
    thin_guest.resume()
    assert len(expected) == 6
    assert walk(mounted.image) == expected
    assert walk(mounted.raw / "domain.xml") == [(0, (mounted.raw / "domain.xml").stat().st_size)]
    assert seek(mounted.image, mounted.image.stat().st_size, os.SEEK_DATA) == "ENXIO"

    # QEMU's map has whole clusters; qemu-img, which made the truth, has left out the zeros in them.
    real = walk(truth)
    assert lie_in(real, expected)

    data = sum(stop - start for start, stop in expected)
    copy = tmp_path / "copy"
    archived = f"-C {mounted.raw} -cf - vda.raw | tar -C {tmp_path} --transform s/vda.raw/copy/ -xSf -"
    ways = {
        "cp": ["cp", "--sparse=auto", mounted.image, copy],
        "convert": ["qemu-img", "convert", "-f", "raw", "-O", "raw", mounted.image, copy],
        "tar": ["sh", "-c", f"tar -S {archived}"],
        "bsdtar": ["sh", "-c", f"bsdtar --read-sparse {archived}"],
    }
    for name, words in ways.items():
        before = mounted.status()["disks"]["vda"]["read"]
        subprocess.run(words, check=True, capture_output=True)
        # Blocks of 1 MiB are read ahead, so a little more than the data.
        assert mounted.status()["disks"]["vda"]["read"] - before <= 2 * data + 8 * MIB, name
        assert copy.stat().st_size == truth.stat().st_size
        assert copy.stat().st_blocks * 512 <= data + MIB, name
        found = walk(copy)
        assert lie_in(real, found), name
        assert lie_in(found, expected), name
        if name in ("cp", "convert"):  # they look for zeros in the data, the others take what they are told
            assert found == real, name
        with open(copy, "rb") as one, open(truth, "rb") as other:
            for start, stop in expected:
                one.seek(start)
                other.seek(start)
                assert one.read(stop - start) == other.read(stop - start), name
        copy.unlink()
    assert mounted.status()["sparse_seeks"] is True
    assert "sparse seeks" not in mounted.status()["why"]
    mounted.unmount()


def test_rsync_finds_zeros_by_itself(own_guest: Guest, mount: Mounter, tmp_path: Path) -> None:
    own_guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek=9 conv=notrunc; sync")
    mounted = mount(own_guest)
    subprocess.run(["rsync", "-S", mounted.image, tmp_path / "copy"], check=True)
    assert filecmp.cmp(mounted.image, tmp_path / "copy", shallow=False)
    assert (tmp_path / "copy").stat().st_blocks * 512 <= 2 * MIB


def test_a_seek_in_a_point_that_is_over_is_eio(own_guest: Guest, mount: Mounter) -> None:
    mounted = mount(own_guest)
    with open(mounted.image, "rb") as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 0
        mounted.release()
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            with pytest.raises(OSError) as caught:
                os.lseek(file.fileno(), 0, whence)
            assert caught.value.errno == errno.EIO


def test_a_mount_without_the_extension_says_so_once_and_copies(
    own_guest: Guest, mount: Mounter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_without_extension(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    mounted = mount(own_guest)
    assert mounted.log.count("told that all is data") == 1
    status = mounted.status()
    assert status["sparse_seeks"] is False
    assert status["why"]["sparse seeks"].startswith("no: the C extension is not there")
    told = mounted.command("status").stdout
    assert "\nsparse seeks: no: the C extension is not there" in told
    assert "backupfs_sparse_seeks{" in (mounted.path / ".backupfs/metrics.prom").read_text()
    size = mounted.image.stat().st_size
    assert walk(mounted.image) == [(0, size)]
    subprocess.run(["cp", "--sparse=always", mounted.image, tmp_path / "copy"], check=True)
    assert filecmp.cmp(mounted.image, tmp_path / "copy", shallow=False)
    mounted.unmount()
    wait_until(lambda: mounted.process.poll() == 0)
