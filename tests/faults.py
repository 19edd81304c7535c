# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/faults.md: what was tried, and what the reader, the guest and the log saw of it.

A test of a fault says what it tries and hands each observation over; a cell of the table is what
was observed, never text of the test's own. A row stands in the table only if its test passed.

    def test_killed_qemu(own_guest, mount, fault):
        tried = fault("QEMU is killed with SIGKILL")                # section="The guest and its QEMU"
        ...
        tried.fails(errno.EIO, lambda: os.listdir(mounted.raw))     # reader: EIO
        tried.reads(lambda: mounted.image.read_bytes(), truth)      # reader: the instant's bytes
        tried.reads(read, truth, when="after `backupfs release`")   # reader: …; after `backupfs release`: …
        tried.guest(own_guest, "shut off")                          # guest: shut off
        tried.log(mounted, "is lost")                               # log: the line, once it is there
        tried.refused("virsh save", lambda: virsh("save", …))       # the other one: what libvirt said

That is all that adding a row takes; a test may add several (call `fault` again), and one that
`own_guest` and `mount` are not used by may do so too (`fails` and `reads` take any function; `saw`
takes any value that was observed).

    test ─ fault ─► report.user_properties ─(xdist)─► controller ─┬─ --faults=write ─► docs/faults.md
                                                                  └─ --faults=check: is it the same?

Law: the table is the same in every run of the same code. So names, paths, times and identifiers
are normalised (`normalise`), and rows are in the order of section and title.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

TABLE: Final = Path(__file__).parents[1] / "docs/faults.md"
PROPERTY: Final = "fault"
SECTIONS: Final = (
    "The guest and its QEMU",
    "Libvirt",
    "Other owners of the domain",
    "NBD",
    "The guest's agent",
    "Scratch space",
    "backupfs itself",
    "Hostile input",
)
COLUMNS: Final = ("reader", "guest", "log", "answer")
HEADS: Final = {"reader": "the reader sees", "guest": "the guest", "log": "the log", "answer": "who tried it is told"}
HEADER: Final = """\
# Faults that were tried

Made by `contrib/test faults` from what the tests saw; do not edit. `contrib/test` fails if a run
sees something else. A line of the log is given without its date; N stands for a number, DIR for a folder.
Tried with libvirt 9.0 and QEMU 7.2 (Debian 12).
"""


class SeesGuest(Protocol):
    """What is used of a guest."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    def run(self, command: str) -> str: ...


class SeesMount(Protocol):
    """What is used of a mount."""

    @property
    def log(self) -> str: ...
    def wait_log(self, text: str, timeout: float = 30.0) -> None: ...


_NORMAL: Final = (
    (re.compile(r"^[0-9-]{10} [0-9:,]{8,12} "), ""),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "UUID"),
    (re.compile(r"\bguest[0-9]+-[0-9]+\b"), "web01"),
    (re.compile(r"/tmp/[\w./@+-]*/|/run/[\w./@+-]*/"), "DIR/"),
    (re.compile(r"\b[0-9a-f]{16}\b"), "ID"),
    (re.compile(r"\b[0-9]{5,}\b|(?<=process )[0-9]+|[0-9.]+(?= ms\b| reads\b)"), "N"),
)


def normalise(text: str) -> str:
    """Return *text* without what differs from run to run."""
    for pattern, instead in _NORMAL:
        text = pattern.sub(instead, text)
    return " ".join(text.split())


@dataclass(eq=False)
class Fault:
    """One row: what was tried, and what was seen so far, in order."""

    title: str
    section: str
    seen: dict[str, list[str]] = field(default_factory=lambda: {column: [] for column in COLUMNS})

    def saw(self, column: str, what: str, when: str = "") -> None:
        """Note an observation; once where the same is seen again."""
        said = f"{when}: {normalise(what)}" if when else normalise(what)
        if said not in self.seen[column]:
            self.seen[column].append(said)

    def fails(self, number: int, action: Callable[[], object], *, within: float = 10.0, when: str = "") -> None:
        """See that *action* fails with errno *number* within so many seconds, and note it."""
        begun = time.monotonic()
        with pytest.raises(OSError) as caught:
            action()
        found = errno.errorcode[caught.value.errno or 0]
        assert found == errno.errorcode[number]
        self.saw("reader", found, when)
        assert time.monotonic() - begun < within

    def reads(self, action: Callable[[], bytes], truth: bytes, *, when: str = "") -> None:
        """See that *action* returns *truth*, the bytes of the instant, and note it."""
        found = action()
        assert len(found) == len(truth)
        assert found == truth, f"a wrong byte at {next(i for i in range(len(truth)) if found[i] != truth[i])}"
        self.saw("reader", "the instant's bytes", when)

    def guest(self, guest: SeesGuest, expected: str, *, when: str = "") -> None:
        """See that the guest is in the *expected* state, at work if it is running, and note it."""
        state = guest.state
        assert state == expected
        if state == "running":
            assert guest.run("echo alive") == "alive"
        self.saw("guest", state, when)

    def log(self, mount: SeesMount, text: str, *, when: str = "", cut: bool = False) -> None:
        """Wait until the mount's log has a line with *text*, and note the line.

        With *cut* only as far as the text goes: where the rest depends on who was quicker.
        """
        mount.wait_log(text)
        line = next(line for line in mount.log.splitlines() if text in line)
        self.saw("log", line[: line.index(text) + len(text)] + " …" if cut else line, when)

    def refused(self, deed: str, action: Callable[[], object]) -> None:
        """See that libvirt refuses what *action* asks for (RuntimeError), and note how."""
        begun = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            action()
        took = time.monotonic() - begun
        told = re.sub(r"^virsh .*?: ", "", str(caught.value)).splitlines()[-1].removeprefix("error: ")
        self.saw("answer", f"{deed}, {'after 30 s' if 25 < took < 60 else 'at once'}: {told}")
        assert took < 60

    def allowed(self, deed: str, action: Callable[[], object]) -> None:
        """Do what libvirt allows, and note that it does."""
        action()
        self.saw("answer", f"{deed}: done")


def render(rows: list[Mapping[str, Any]]) -> str:
    """Write the table."""
    lines = [HEADER]
    titles = [row["title"] for row in rows]
    assert len(titles) == len(set(titles)), f"two rows of one title: {sorted(t for t in titles if titles.count(t) > 1)}"
    for section in SECTIONS:
        within = sorted((row for row in rows if row["section"] == section), key=lambda row: row["title"].casefold())
        columns = [column for column in COLUMNS if any(row["seen"][column] for row in within)]
        if not within:
            continue
        heads = ["what was tried", *(HEADS[column] for column in columns)]
        lines += [f"## {section}\n", _line(heads), _line(["---"] * len(heads))]
        lines += [_line([row["title"], *("; ".join(row["seen"][column]) for column in columns)]) for row in within]
        lines.append("")
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") or "–" for cell in cells) + " |"


def difference(committed: str, seen: str) -> str:
    """Return, as a diff, what the tests saw and the table does not say; "" if they are the same."""
    return "\n".join(
        difflib.unified_diff(committed.splitlines(), seen.splitlines(), "docs/faults.md", "seen", n=0, lineterm="")
    )


# --- the plugin ------------------------------------------------------------------------------------


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Iterator[Callable[..., Fault]]:
    """Make a row of the table: `fault(title, section=…)`, see the module."""
    made: list[Fault] = []

    def make(title: str, section: str = SECTIONS[0]) -> Fault:
        assert section in SECTIONS
        made.append(Fault(title, section))
        return made[-1]

    yield make
    for one in made:
        request.node.user_properties.append((PROPERTY, asdict(one)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", choices=("write", "check"), help="write docs/faults.md from what the tests saw, or compare"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault: a test that adds to docs/faults.md; every user of `fault` has it")
    if config.getoption("--faults") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Collector(config), "faults-collector")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "fault" in getattr(item, "fixturenames", ()):
            item.add_marker("fault")


class _Collector:
    """Gathers the rows where the run is controlled, and compares or writes at its end."""

    def __init__(self, config: pytest.Config) -> None:
        self._write = config.getoption("--faults") == "write"
        self._rows: list[Mapping[str, Any]] = []
        self._sentence = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # its properties are whole by then
            self._rows += [value for name, value in report.user_properties if name == PROPERTY]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK:
            self._sentence = "docs/faults.md was not looked at, for the tests did not all pass"
            return
        seen = render(self._rows)
        if self._write:
            TABLE.parent.mkdir(exist_ok=True)
            TABLE.write_text(seen, encoding="utf-8")
            self._sentence = f"docs/faults.md: {len(self._rows)} faults written"
            return
        committed = ""
        with contextlib.suppress(FileNotFoundError):
            committed = TABLE.read_text(encoding="utf-8")
        if found := difference(committed, seen):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            self._sentence = (
                "docs/faults.md does not say what these tests saw; if that is right, run `contrib/test faults` "
                f"and commit it:\n{found}"
            )

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._sentence:
            terminalreporter.section("faults")
            terminalreporter.write_line(self._sentence)
