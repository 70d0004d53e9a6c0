"""What came of a sweep's trials: the figures, the table, the sentence at its end, and the plot."""

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from aai import storage
from aai.config import Config
from pipelines.pages.plots import COLOURS, STYLE
from pipelines.training.following import history
from pipelines.tuning.space import Settings, Value
from pipelines.tuning.sweep import STOPPED, Candidate, Sweep


class Standing(Config):
    """What came of one trial."""

    number: int
    """0 is the stage as it is, without a change."""
    state: Literal["finished", "stopped", "failed"]
    value: float | None
    """The metric of the weights that were kept, or at the last validation; none before the first, or if not finite."""
    step: int
    """Steps done, as far as the history tells."""
    settings: Settings
    out: str
    """The trial's folder; its bundle is there when it is finished."""
    error: str = ""
    """Why it failed."""
    points: tuple[tuple[int, float], ...] = ()
    """(step, value) of every validation."""


def standings(sweep: Sweep, failed: dict[int, str]) -> list[Standing]:
    """Best first: those that finished, those that were stopped, those that failed; equals by their number.

    failed: why, by number, as `run_sweep` returns it.
    """
    found = [_standing(candidate, sweep.metric, failed) for candidate in sweep.candidates]
    states, sign = ("finished", "stopped", "failed"), -1 if sweep.mode == "max" else 1
    return sorted(found, key=lambda s: (states.index(s.state), sign * s.value if s.value is not None else math.inf))


def _standing(candidate: Candidate, metric: str, failed: dict[int, str]) -> Standing:
    out, last = candidate.config.out, math.inf
    state: Literal["finished", "stopped", "failed"] = "failed"
    if storage.exists(candidate.config.result):
        state = "finished"
    elif storage.exists(where := storage.join(out, STOPPED)):
        state, last = "stopped", storage.read_json(where)["step"]  # workers may have run on for a moment
    entries = [entry for entry in history(out) if entry["step"] <= last]
    points = [(int(entry["step"]), float(entry[metric])) for entry in entries if metric in entry]
    value = points[-1][1] if points else math.nan
    if state == "finished":  # of the weights that it kept
        value = storage.read_json(candidate.config.result)["metrics"].get(metric, math.nan)
    return Standing(
        number=candidate.number,
        state=state,
        value=value if math.isfinite(value) else None,
        step=max((int(entry["step"]) for entry in entries), default=0),
        settings=candidate.settings,
        out=out,
        error=failed.get(candidate.number, "it ended without a result") if state == "failed" else "",
        points=tuple(points),
    )


def winner(standing: Sequence[Standing]) -> Standing | None:
    """The best of those that finished; the base where nothing is better."""
    return next((s for s in standing if s.state == "finished" and s.value is not None), None)


def table(standing: Sequence[Standing], metric: str) -> list[str]:
    """The lines of the trials' table, and below it why trials failed."""
    names = sorted({name for s in standing for name in s.settings})
    rows = [("trial", metric, "steps", "state", *names)]
    for s in standing:
        value = "-" if s.value is None else f"{s.value:.4f}"
        label = "0 (base)" if s.number == 0 else str(s.number)
        rows.append((label, value, str(s.step), s.state, *(_short(s.settings[name]) for name in names)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"trial {s.number} failed: {s.error}" for s in standing if s.state == "failed"]


def _short(value: Value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def sentence(standing: Sequence[Standing], metric: str) -> str:
    """Whether the sweep found something better than the base, in words."""
    best, base = winner(standing), next(s for s in standing if s.number == 0)
    if best is None:
        return "no trial finished"
    if base.value is None or base.state != "finished":
        return f"{metric} {best.value:.4f} is the best (trial {best.number}); the base settings gave none"
    if best.number == 0 or best.value == base.value:
        return f"nothing is better than the base settings' {metric} {base.value:.4f}"
    changed = ", ".join(f"{name}={_short(value)}" for name, value in sorted(best.settings.items()))
    by = f"by trial {best.number} ({changed})"
    return f"{metric} {best.value:.4f} instead of the base settings' {base.value:.4f}, {by}"


def plot(standing: Sequence[Standing], metric: str, stage: str) -> bytes:
    """A PNG: the metric of every trial by its steps; the base dashed, the best thick, where others were stopped."""
    best = winner(standing)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel="step", ylabel=metric, title=f"aai tune {stage}: {len(standing)} trials")
        for s in sorted(standing, key=lambda s: s.number):
            if not s.points:
                continue
            x, y = zip(*s.points, strict=True)
            axes.plot(x, y, **_look(s, best))
            if s.state != "finished":
                axes.plot(x[-1], y[-1], marker="x", markersize=6, color="grey", zorder=3)
        axes.plot([], [], marker="x", linestyle="", color="grey", label="stopped or failed")
        figure.legend(loc="outside lower center", ncols=4, handlelength=2.2)
        sink = io.BytesIO()
        figure.savefig(sink, format="png", dpi=150)
    return sink.getvalue()


def _look(s: Standing, best: Standing | None) -> dict[str, Any]:
    """How a trial's line is drawn; those that are neither base nor best need no name."""
    if s.number == 0:
        name = "base = best" if best is s else "base"
        return {"color": "black", "linestyle": "--", "marker": "o", "markersize": 4, "label": name, "zorder": 4}
    if best is s:
        return {"color": COLOURS[1], "linewidth": 3, "marker": "o", "markersize": 5, "label": f"best: {s.number}"}
    colour = COLOURS[0] if s.state == "finished" else "grey"
    return {"color": colour, "alpha": 0.6, "marker": ".", "markersize": 5}
