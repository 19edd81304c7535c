# SPDX-License-Identifier: GPL-3.0-or-later
"""Any text is options or a UsageError, and options that are written down read back."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace

from hypothesis import example, given
from hypothesis import strategies as st

from backupfs.errors import UsageError
from backupfs.options import IGNORED, KERNEL, MOST_CONNECTIONS, OPTIONS, Options, Quiesce, parse_options

anything = st.text(st.characters(codec=None), max_size=60)
names = st.sampled_from([word.name for word in OPTIONS] + sorted(KERNEL) + list(IGNORED))
values = anything | st.from_regex(r"[0-9]{1,30}[smhd]?", fullmatch=True) | st.sampled_from(["", "/", "look", "root"])
words = anything | names | st.builds(lambda name, value: f"{name}={value}", names, values)


def escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


@given(st.lists(words, max_size=6), st.booleans())
@example(["uid=" + "9" * 5000], True)
@example(["idle=" + "9" * 5000], True)
@example(["scratch=/\0"], True)
@example(["uri=\\"], True)
def test_any_text_is_options_or_a_usage_error(texts: list[str], joined: bool) -> None:
    sentence = ""
    try:
        options = parse_options(",".join(texts) if joined else texts)
    except UsageError as error:
        sentence = str(error)
    assert sentence.isprintable(), "it goes to a terminal"
    if sentence:
        return
    # Whatever was accepted can be used.
    assert all(math.isfinite(seconds) for seconds in (options.idle, options.idle_max, options.timeout))
    assert options.timeout > 0
    assert 0 <= options.uid < 2**32 - 1
    assert 0 <= options.gid < 2**32 - 1
    assert 1 <= options.connections <= MOST_CONNECTIONS
    assert (options.file_mode | options.folder_mode) & 0o222 == 0
    assert options.kernel <= KERNEL
    assert not (options.allow_other and options.allow_root)
    assert options.scratch is None or (options.scratch.startswith("/") and options.scratch.isprintable())
    json.dumps({"uri": options.uri, "disks": options.disks, "scratch": options.scratch}).encode()


disk_names = st.lists(st.from_regex(r"(vd|sd|hd)[a-z]{1,2}", fullmatch=True), min_size=1, max_size=4, unique=True)
printable = st.text(min_size=1, max_size=20).filter(str.isprintable)

options = st.builds(
    Options,
    uri=st.none() | printable,
    disks=st.none() | disk_names.map(tuple),
    exclude=st.just(()) | disk_names.map(tuple),
    begin=st.sampled_from(["look", "command"]),
    quiesce=st.sampled_from([Quiesce(mode) for mode in ("auto", "require", "no")])
    | st.sampled_from([("/",), ("/srv", "/home"), ("/a,b\\", "/ä b")]).map(lambda mounts: Quiesce("require", mounts)),
    idle=st.integers(0, 10**4).map(float),
    idle_max=st.integers(10**4, 10**6).map(float),
    scratch=st.none() | st.sampled_from(["/s", "/a,b\\", "/ä b"]),
    connections=st.integers(1, MOST_CONNECTIONS),
    timeout=st.integers(1, 10**6).map(float),
    allow_other=st.booleans(),
    uid=st.integers(0, 2**32 - 2),
    gid=st.integers(0, 2**32 - 2),
    umask=st.none() | st.integers(0, 0o777),
    debug=st.booleans(),
    kernel=st.sets(st.sampled_from(["ro", "nosuid", "nodev", "noexec", "noatime", "sync", "dirsync"])).map(frozenset),
)


def written(value: Options, separator: str) -> list[str]:
    """Write options down as words of -o."""
    found = [
        f"begin={value.begin}", f"idle={value.idle:.0f}", f"idle-max={value.idle_max:.0f}s", f"uid={value.uid}",
        f"gid={value.gid}", f"connections={value.connections}", f"timeout={value.timeout:.0f}", *value.kernel,
    ]  # fmt: skip
    found += [f"{name}={escape(text)}" for name in ("uri", "scratch") if (text := getattr(value, name)) is not None]
    found += [
        f"{name}={separator.join(text)}" for name in ("disks", "exclude") if (text := getattr(value, name)) is not None
    ]
    found += [f"quiesce={escape(':'.join(value.quiesce.mounts) or value.quiesce.mode)}"]
    found += [f"umask={value.umask:03o}"] if value.umask is not None else []
    return found + [name for name in ("allow_other", "debug") if getattr(value, name)]


@given(options, st.randoms(use_true_random=False), st.booleans())
def test_what_is_written_down_reads_back(value: Options, random: object, by_comma: bool) -> None:
    words = [word for word in written(value, "," if by_comma else ":") if word != "exclude="]
    random.shuffle(words)  # type: ignore[attr-defined]
    assert parse_options(",".join(words)) == value
    assert parse_options(words) == value


@given(st.lists(words, max_size=4), st.lists(st.sampled_from([word for word in IGNORED if word[-1] != "-"])))
def test_words_for_others_change_nothing(texts: list[str], others: list[str]) -> None:
    with contextlib.suppress(UsageError):
        bare = parse_options(texts)
        after = parse_options([*texts, *others])
        # But that a later word may take noatime back.
        assert replace(after, kernel=bare.kernel) == bare
        assert bare.kernel - after.kernel <= {"noatime"}
