# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

import os
from dataclasses import replace

import pytest

from backupfs.errors import UsageError
from backupfs.options import IGNORED, KERNEL, OPTIONS, Options, Quiesce, parse_options, render_option_help
from backupfs.scratch import Reserve


def test_no_options_are_the_defaults() -> None:
    assert parse_options([]) == Options()
    assert Options().folder_mode == 0o500
    assert Options().file_mode == 0o400
    assert Options().uid == os.getuid()


def test_every_option_is_taken_and_has_an_effect() -> None:
    found = parse_options([
        "uri=qemu:///system,begin=command,idle=5m,idle-max=1d,scratch=/var/x/../y,connections=4,timeout=2.5,rate=50M",
        "quiesce=require,uid=nobody,gid=5,umask=027,allow_other,debug,disks=vda:vdb,exclude=vdc",
    ])  # fmt: skip
    assert found == Options(
        uri="qemu:///system", begin="command", quiesce=Quiesce("require"),
        idle=300, idle_max=86400, scratch="/var/y", connections=4, timeout=2.5, rate=50 * 2**20,
        uid=65534, gid=5, umask=0o27, allow_other=True, debug=True, disks=("vda", "vdb"), exclude=("vdc",),
    )  # fmt: skip
    assert (found.folder_mode, found.file_mode) == (0o550, 0o440)
    assert found.kernel_words == ("allow_other",)


def test_a_list_of_disks_goes_on_after_a_comma() -> None:
    assert parse_options(["disks=vda,vdb,ro,debug"]).disks == ("vda", "vdb")
    assert parse_options(["disks=vda", "vdb"]).disks == ("vda", "vdb")
    with pytest.raises(UsageError, match="unknown option vdb"):
        parse_options(["disks=vda,debug,vdb"])


def test_what_is_to_be_frozen() -> None:
    assert parse_options("").quiesce == parse_options("quiesce=auto").quiesce == Quiesce("auto")
    assert not parse_options("quiesce=no").quiesce.is_wanted
    assert parse_options("quiesce=require").quiesce.is_required
    assert parse_options("quiesce=/:/srv/:/srv:/a b").quiesce == Quiesce("require", ("/", "/srv", "/a b"))
    assert parse_options("quiesce=///").quiesce.mounts == ("/",)


def test_an_escaped_comma_belongs_to_the_value() -> None:
    assert parse_options([r"uri=qemu+ssh://h/?a\,b,debug"]).uri == "qemu+ssh://h/?a,b"


def test_an_escaped_backslash_escapes_nothing() -> None:
    assert parse_options(r"uri=a\\,debug") == replace(Options(), uri="a\\", debug=True)
    assert parse_options(r"uri=a\b") == replace(Options(), uri=r"a\b")
    assert parse_options("uri=a\\").uri == "a\\"


def test_one_text_is_taken_as_well_as_several() -> None:
    assert parse_options("idle=1,,debug,") == parse_options(["idle=1", "", "debug"])


def test_the_last_of_two_wins() -> None:
    assert parse_options(["idle=1,idle=2"]).idle == 2
    assert parse_options(["disks=vda,disks=vdb"]).disks == ("vdb",)
    assert parse_options(["ro,rw,noexec"]).kernel_words == ("noexec", "rw")
    assert parse_options(["noatime", "relatime"]).kernel_words == ()
    assert parse_options(["relatime", "noatime"]).kernel_words == ("noatime",)


def test_words_for_others_have_no_effect() -> None:
    words = "defaults,noauto,nofail,_netdev,user,user=joe,x-systemd.idle-timeout=5,X-mount.mkdir,comment=x"
    assert parse_options([words]) == Options()
    assert parse_options([word for word in IGNORED if not word.endswith("-")]) == Options()


def test_the_kernel_is_given_no_word_that_libfuse_refuses() -> None:
    # libfuse takes no mount at all then: "fuse: unknown option(s): `-o relatime'".
    times = "atime,diratime,nodiratime,relatime,norelatime,strictatime,lazytime"
    assert parse_options(times).kernel_words == ()
    assert not KERNEL & set(IGNORED)
    assert parse_options(",".join(sorted(KERNEL))).kernel <= KERNEL


def test_what_mount_fuse3_adds_is_taken() -> None:
    # As root it adds dev and suid; mount(8) puts rw first.
    assert parse_options("rw,disks=vda,vdb,dev,suid").kernel_words == ("dev", "rw", "suid")


def test_the_files_never_are_writable() -> None:
    for umask in range(0o1000):
        options = replace(Options(), umask=umask)
        assert options.file_mode & 0o333 == 0
        assert options.folder_mode & 0o222 == 0


def test_a_point_may_not_be_lost_before_it_may_end() -> None:
    with pytest.raises(UsageError, match="idle-max=43200 is less than idle=86400; raise it too"):
        parse_options("idle=1d")
    assert parse_options("idle=1d,idle-max=0").idle == 86400
    assert parse_options("idle=0,idle-max=1h").idle_max == 3600
    assert parse_options("idle-max=5").idle_max == 5


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("idel=1", "unknown option idel; did you mean idle?"),
        ("zzz\n", r"unknown option zzz\\n;"),
        ("idle", "option idle needs a value: idle=TIME"),
        ("debug=1", "option debug takes no value"),
        ("idle=1w", "option idle=1w: is not a time"),
        ("idle=", "option idle=: is not a time"),
        ("idle=٣", "is not a time"),
        ("idle=" + "9" * 400, "is longer than ten years"),
        ("remount", "unknown option remount"),
        ("secrets", "unknown option secrets"),
        ("nodve", "did you mean nodev?"),
        ("timeout=0", "must be more than 0"),
        ("scratch=here", "is not an absolute path"),
        ("scratch=/a\0b", "libvirt's XML cannot hold"),
        ("scratch=/\udc80", "libvirt's XML cannot hold"),
        ("connections=0", "from 1 to 16"),
        ("connections=x", "from 1 to 16"),
        ("quiesce=yes", "is neither auto, require, no, nor a list"),
        ("quiesce=", "is neither auto, require, no, nor a list"),
        ("quiesce=/a:", "nor a list of the guest's mount points, like /srv:/home"),
        ("quiesce=/a\x1b", "nor a list"),
        ("begin=never", "neither look, mkdir nor command"),
        ("disks=", "names no disk"),
        ("umask=9", "is not an octal mode"),
        ("umask=1777", "is not an octal mode"),
        ("uid=no-such-user", "is no user"),
        ("uid=4294967295", "is no user"),
        ("uid=" + "9" * 5000, "is no user"),
        ("uid=a\0b", "is no user"),
        ("uid=-1", "is no user"),
        ("gid=no-such-group", "is no group"),
        ("uri=", "is empty"),
        ("allow_other,allow_root", "exclude each other"),
    ],
)
def test_what_is_wrong_is_named(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence.replace("?", r"\?")) as caught:
        parse_options([text])
    assert caught.value.exit_status == 2
    assert str(caught.value).isprintable()


def test_help_names_every_option() -> None:
    for word in OPTIONS:
        assert f"  {word.name}" in render_option_help()
    assert max(map(len, render_option_help().splitlines())) <= 105


def test_defaults_are_told_as_they_are() -> None:
    written = {
        word.name: word.default for word in OPTIONS if word.name in ("begin", "quiesce", "idle", "idle-max", "timeout")
    }
    written["connections"] = "2"
    assert parse_options(f"{name}={value}" for name, value in written.items()) == Options()
    assert all(word.parse is None or word.default is not None for word in OPTIONS)
    assert f"(default: {written['connections']})" in render_option_help()


def test_a_folder_is_one_path_however_it_is_written() -> None:
    assert {parse_options(f"scratch={path}").scratch for path in ("/a/b", "//a//b/", "/a/./b", "/a/c/../b")} == {"/a/b"}


@pytest.mark.parametrize(
    ("text", "bytes_"), [("65536", 65536), ("64K", 65536), ("1.5M", 3 * 2**19), ("2G", 2**31), ("1T", 2**40)]
)
def test_rate_is_a_size(text: str, bytes_: int) -> None:
    assert parse_options(f"rate={text}").rate == bytes_


@pytest.mark.parametrize("text", ["0", "63K", "-1M", "50m", "50MB", "M", "1e9", "1.M", "٣M", "9" * 400])
def test_rate_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"option rate=.*(is not a size|is less than 64K a second)"):
        parse_options(f"rate={text}")


def test_scratch_reserve() -> None:
    assert parse_options("").scratch_reserve == Reserve()
    assert parse_options("scratch-reserve=5G").scratch_reserve == Reserve(size=5 * 2**30)
    assert parse_options("scratch-reserve=2%").scratch_reserve == Reserve(percent=2)
    with pytest.raises(UsageError, match="write 512M, 5G or 10%"):
        parse_options("scratch-reserve=lots")


def test_the_words_of_checkpoints() -> None:
    options = parse_options("checkpoint=day-%j,keep=7,begin=mkdir,backing={checkpoint}.{disk}.raw,format=raw,idle=5m")
    assert (options.checkpoint, options.keep, options.begin, options.idle) == ("day-%j", 7, "mkdir", 300.0)
    assert options.backing.format == "raw"
    assert options.backing.name("vda", "monday") == "monday.vda.raw"
    assert parse_options("").backing.name("vda", "monday") == "vda.monday.qcow2"
    assert parse_options("checkpoint=day,checkpoint=none").checkpoint is None


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("checkpoint=a b", "makes no name"),
        ("checkpoint=", "makes no name"),
        ("keep=0", "not a number from 1"),
        ("keep=x", "not a number from 1"),
        ("backing=", "is empty"),
        ("backing=" + "x" * 1024, "too long"),
        ("backing=x,format=vmdk", "neither qcow2 nor raw"),
        ("format=raw", "unknown option format"),
    ],
)
def test_what_is_wrong_of_checkpoints_is_named(text: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_options(text)
