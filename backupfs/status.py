# SPDX-License-Identifier: GPL-3.0-or-later
"""What `backupfs status` tells: one value, three ways to write it. Pure.

Snapshot ──render_json──► .backupfs/status.json ──render_table──► a person
         └─render_metrics► .backupfs/metrics.prom ──► Prometheus

Law: within one SCHEMA a field of status.json may be added, none changed or taken away; so the
reader, which may be of another version, takes what it finds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from backupfs.logs import printable

if TYPE_CHECKING:
    from rich.console import Console

READ_AHEAD: Final = 2**20  # bytes: below that, sequential reads are slower than they could be
SCHEMA: Final = 1  # of status.json
UNITS: Final = ("KiB", "MiB", "GiB", "TiB", "PiB")
STATES: Final = ("idle", "starting", "running", "stopping", "lost")


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """One disk of the point in time; sizes in bytes, rate in bytes a second."""

    size: int
    allocated: int
    read: int
    rate: float
    requests: int
    connections: int
    reconnects: int
    extents: int
    mapped: int  # less than size where the map is huge; then allocated is a guess
    why_no_extents: str | None
    scratch: str
    scratch_free: int | None
    scratch_reserve: int | None = None
    scratch_file_system: str | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A mount, as it is at one moment. Times are seconds since 1970, durations seconds."""

    version: str
    pid: int
    mount_point: str
    domain: str
    uuid: str
    uri: str
    source: str  # live
    state: str
    instant: int | None
    age: float | None
    point: str | None
    socket: str | None
    why: Mapping[str, str]  # what is not there, or did not go well, with the cure
    open_files: int
    holders: tuple[int, ...]
    unused_for: float
    idle: float
    idle_max: float
    last_instant: int
    quiesced: bool | None  # whether the guest was frozen when the point in time began
    frozen_ms: float | None
    frozen_filesystems: int | None
    scratch_used: int | None
    disks: Mapping[str, DiskStatus]
    rate_limit: int | None  # bytes a second
    read_ahead: int  # bytes; what the kernel asks for at a time
    sparse_seeks: bool  # SEEK_HOLE is told the truth, not "all data"
    control: str
    log: str
    watchdog: int | None = None  # its process


def render_json(snapshot: Snapshot) -> bytes:
    """Write status.json: the fields of Snapshot, and the number of their schema."""
    return (json.dumps({"schema": SCHEMA, **asdict(snapshot)}, indent=2) + "\n").encode()


# --- Prometheus' text format, version 0.0.4 ------------------------------------------------------

Sample = tuple[Mapping[str, str], float]


def _label(value: str) -> str:
    """Write a label's value: UTF-8, with three characters escaped and no others."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return escaped.encode(errors="replace").decode()


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)


def _metric(name: str, kind: str, text: str, samples: list[Sample]) -> Iterator[str]:
    """Yield the lines of one metric; none without a sample, for what is not known is not 0."""
    if not samples:
        return
    yield f"# HELP backupfs_{name} {text}"
    yield f"# TYPE backupfs_{name} {kind}"
    for labels, value in samples:
        words = ",".join(f'{key}="{_label(label)}"' for key, label in labels.items())
        yield f"backupfs_{name}{{{words}}} {_number(value)}"


def render_metrics(snapshot: Snapshot) -> bytes:
    """Write the figures in Prometheus' text format."""
    own = {"domain": snapshot.domain, "uuid": snapshot.uuid}

    def one(value: float | None) -> list[Sample]:
        return [] if value is None else [(own, value)]

    def each(field: str) -> list[Sample]:
        values = ((target, getattr(disk, field)) for target, disk in snapshot.disks.items())
        return [({**own, "disk": target}, value) for target, value in values if value is not None]

    states: list[Sample] = [({**own, "state": state}, int(state == snapshot.state)) for state in STATES]
    failed = int("point" in snapshot.why)
    quiesced = None if snapshot.quiesced is None else int(snapshot.quiesced)
    frozen = None if snapshot.frozen_ms is None else snapshot.frozen_ms / 1000
    build: list[Sample] = [({**own, "version": snapshot.version}, 1)]
    lines = [
        *_metric("build_info", "gauge", "The version that serves the mount.", build),
        *_metric("state", "gauge", "1 for the state that the backup job is in.", states),
        *_metric("point_failed", "gauge", "1 if the latest point in time was lost or could not begin.", one(failed)),
        *_metric("instant_seconds", "gauge", "The point in time's instant.", one(snapshot.instant)),
        *_metric("last_instant_seconds", "gauge", "The latest point in time's instant.", one(snapshot.last_instant)),
        *_metric("sparse_seeks", "gauge", "1 if SEEK_HOLE is told where holes are.", one(int(snapshot.sparse_seeks))),
        *_metric("open_files", "gauge", "Open files of points in time.", one(snapshot.open_files)),
        *_metric("unused_seconds", "gauge", "Time since the last request.", one(snapshot.unused_for)),
        *_metric("quiesced", "gauge", "1 if the guest was frozen when the point began.", one(quiesced)),
        *_metric("frozen_seconds", "gauge", "For how long it was frozen.", one(frozen)),
        *_metric("scratch_used_bytes", "gauge", "Old blocks saved by QEMU.", one(snapshot.scratch_used)),
        *_metric("scratch_free_bytes", "gauge", "Room left where they are saved.", each("scratch_free")),
        *_metric("scratch_reserve_bytes", "gauge", "Room below which the point is lost.", each("scratch_reserve")),
        *_metric("watchdog", "gauge", "1 if a watchdog is there.", one(int(snapshot.watchdog is not None))),
        *_metric("rate_limit_bytes", "gauge", "Bytes a second that may be read.", one(snapshot.rate_limit)),
        *_metric("disk_size_bytes", "gauge", "The disk's size.", each("size")),
        *_metric("disk_allocated_bytes", "gauge", "What of it is not zero.", each("allocated")),
        *_metric("disk_extents", "gauge", "Runs of data and of zeros in its map.", each("extents")),
        *_metric("disk_mapped_bytes", "gauge", "What of it is mapped by now.", each("mapped")),
        *_metric("disk_connections", "gauge", "NBD connections.", each("connections")),
        *_metric("disk_read_bytes_total", "counter", "Bytes brought over NBD in this point in time.", each("read")),
        *_metric("disk_requests_total", "counter", "NBD reads in this point in time.", each("requests")),
        *_metric("disk_reconnects_total", "counter", "NBD connections made again.", each("reconnects")),
    ]
    return ("\n".join(lines) + "\n").encode()


# --- for a person --------------------------------------------------------------------------------


def size_text(count: float | None) -> str:
    """Write bytes with a binary unit; what is not known is a dash."""
    if count is None:
        return "–"
    if abs(count) < 1023.5:  # above, it would be rounded to 1024
        return f"{count:.0f} B"
    power = 1
    while abs(count) / 1024**power >= 1023.95 and power < len(UNITS):
        power += 1
    return f"{count / 1024**power:.1f} {UNITS[power - 1]}"


def duration_text(seconds: float | None) -> str:
    """Write a duration with its two largest units."""
    if seconds is None:
        return "–"
    whole = max(int(seconds), 0)  # a clock may have stepped back
    for size, unit, small, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {rest}"
    return f"{whole} s"


def instant_text(instant: int) -> str:
    """Write an instant as local time, and as the number that the files' times are."""
    return f"{datetime.fromtimestamp(instant).astimezone().isoformat(sep=' ')} ({instant})"


def _head(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "domain", f"{status['domain']}  ({status['uuid']} at {status['uri']})"
    yield "mounted", f"{status['mount_point']}, by process {status['pid']}, backupfs {status['version']}"
    yield "state", status["state"]
    if status["instant"] is not None:
        yield "instant", f"{instant_text(status['instant'])}, {duration_text(status['age'])} old"
        if status["frozen_ms"] is not None:
            yield (
                "quiesced",
                (
                    f"{'yes' if status['quiesced'] else 'no'}; {status['frozen_filesystems']} file systems were frozen"
                    f" for {status['frozen_ms']:.0f} ms"
                ),
            )
        else:
            yield "quiesced", "no"
        if status["idle"]:
            yield "ends", f"when unused for {duration_text(status['idle'])}"
    yield "open files", f"{status['open_files']}; last request {duration_text(status['unused_for'])} ago"
    if status["rate_limit"] is not None:
        yield "rate limit", f"{size_text(status['rate_limit'])}/s"
    if status["scratch_used"] is not None:
        yield "scratch used", size_text(status["scratch_used"])
    for line in dict.fromkeys(_scratch_line(disk) for disk in status["disks"].values()):
        if line is not None:
            yield "scratch", line
    if "watchdog" in status:
        yield "watchdog", "none" if status["watchdog"] is None else f"process {status['watchdog']}"
    yield "log", status["log"]


def _scratch_line(disk: Mapping[str, Any]) -> str | None:
    """Write where a disk's old blocks are saved; disks that share a folder have one line."""
    if disk.get("scratch_file_system") is None:
        return None
    return (
        f"{os.path.dirname(disk['scratch'])} ({disk['scratch_file_system']}): {size_text(disk['scratch_free'])} free,"
        f" the point ends at {size_text(disk['scratch_reserve'])}"
    )


def render_table(status: Mapping[str, Any], console: Console) -> None:
    """Print status.json for a person."""
    # Late: the process that serves a mount renders no table, and shall not carry rich for it.
    from rich import box  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def say(line: str) -> None:
        # Not cut and not wrapped: a path is there to be copied.
        console.print(printable(line), markup=False, highlight=False, emoji=False, soft_wrap=True)

    for name, value in _head(status):
        say(f"{name + ':':<14}{value}")
    if status["disks"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("disk")
        for column in ("size", "allocated", "read so far", "rate", "scratch free"):
            table.add_column(column, justify="right")
        for target, disk in status["disks"].items():
            table.add_row(
                Text(printable(target)),
                size_text(disk["size"]),
                size_text(disk["allocated"]),
                size_text(disk["read"]),
                f"{size_text(disk['rate'])}/s",
                size_text(disk["scratch_free"]),
            )
        console.print(table)
    for name, why in status["why"].items():
        say(f"{name}: {why}")
    if 0 < status["read_ahead"] < READ_AHEAD:
        say(
            f"read-ahead: {size_text(status['read_ahead'])}; sequential reads are faster with"
            f" {size_text(READ_AHEAD)}, see README"
        )
    for target, disk in status["disks"].items():
        if disk["mapped"] < disk["size"] and not disk["why_no_extents"]:
            known = f"{size_text(disk['mapped'])} of {size_text(disk['size'])}"
            say(f"{target}: {known} are mapped, the rest is when it is read; what is allocated is a guess")
        if disk["why_no_extents"]:
            say(f"{target}: holes are read like data: {disk['why_no_extents']}")
