"""Where a run stands, in words: a few lines for each stage, and what comes next."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from aai.errors import printable
from pipelines.overview.stage_states import BEFORE, PartDone, StageStatus

DEMO = "runs/demo"
SHOWN_METRICS = 4


def as_lines(stages: Sequence[StageStatus], now_s: float | None = None) -> list[str]:
    """A heading for each stage, with what is to be told below it."""
    now_s = time.time() if now_s is None else now_s
    lines = []
    for stage in stages:
        first, *more = [*_who(stage, now_s), *_how_far(stage), *_figures(stage)] or [""]
        lines.append(f"{stage.stage:<11} {stage.state:<10} {first}".rstrip())
        lines += [f"{'':<22} {line}" for line in more]
    return [printable_line(line) for line in lines]


def printable_line(line: str) -> str:
    """A line without a letter that moves a cursor: parts of it stood in files."""
    return "".join(printable(line[start : start + 200]) for start in range(0, len(line), 200))


def next_command(stages: Sequence[StageStatus], run_dir: str, is_toy: bool) -> str:
    """What to run now, or what is waited for."""
    if running := [stage.stage for stage in stages if stage.state == "running"]:
        return f"nothing: {', '.join(running)} is running"
    by_name = {stage.stage: stage for stage in stages}
    how = f" --set run_dir={run_dir}" if is_toy else f" --config FILE --set run_dir={run_dir}"
    if is_toy and run_dir == DEMO:
        how = ""
    for name in ("world", "curate", *BEFORE):
        stage = by_name.get(name)
        if stage is None or (stage.state == "finished" and not stage.outdated):
            continue
        why = {"broke off": "goes on where it broke off", "finished": f"it is {stage.outdated}"}.get(stage.state, "")
        return f"aai {name}{how}" + (f"   ({why})" if why else "")
    return f"aai serve{how}"


def _who(stage: StageStatus, now_s: float) -> list[str]:
    """Who runs it, or ran it, and when it last wrote; of a finished one, when that was."""
    if stage.state == "finished" and stage.finished_s is not None:
        when = datetime.fromtimestamp(stage.finished_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
        return [f"{when}{f', {stage.outdated}: outdated' if stage.outdated else ''}"]
    words = []
    if held := stage.holder:
        ended = "" if stage.state == "running" else ", ended without an end"
        words.append(f"process {held.pid} on {held.host} since {held.since}{ended}")
        if held.beat_age_s is not None:
            words.append(f"last beat {_ago(held.beat_age_s)} ago")
    if stage.last_write_s is not None:
        words.append(f"last write {_ago(now_s - stage.last_write_s)} ago")
    return ["; ".join(words)] if words else []


def _how_far(stage: StageStatus) -> list[str]:
    return [", ".join(map(_progress, stage.progress))] if stage.progress else []


def _progress(part: PartDone) -> str:
    of = f" of {part.of:,}" if part.of is not None else ""
    return f"{part.what} {'about ' if part.about and part.done != part.of else ''}{part.done:,}{of} {part.unit}"


def _figures(stage: StageStatus) -> list[str]:
    lines = []
    words = [word for name, value in stage.figures.items() if (word := _figure(name, value))]
    if stage.sha:
        words.append(f"bundle {stage.sha}")
    if words:
        lines.append(", ".join(words))
    if stage.rejects:
        lines.append("rejects: " + ", ".join(f"{code} {count:,}" for code, count in stage.rejects.items()))
    return lines


def _figure(name: str, value: Any) -> str:
    if name == "metrics":
        return ", ".join(_figure(inner, number) for inner, number in list(value.items())[:SHOWN_METRICS])
    if name == "rows":
        return ", ".join(f"{split} {count:,}" for split, count in value.items())
    if name == "gates_failed":
        return f"gates failed: {', '.join(value)}" if value else ""
    if name == "written_by":
        return ""
    if name == "seconds":
        return f"took {_ago(value)}"
    if isinstance(value, bool):
        return name if value else f"not {name}"
    if isinstance(value, int):
        return f"{name} {value:,}"
    return f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
