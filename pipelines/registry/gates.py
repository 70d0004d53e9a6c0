"""Gates: rules that the figures of an evaluation must keep to before a bundle is promoted. They fail closed.

A figure that is missing or not a finite number is a failed gate, whatever its bounds.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import pydantic

from aai.config import Config
from pipelines.registry.figures import figure


class Gate(Config):
    """One rule on one figure: min and/or max, or at least `ratio` times another figure."""

    metric: str
    """Dotted name of the figure in evaluate.json."""
    min: float | None = None
    max: float | None = None
    min_ratio_of: str | None = None
    """Dotted name of the figure this one is measured against, e.g. a ceiling."""
    ratio: float | None = pydantic.Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.min_ratio_of is None) != (self.ratio is None):
            raise ValueError("min_ratio_of and ratio come together")
        if self.min is None and self.max is None and self.ratio is None:
            raise ValueError("a gate needs min, max, or min_ratio_of with ratio")
        return self


@dataclass(frozen=True)
class Verdict:
    """The outcome of one gate."""

    gate: str
    """The figure's dotted name."""
    value: float | None
    """None when the figure is missing."""
    bound: str
    passed: bool
    remedy: str = ""
    """What to do where a better bundle is no help."""


MIN_PAIRS = 100
"""Fewer clips than this show nothing: an interval of what none of them tells apart has no width."""


def check_gate(gate: Gate, evaluation: Mapping[str, Any]) -> Verdict:
    """Whether a figure keeps to its gate; a missing figure does not."""
    value = figure(evaluation, gate.metric)
    known, low, bounds = value is not None, gate.min, []
    if gate.min is not None:
        bounds.append(f">= {gate.min:g}")
    if gate.max is not None:
        bounds.append(f"<= {gate.max:g}")
    if gate.min_ratio_of is not None and gate.ratio is not None:
        other = figure(evaluation, gate.min_ratio_of)
        # A share of nothing, or of less, is no bound: any figure would reach it.
        known = known and other is not None and other > 0
        shown = "missing or not a number" if other is None else f"{other:.4g}"
        shown += ", but it must be above 0" if other is not None and other <= 0 else ""
        bounds.append(f">= {gate.ratio:g} x {gate.min_ratio_of} ({shown})")
        low = max(-math.inf if low is None else low, gate.ratio * (other or 0.0))
    passed = known and value is not None and (low is None or value >= low)
    passed = passed and value is not None and (gate.max is None or value <= gate.max)
    return Verdict(gate=gate.metric, value=value, bound=" and ".join(bounds), passed=passed)


def check_champion(
    tolerances: Mapping[str, float], evaluation: Mapping[str, Any], paired: Mapping[str, Mapping[str, Any] | None]
) -> list[Verdict]:
    """One verdict per figure (higher is better) that may be at most its tolerance below the champion's.

    paired: {difference, ci95, pairs} to the champion by dotted name, over the same clips; a figure without fails. The
    interval's lower end decides: what may be worse by more than the tolerance is refused.
    """
    verdicts = []
    for name, tolerance in tolerances.items():
        value, found = figure(evaluation, name), paired.get(name)
        if found is None:
            bound = "comparable with the champion's, but marks.parquet of one or the other has no such figure"
            verdicts.append(Verdict(name, value, bound, passed=False, remedy="name one of those in marks.parquet"))
            continue
        low, high = found["ci95"]
        seen = f"{found['difference']:+.3f}, 95 % {low:+.3f} to {high:+.3f}, {found['pairs']} pairs"
        enough = found["pairs"] >= MIN_PAIRS
        few = "" if enough else f", at least {MIN_PAIRS} needed"
        passed = value is not None and enough and low >= -tolerance
        verdicts.append(Verdict(name, value, f">= champion's - {tolerance:g} ({seen}{few})", passed))
    return verdicts


def incomparable(figures: Iterable[str], evaluation: Mapping[str, Any], why: str, remedy: str) -> list[Verdict]:
    """Failed verdicts of figures that the champion's cannot be held against at all."""
    bound = f"comparable with the champion's, but {why}"
    return [Verdict(name, figure(evaluation, name), bound, passed=False, remedy=remedy) for name in figures]


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as an aligned text table."""
    rows = [("gate", "value", "bound", "verdict")]
    for v in verdicts:
        value = "missing" if v.value is None else f"{v.value:.4g}"
        rows.append((v.gate, value, v.bound, "pass" if v.passed else "FAIL"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
