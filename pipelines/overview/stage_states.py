"""Where each stage of a run stands: read off listings, locks and small files; no table's footer is needed."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pydantic

from aai import storage
from aai.config import Config
from aai.errors import UserError
from pipelines.curation.layout import ACCEPTED, CUT, MEASURED, PLAN, REJECTED, SCORED
from pipelines.engine.columns import read_columns
from pipelines.overview.folder import StageFolder

Figures = dict[str, Any]
State = Literal["not begun", "running", "broke off", "finished"]
FOLDERS = {
    "world": "world",
    "curate": "curated",
    "featurize": "features",
    "align": "align",
    "adapt": "adapt",
    "tune align": "tune/align",
    "tune adapt": "tune/adapt",
    "evaluate": "evaluate",
    "promote": "promote",
}
"""Where the shipped configs have each stage's output, below run_dir."""
ALIGNED = "features-aligned"
BEFORE = {"featurize": "curate", "align": "featurize", "adapt": "align", "evaluate": "adapt", "promote": "evaluate"}
"""What a stage is made of."""
OPTIONAL = ("world", "tune align", "tune adapt")
"""Stages that a run can do without; they are told of where they were begun."""
BESIDE = (ALIGNED, "tune", "ray-logs", "mlflow.db", "mlartifacts", "keys", "_run", "plan")
"""What a run has before, or beside, the first table."""


class PartDone(Config):
    """How far a part of a stage has come."""

    what: str
    done: int
    of: int | None
    """None where the folder does not tell."""
    unit: str
    about: bool = False
    """Whether `done` is a little too high, by at most a part of a shard."""


class LockHolder(Config):
    """The driver whose lock is there."""

    host: str
    pid: int
    since: str
    """UTC."""
    beat_age_s: float | None
    """Since it refreshed its lease; None where the kernel holds the lock."""


class StageStatus(Config):
    """Where one stage stands."""

    stage: str
    out: str
    state: State
    holder: LockHolder | None = None
    last_write_s: float | None = None
    """When the folder's youngest file was written, in Unix time."""
    finished_s: float | None = None
    """When its result was written, in Unix time."""
    progress: tuple[PartDone, ...] = ()
    figures: Figures = pydantic.Field(default_factory=dict)
    """Of a finished stage its summary, of a training that is not finished its last figures."""
    rejects: dict[str, int] = pydantic.Field(default_factory=dict)
    """By code."""
    sha: str = ""
    """The bundle's hash."""
    outdated: str = ""
    """Why its result is not of what the stages before it have now."""


@dataclass(frozen=True)
class Seen:
    """What a stage's reader found in its folder."""

    result: str
    """The file that is written last."""
    figures: Figures
    progress: tuple[PartDone, ...] = ()
    rejects: dict[str, int] | None = None
    sha: str = ""
    is_finished: bool = False
    own: str = ""
    """Fingerprint or hash of what it made, which the next stage keeps."""
    made_of: tuple[str, ...] = ()
    """Fingerprints and hashes of what it was made of; empty where that is not told."""


def read_stages(run_dir: str) -> list[StageStatus]:
    """All stages of a run, in their order. Raises UserError for a folder of something else."""
    run_dir = storage.absolute(run_dir).rstrip("/")
    if os.path.isfile(run_dir):
        raise UserError("run_dir", run_dir, "is a file", "give the folder of the run")
    names = set(storage.names_in(run_dir))
    tops = {name.split("/")[0] for name in FOLDERS.values()}
    if names and not names & {*tops, *BESIDE}:
        rule = f"holds no run: neither {', '.join(sorted(tops))} nor the like, but {', '.join(sorted(names)[:3])}"
        raise UserError("run_dir", run_dir, rule, "give the folder that the configs of the run have as run_dir")
    found: list[StageStatus] = []
    seen: dict[str, Seen] = {}
    for stage, place in FOLDERS.items():
        there = place.split("/")[0] in names
        folder = StageFolder(storage.join(run_dir, place), 1 if stage == "world" else None) if there else None
        if folder is not None and folder.files:
            seen[stage] = READERS[stage](folder, run_dir)
            found.append(_status(stage, folder, seen[stage], _outdated(stage, seen)))
        elif stage not in OPTIONAL:
            found.append(StageStatus(stage=stage, out=storage.join(run_dir, place), state="not begun"))
    return found


def _status(stage: str, folder: StageFolder, seen: Seen, outdated: str) -> StageStatus:
    held = folder.holding
    state: State = "finished" if seen.is_finished else "broke off"
    if held and held.is_held:
        state = "running"
    holder = None
    if held and state != "finished":
        holder = LockHolder(host=held.host, pid=held.pid, since=held.started, beat_age_s=held.beat_age_s)
    return StageStatus(
        stage=stage,
        out=folder.uri,
        state=state,
        holder=holder,
        last_write_s=folder.last_write_s,
        finished_s=folder.files[seen.result].modified_s if seen.is_finished else None,
        progress=() if seen.is_finished else seen.progress,
        figures=seen.figures,
        rejects=seen.rejects or {},
        sha=seen.sha,
        outdated=outdated if seen.is_finished else "",
    )


def _outdated(stage: str, seen: dict[str, Seen]) -> str:
    """Why a result is not of what is there now, as far as the results tell."""
    own, earlier = seen[stage], seen.get(BEFORE.get(stage, ""))
    if earlier is None or not (own.is_finished and earlier.is_finished and own.made_of and earlier.own):
        return ""
    return "" if earlier.own in own.made_of else f"not made of what {BEFORE[stage]} has now ({earlier.own})"


def _picked(found: Figures, *names: str) -> Figures:
    return {name: found[name] for name in names if found.get(name) is not None}


# ---------------------------------------------------------------- what each stage leaves


def _world(folder: StageFolder, run_dir: str) -> Seen:
    found = folder.json("world.json") or {}
    figures = _picked(found.get("figures", {}), "clips", "defects", "images", "seconds")
    return Seen("world.json", figures, is_finished=bool(found.get("finished")))


def _curate(folder: StageFolder, run_dir: str) -> Seen:
    found = folder.json("curate.json")
    if found:
        figures = _picked(found, "rows_in", "accepted", "rejected", "hours", "seconds", "written_by")
        rejects, own = found.get("by_code"), f"{found['accepted']} clips"
        return Seen("curate.json", figures, rejects=rejects, own=own, is_finished=True)
    rows: Counter[str] = Counter()
    plan = {storage.join(folder.uri, PLAN, name): facts.size_bytes for name, facts in folder.below(PLAN).items()}
    for table in read_columns(dict(sorted(plan.items())), ["shard"]):
        for counted in table["shard"].value_counts().to_pylist():
            rows[counted["values"]] += counted["counts"]
    shards = set(rows)
    parts = []
    if cut := folder.below(CUT):
        parts.append(PartDone(what="files looked through", done=len(cut), of=None, unit="shards"))
    both = folder.shards(ACCEPTED) & folder.shards(REJECTED)
    for what, made in (("measured", folder.shards(MEASURED)), ("scored", folder.shards(SCORED)), ("split", both)):
        if what == "measured" and shards:
            clips = sum(rows[name] for name in made & shards)
            parts.append(PartDone(what="measured", done=clips, of=rows.total(), unit="clips"))
        if made or (shards and what == "measured"):
            parts.append(PartDone(what=what, done=len(made & shards or made), of=len(shards) or None, unit="shards"))
    return Seen("curate.json", {}, tuple(parts))


def _featurize(folder: StageFolder, run_dir: str) -> Seen:
    found = folder.json("manifest.json")
    if found:
        figures = _picked(found, "rows", "dtype", "fingerprint", "seconds", "written_by")
        is_of_run = found.get("input") == storage.join(run_dir, FOLDERS["curate"], ACCEPTED)
        made_of = (f"{sum(found['rows'].values())} clips",) if is_of_run else ()
        return Seen("manifest.json", figures, is_finished=True, own=str(found["fingerprint"]), made_of=made_of)
    accepted = storage.names_in(storage.join(run_dir, FOLDERS["curate"], ACCEPTED))
    of = sum(name.endswith(".parquet") for name in accepted) or None
    return Seen("manifest.json", {}, (PartDone(what="made", done=len(folder.shards()), of=of, unit="shards"),))


def _trained(stage: str) -> Callable[[StageFolder, str], Seen]:
    result = f"{stage}.json"

    def read(folder: StageFolder, run_dir: str) -> Seen:
        if not (found := folder.json(result)):
            parts, figures = _training(folder)
            embedded = _embedded(run_dir) if stage == "adapt" else ()
            return Seen(result, figures, (*embedded, *parts))
        figures = _picked(found, "steps", "kept_step", "precision", "ranks", "metrics", "seconds")
        meta = folder.json("bundle/meta.json") or {}
        made_of = (found["data_fingerprint"],) if stage == "align" else tuple(meta.get("parents", ()))
        return Seen(result, figures, sha=found["sha"], is_finished=True, own=found["sha"], made_of=made_of)

    return read


def _training(folder: StageFolder) -> tuple[tuple[PartDone, ...], Figures]:
    """Steps and checkpoints of a training, and the last figures of its history."""
    figures: Figures = {}
    for entry in folder.last_entries("history.jsonl"):  # the last validation, and the last entry of training
        if not any(name in figures for name in entry if name != "step"):
            figures = entry | figures
    files = folder.below("_checkpoints")
    ages = {(facts.modified_s, name) for name, facts in files.items()}
    states = [(when, name) for when, name in ages if name.endswith("/state.safetensors")]
    notes = [(when, name) for when, name in ages if name.endswith(".json") and "/" not in name]
    begun = folder.json(f"_checkpoints/{max(notes)[1]}") if notes else None
    of = (begun or {}).get("steps")
    step = int(figures.pop("step", 0))
    parts = [PartDone(what="trained", done=step, of=of, unit="steps")]
    if states:
        about = folder.safetensors_about(f"_checkpoints/{max(states)[1]}")
        if "step" in about:
            parts.append(PartDone(what="last checkpoint", done=int(about["step"]), of=of, unit="steps"))
    shown = {name: value for name, value in figures.items() if name in SHOWN or name.startswith("val_")}
    return tuple(parts), shown


SHOWN = ("loss", "steps_per_s", "data_wait_share", "skipped_steps", "workers")
"""Figures of a training that is not finished, besides those of its last validation."""


def _embedded(run_dir: str) -> tuple[PartDone, ...]:
    """The aligner's pass over the sounds, before adapt trains."""
    files = StageFolder(storage.join(run_dir, ALIGNED)).files
    if not files:
        return ()
    youngest = max(files, key=lambda name: files[name].modified_s).split("/")[0]
    done = sum(name.startswith(f"{youngest}/") and name.endswith(".parquet") for name in files)
    features = storage.names_in(storage.join(run_dir, FOLDERS["featurize"]))
    of = sum(name.endswith(".parquet") for name in features) or None
    return (PartDone(what="sounds embedded", done=done, of=of, unit="shards"),)


def _tuned(stage: str) -> Callable[[StageFolder, str], Seen]:
    def read(folder: StageFolder, run_dir: str) -> Seen:
        if found := folder.json("tune.json"):
            figures = _picked(found, "trials", "metric", "summary", "seconds")
            return Seen("tune.json", figures, is_finished=True)
        trials: dict[str, set[str]] = {}
        for name in folder.below("trials"):
            number, _, file = name.partition("/")
            trials.setdefault(number, set()).add(file)
        ended = sum(bool(files & {f"{stage}.json", "stopped.json"}) for files in trials.values())
        of = (folder.json("sweep.json") or {}).get("trials")
        return Seen("tune.json", {}, (PartDone(what="ended", done=ended, of=of, unit="trials"),))

    return read


def _evaluate(folder: StageFolder, run_dir: str) -> Seen:
    if found := folder.json("evaluate.json"):
        retrieval, generation = found.get("retrieval", {}), found.get("generation", {})
        figures = _picked(retrieval, "gallery", "same_object_r1") | _picked(generation, "pictures")
        if "a2v" in retrieval:
            figures["a2v_r10"] = retrieval["a2v"].get("r10")
        figures |= {
            f"{name}_object": generation[name].get("object") for name in ("sound", "ceiling") if name in generation
        }
        figures |= _picked(found, "seconds", "written_by")
        sha = found["bundle"]
        return Seen("evaluate.json", figures, sha=sha, is_finished=True, own=sha, made_of=(sha,))
    begun = folder.json("_started.json") or {}
    parts = []
    for what, place, unit in (("heard", "heard", "clips"), ("painted", "pictures", "pictures")):
        names = [name for name in folder.shards(place) if not name.startswith("train-")]
        size, of = (
            begun.get("clips_per_shard" if unit == "clips" else "cases_per_shard"),
            begun.get("planned", {}).get(unit),
        )
        if size and of:
            parts.append(PartDone(what=what, done=min(of, len(names) * size), of=of, unit=unit, about=True))
        elif names:
            parts.append(PartDone(what=what, done=len(names), of=None, unit="shards"))
    return Seen("evaluate.json", {}, tuple(parts))


def _promote(folder: StageFolder, run_dir: str) -> Seen:
    found = folder.json("promote.json")
    if not found:
        return Seen("promote.json", {})
    figures = _picked(found, "name", "version", "alias", "champion", "passed", "forced", "by", "at")
    figures["gates_failed"] = [gate["gate"] for gate in found.get("gates", ()) if not gate["passed"]]
    sha = found.get("bundle") or ""
    return Seen("promote.json", figures, sha=sha, is_finished=True, made_of=(sha,) if sha else ())


READERS: dict[str, Callable[[StageFolder, str], Seen]] = {
    "world": _world,
    "curate": _curate,
    "featurize": _featurize,
    "align": _trained("align"),
    "adapt": _trained("adapt"),
    "tune align": _tuned("align"),
    "tune adapt": _tuned("adapt"),
    "evaluate": _evaluate,
    "promote": _promote,
}
