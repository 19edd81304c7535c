# SPDX-License-Identifier: GPL-3.0-or-later
"""Figures, their targets, and the rounds in which they are measured. Pure: `how` does the work.

round 1   a b c d        in turn, and every other round backwards: whoever comes
round 2   d c b a        after a noisy neighbour is not always the same
round 3   a b c d
          ▼ ▼ ▼ ▼
          medians ──► verdicts, each target against the medians of the same run
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


class Unavailable(Exception):
    """This cannot be measured here; the text says why."""


class Stopped(Exception):
    """It took longer than it was given; *seconds* is how long that was."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"stopped after {seconds:g} s")
        self.seconds = seconds


@dataclass(frozen=True, slots=True)
class Target:
    """A bound: `at_least(1.7, "nbdfuse")` is one of a rival's median, `at_most(150)` a plain one."""

    sign: str
    factor: float
    of: str | None = None

    @property
    def text(self) -> str:
        return f"{self.sign} {self.factor:g}" + (f" × {self.of}" if self.of else "")

    def judge(self, value: float, medians: Mapping[str, float]) -> Verdict:
        """Compare; where the rival has no figure there is no verdict."""
        reference = 1.0 if self.of is None else medians.get(self.of, math.nan)
        ratio = value / reference if reference else math.nan
        if math.isnan(ratio):
            return Verdict(self.text, None, None)
        return Verdict(self.text, ratio, ratio >= self.factor if self.sign == "≥" else ratio <= self.factor)


def at_least(factor: float, of: str | None = None) -> Target:
    """Set a lower bound: *factor* itself, or times the median of *of*."""
    return Target("≥", factor, of)


def at_most(factor: float, of: str | None = None) -> Target:
    """Set an upper bound."""
    return Target("≤", factor, of)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One target, how near it was come, and whether it was met; None: not known."""

    target: str
    ratio: float | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of one contestant; *how* measures it once, and may raise Unavailable or Stopped."""

    group: str
    who: str
    unit: str
    how: Callable[[], float]
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured. No values: *why* tells; values and *why*: they are lower bounds."""

    group: str
    who: str
    unit: str
    values: tuple[float, ...]
    verdicts: tuple[Verdict, ...] = ()
    why: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.values) if self.values else None

    def as_json(self) -> dict[str, Any]:
        """Return the fields of its JSON line."""
        return {
            "figure": f"{self.group}/{self.who}",
            "unit": self.unit,
            "median": self.median,
            "values": list(self.values),
            "targets": [{"target": v.target, "ratio": v.ratio, "met": v.met} for v in self.verdicts],
            "why": self.why,
        }


def measure(figures: Sequence[Figure], rounds: int, tell: Callable[[str], None] = lambda _text: None) -> list[Result]:
    """Measure all *figures* in turn, *rounds* times; what failed once is not tried again."""
    values: dict[Figure, list[float]] = {figure: [] for figure in figures}
    why: dict[Figure, str] = {}
    for number in range(rounds):
        for figure in figures if number % 2 == 0 else reversed(figures):
            if figure in why:
                continue
            tell(f"{figure.group}/{figure.who}, round {number + 1} of {rounds}")
            try:
                values[figure].append(figure.how())
            except Stopped as stopped:
                values[figure] = [stopped.seconds]
                why[figure] = str(stopped)
            except Unavailable as unavailable:
                values[figure] = []
                why[figure] = str(unavailable)
    medians: dict[str, dict[str, float]] = {}
    for figure in figures:
        if values[figure]:
            medians.setdefault(figure.group, {})[figure.who] = statistics.median(values[figure])
    return [_result(figure, values[figure], medians.get(figure.group, {}), why.get(figure)) for figure in figures]


def _result(figure: Figure, values: Sequence[float], medians: Mapping[str, float], why: str | None) -> Result:
    verdicts: Iterable[Verdict]
    if values:
        verdicts = (target.judge(medians[figure.who], medians) for target in figure.targets)
        if why is not None:
            # A lower bound can break an upper bound, and prove nothing else.
            verdicts = (v if v.met is False and v.target[0] == "≤" else Verdict(v.target, None, None) for v in verdicts)
    else:
        verdicts = (Verdict(target.text, None, None) for target in figure.targets)
    return Result(figure.group, figure.who, figure.unit, tuple(values), tuple(verdicts), why)
