"""One command run in turns on Ray and in a plain pool of processes, with start-up apart from the work."""

import csv
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines import world
from pipelines.benches.options import BenchConfig
from pipelines.engine import cluster
from pipelines.engine.machine import peak_memory
from pipelines.engine.shards import Stage, recorded
from pipelines.settings import ClusterConfig
from pipelines.world import WorldConfig

WINDOW_STEP_S = 0.02


@dataclass(frozen=True)
class Timing:
    """One run of a command, in seconds. `wall_s` = start_s + work_s + rest_s."""

    clips: int
    wall_s: float
    start_s: float
    """Connecting, and from each call of the engine to its workers' first clip: processes, imports, models."""
    work_s: float
    """From first to last clip, of all stages together."""
    between_s: float
    """What a worker waits between two shards, on average."""
    stages_s: dict[str, float]
    """The parts of work_s."""
    peak_gb: float

    @property
    def rest_s(self) -> float:
        """What the driver does before, between and after the stages, and the pools' end."""
        return self.wall_s - self.start_s - self.work_s

    @property
    def clips_per_s(self) -> float:
        """From first to last clip."""
        return self.clips / self.work_s


def timed(work: Callable[[], Any], clips: int, settings: ClusterConfig, bare: bool) -> Timing:
    """Runs a command once, with Ray started for it and ended after it, or without Ray."""
    # Ray gives its workers so many threads; without it, libraries would take all cores in each process.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(settings.cpus_per_worker))))
    begin = time.monotonic()
    with peak_memory(0.5) as peak, recorded(bare) as stages:
        if not bare:
            cluster.connect(settings)
        connected_s = time.monotonic() - begin
        work()
        wall_s = time.monotonic() - begin
    cluster.shutdown()
    starts_s, spans_s = 0.0, []
    for stage in stages:
        first_s = min(start for _, _, start, _ in stage.calls)
        starts_s += first_s - stage.called_s
        spans_s.append(max(end for *_, end in stage.calls) - first_s)
    return Timing(
        clips=clips,
        wall_s=wall_s,
        start_s=connected_s + starts_s,
        work_s=sum(spans_s),
        between_s=_between_s(stages),
        stages_s={stage.name: span for stage, span in zip(stages, spans_s, strict=True)},
        peak_gb=peak[0] / 1e9,
    )


def _between_s(stages: Sequence[Stage]) -> float:
    """Mean time from the end of a worker's call to the start of its next."""
    gaps = []
    for stage in stages:
        calls = defaultdict(list)
        for pid, _, start, end in stage.calls:
            calls[pid].append((start, end))
        for own in calls.values():
            gaps += [after[0] - before[1] for before, after in pairwise(sorted(own))]
    return statistics.mean(gaps) if gaps else 0.0


def take_turns(runs: dict[str, Callable[[], Timing]], repeats: int) -> dict[str, list[Timing]]:
    """Every run once in each turn; every second turn goes backwards, so that a drift favours none."""
    out: dict[str, list[Timing]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            out[name].append(runs[name]())
    return out


def summarise(turns: dict[str, list[Timing]]) -> tuple[dict[str, Any], dict[str, float]]:
    """(figures, ratios) of runs that took turns: medians; ratios are of clips/s from first to last clip."""
    figures: dict[str, Any] = {}
    for name, runs in turns.items():
        figures[f"{name}_clips_per_s"] = _median([run.clips_per_s for run in runs])
    for name, runs in turns.items():
        figures[f"{name}_start_s"] = _median([run.start_s for run in runs])
        figures[f"{name}_rest_s"] = _median([run.rest_s for run in runs])
        figures[f"{name}_wall_s"] = _median([run.wall_s for run in runs])
        figures[f"{name}_between_shards_ms"] = _median([run.between_s * 1e3 for run in runs])
        figures[f"{name}_peak_gb"] = _median([run.peak_gb for run in runs])
        figures[f"{name}_each_clips_per_s"] = [round(run.clips_per_s, 2) for run in runs]
        spans_s = {}
        for stage in runs[0].stages_s:
            spans_s[stage] = _median([run.stages_s.get(stage, 0.0) for run in runs])
        figures[f"{name}_stages_s"] = spans_s
    ratios = {}
    names = list(turns)
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            pairs = zip(turns[name], turns[other], strict=True)
            ratios[f"{name}/{other}"] = _median([a.clips_per_s / b.clips_per_s for a, b in pairs])
    return figures, ratios


def _median(values: Sequence[float]) -> float:
    return float(f"{statistics.median(values):.5g}")


def toy_manifest(config: BenchConfig) -> str:
    """The manifest of the bench's toy world, which is made once and kept."""
    folder = f"{config.out}/world-{config.clips}-{config.seed}"
    world.run(WorldConfig(out=folder, clips=config.clips, seed=config.seed, processes=config.cluster.num_workers))
    plain = Path(folder) / "manifest.csv"
    if config.windows == 1:
        return str(plain)
    with plain.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    many = Path(folder) / f"manifest-x{config.windows}.csv"
    with many.open("w", encoding="utf-8", newline="") as file:
        out = csv.DictWriter(file, [*rows[0], *({"start_s", "end_s"} - set(rows[0]))])
        out.writeheader()
        for number in range(config.windows):
            out.writerows({**row, "start_s": round(number * WINDOW_STEP_S, 3)} for row in rows)
    return str(many)
