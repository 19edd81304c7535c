# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from backupfs import cli
from backupfs.errors import BackupfsError, NoSuchDomain, UsageError


def test_help_shows_options_statuses_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("idle=TIME", "exit status:", "umount /mnt/web01", "release"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "required: SOURCE, MOUNTPOINT"),
        (["web01"], "required: MOUNTPOINT"),
        (["-x", "web01", "/m"], "unrecognized arguments: -x"),
        (["-o", "nope", "web01", "/m"], "unknown option nope"),
        (["", "/m"], "SOURCE is empty"),
        (["status"], "required: MOUNTPOINT"),
        (["status", "--what", "/m"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_usage_is_status_2(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("backupfs: ")
    assert sentence in error


def test_status_of_a_plain_folder_says_that_nothing_is_mounted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", str(tmp_path)]) == 32
    assert "no backupfs is mounted there" in capsys.readouterr().err


def test_status_that_is_no_json_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".backupfs").mkdir()
    (tmp_path / ".backupfs/status.json").write_text("{")
    assert cli.main(["release", str(tmp_path)]) == 32
    assert "cannot be read" in capsys.readouterr().err


def test_the_first_error_of_ours_is_found_in_nested_groups() -> None:
    wanted = UsageError("this")
    group = BaseExceptionGroup("outer", [ValueError("x"), BaseExceptionGroup("inner", [wanted])])
    assert cli._first(group) is wanted
    other = ValueError("only")
    assert cli._first(BaseExceptionGroup("outer", [other])) is other


def test_every_error_has_a_sentence_an_errno_and_a_status() -> None:
    def leaves(cls: type[BackupfsError]) -> list[type[BackupfsError]]:
        return [cls, *(leaf for sub in cls.__subclasses__() for leaf in leaves(sub))]

    for cls in leaves(BackupfsError)[1:]:
        fields = [0 if field.type in ("int", "float") else "x" for field in cls.__dataclass_fields__.values()
                  if "ClassVar" not in str(field.type)]  # fmt: skip
        error = cls(*fields)
        assert str(error)
        assert not str(error).endswith(".")
        assert error.errno > 0
        assert 1 <= error.exit_status <= 32
    assert "'web'" in str(NoSuchDomain("web", "qemu:///system"))
