# SPDX-License-Identifier: GPL-3.0-or-later
"""What `backupfs status` tells: one value, three ways to write it. Pure.

Snapshot ──render_json──► .backupfs/status.json ──render_table──► a person
         └─render_metrics► .backupfs/metrics.prom ──► Prometheus
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table

SCHEMA: Final = 1  # of status.json; a field may be added within one, none changed or taken away


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
    why_no_extents: str | None
    scratch: str
    scratch_used: int | None
    scratch_free: int | None


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
    scratch_used: int | None
    disks: Mapping[str, DiskStatus]
    control: str
    log: str


def render_json(snapshot: Snapshot) -> bytes:
    """Write status.json."""
    return (json.dumps({"schema": SCHEMA, **asdict(snapshot)}, indent=2) + "\n").encode()


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _metric(name: str, kind: str, text: str, samples: list[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    if not samples:
        return
    yield f"# HELP backupfs_{name} {text}"
    yield f"# TYPE backupfs_{name} {kind}"
    for labels, value in samples:
        words = ",".join(f'{key}="{_escape(label)}"' for key, label in labels.items())
        yield f"backupfs_{name}{{{words}}} {value!r}"


def render_metrics(snapshot: Snapshot) -> bytes:
    """Write the figures in Prometheus' text format."""
    own = {"domain": snapshot.domain, "uuid": snapshot.uuid}

    def one(value: float | None) -> list[tuple[Mapping[str, str], float]]:
        return [] if value is None else [(own, value)]

    def each(field: str) -> list[tuple[Mapping[str, str], float]]:
        values = ((target, getattr(disk, field)) for target, disk in snapshot.disks.items())
        return [({**own, "disk": target}, value) for target, value in values if value is not None]

    lines = [
        *_metric(
            "state",
            "gauge",
            "1 for the state that the backup job is in.",
            [
                ({**own, "state": state}, int(state == snapshot.state))
                for state in ("idle", "starting", "running", "stopping", "lost")
            ],
        ),
        *_metric("instant_seconds", "gauge", "The point in time's instant.", one(snapshot.instant)),
        *_metric("last_instant_seconds", "gauge", "The latest point in time's instant.", one(snapshot.last_instant)),
        *_metric("open_files", "gauge", "Open files of points in time.", one(snapshot.open_files)),
        *_metric("unused_seconds", "gauge", "Time since the last request.", one(snapshot.unused_for)),
        *_metric("scratch_used_bytes", "gauge", "Old blocks saved by QEMU.", one(snapshot.scratch_used)),
        *_metric("scratch_free_bytes", "gauge", "Room left where they are saved.", each("scratch_free")),
        *_metric("disk_size_bytes", "gauge", "The disk's size.", each("size")),
        *_metric("disk_allocated_bytes", "gauge", "What of it is not zero.", each("allocated")),
        *_metric("disk_read_bytes", "counter", "Bytes brought over NBD in this point in time.", each("read")),
        *_metric("disk_requests", "counter", "NBD reads in this point in time.", each("requests")),
        *_metric("disk_reconnects", "counter", "NBD connections made again.", each("reconnects")),
    ]
    return ("\n".join(lines) + "\n").encode()


def size_text(count: float | None) -> str:
    """Write bytes with a binary unit; what is not known is a dash."""
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def duration_text(seconds: float | None) -> str:
    """Write a duration with its two largest units."""
    if seconds is None:
        return "–"
    whole = int(seconds)
    for size, unit, small, rest in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small} {rest}"
    return f"{whole} s"


def render_table(status: Mapping[str, Any], console: Console) -> None:
    """Print status.json for a person."""
    head = Table.grid(padding=(0, 2))
    rows = [
        ("domain", f"{status['domain']}  ({status['uuid']} at {status['uri']})"),
        ("mounted", f"{status['mount_point']}, by process {status['pid']}"),
        ("state", status["state"]),
    ]
    if status["instant"] is not None:
        rows.append(("instant", f"{status['instant']}, {duration_text(status['age'])} old"))
    rows.append(("open files", f"{status['open_files']}; last request {duration_text(status['unused_for'])} ago"))
    if status["scratch_used"] is not None:
        rows.append(("scratch used", size_text(status["scratch_used"])))
    for name, value in rows:
        head.add_row(f"{name}:", value)
    console.print(head, markup=False)
    if status["disks"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("disk")
        for column in ("size", "allocated", "read so far", "rate", "scratch free"):
            table.add_column(column, justify="right")
        for target, disk in status["disks"].items():
            table.add_row(
                target,
                size_text(disk["size"]),
                size_text(disk["allocated"]),
                size_text(disk["read"]),
                f"{size_text(disk['rate'])}/s",
                size_text(disk["scratch_free"]),
            )
        console.print(table)
    for name, why in status["why"].items():
        console.print(f"{name}: {why}", markup=False, soft_wrap=True)
