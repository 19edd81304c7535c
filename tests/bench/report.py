# SPDX-License-Identifier: GPL-3.0-or-later
"""Results, for a person, for a program and for a page. Pure.

Result ──┬── render_table ──► terminal
         ├── render_lines ──► one JSON object a line
         └── render_chart ──► SVG: bars by group, each group on its own scale
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Final
from xml.sax.saxutils import escape

from rich import box
from rich.table import Table
from rich.text import Text

from tests.bench.figures import Result, Verdict

OURS: Final = "backupfs"

# The chart's measures, in pixels.
WIDTH: Final = 860
LABELS: Final = 250  # left of the bars
BARS: Final = 380  # the longest bar
ROW: Final = 20
HEAD: Final = 34


def number_text(value: float | None) -> str:
    """Write a figure with three digits that count, and no exponent; none is a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verdict_text(verdict: Verdict) -> str:
    """Write met or missed, with how near."""
    if verdict.met is None:
        return "not known"
    word = "met" if verdict.met else "missed"
    return f"{word} ({number_text(verdict.ratio)})"


def render_lines(results: Sequence[Result], machine: Mapping[str, Any]) -> str:
    """Write one JSON object a line, each with the machine it comes from."""
    return "".join(
        json.dumps({**result.as_json(), "machine": dict(machine)}, ensure_ascii=False, allow_nan=False) + "\n"
        for result in results
    )


def render_table(results: Sequence[Result]) -> Table:
    """Make the table: a row for each figure, and one more for each further target."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("figure", "who"):
        table.add_column(column, no_wrap=True)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("from … to", justify="right", no_wrap=True)
    for column in ("unit", "target"):
        table.add_column(column, no_wrap=True)
    table.add_column("")
    for group, members in groupby(results, key=lambda result: result.group):
        for place, result in enumerate(members):
            verdicts: tuple[Verdict | None, ...] = result.verdicts or (None,)
            for row, verdict in enumerate(verdicts):
                head = _head(result) if row == 0 else ("", "", "", "")
                table.add_row(
                    group if place == row == 0 else "",
                    *head,
                    verdict.target if verdict else "",
                    _judged(verdict, result.why if row == 0 else None),
                )
        table.add_section()
    return table


def _head(result: Result) -> tuple[str, str, str, str]:
    spread = f"{number_text(min(result.values))} … {number_text(max(result.values))}" if result.values else ""
    sign = "> " if result.values and result.why else ""
    return result.who, sign + number_text(result.median), spread, result.unit


def _judged(verdict: Verdict | None, why: str | None) -> Text:
    words = [verdict_text(verdict)] if verdict else []
    if why:
        words.append(why)
    style = "" if verdict is None or verdict.met is None else "green" if verdict.met else "bold red"
    return Text("; ".join(words), style=style)


def render_chart(results: Sequence[Result], title: str) -> str:
    """Draw the bars as SVG: ours dark, the rivals' light, a target as a stroke across the bar it binds."""
    drawn: list[str] = []
    y = HEAD
    for group, members in groupby((r for r in results if r.median is not None), key=lambda result: result.group):
        rows = list(members)
        y += ROW // 2
        drawn.append(f'<text x="8" y="{y + 14}" class="group">{escape(f"{group}, {rows[0].unit}")}</text>')
        y += ROW
        medians = {row.who: row.median or 0.0 for row in rows}
        longest = max(medians.values()) or 1.0
        for row in rows:
            drawn.extend(_bar(row, y, BARS / longest, medians))
            y += ROW
    height = y + ROW
    style = (
        "text{font:13px sans-serif;fill:#222} .group{font-weight:bold} .title{font-size:15px;font-weight:bold}"
        " .ours{fill:#1b5e9b} .rival{fill:#b9c7d6} .met{stroke:#2e7d32} .missed{stroke:#c62828} line{stroke-width:3}"
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{style}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="22" class="title">{escape(title)}</text>',
        *drawn,
        "</svg>\n",
    ])  # fmt: skip


def _bar(result: Result, y: int, scale: float, medians: Mapping[str, float]) -> Iterator[str]:
    value = medians[result.who]
    kind = "ours" if result.who.startswith(OURS) else "rival"
    yield f'<text x="{LABELS - 8}" y="{y + 14}" text-anchor="end">{escape(result.who)}</text>'
    yield f'<rect x="{LABELS}" y="{y + 3}" width="{max(value * scale, 1):.1f}" height="{ROW - 6}" class="{kind}"/>'
    for verdict in result.verdicts:
        if verdict.ratio and verdict.met is not None:
            # Where the bar would end if the target were just met.
            bound = float(verdict.target.split()[1]) * value / verdict.ratio
            x = LABELS + min(bound * scale, BARS + 20)
            colour = "met" if verdict.met else "missed"
            yield f'<line x1="{x:.1f}" y1="{y + 1}" x2="{x:.1f}" y2="{y + ROW - 1}" class="{colour}"/>'
    text = ("> " if result.why else "") + number_text(value)
    verdicts = ", ".join(f"{v.target}: {verdict_text(v)}" for v in result.verdicts)
    x = LABELS + value * scale + 26
    yield f'<text x="{x:.1f}" y="{y + 14}">{escape(text + (f"   {verdicts}" if verdicts else ""))}</text>'
