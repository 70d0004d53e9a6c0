"""Evaluations on record: an MLflow run holds what evaluate.json says and the marks of the single clips.

evaluate.json is sealed: its `sha` is the digest of all else in it, the digest of the marks among that. The run has it
as a tag, so that a file that was changed, or an evaluation that never ran, is no evidence.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aai.digest import digest
from aai.errors import UserError
from pipelines.registry import tracking
from pipelines.settings import RunsConfig

RESULT, MARKS = "evaluate.json", "marks.parquet"
"""Artifacts of the run."""
UNSEALED = ("sha", "seconds", "written_by")
"""How long it took and which commit ended it is no part of what was found: the same evaluation has the same sha."""


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as its run has it."""

    run_id: str
    figures: dict[str, Any]
    """What evaluate.json holds."""
    marks: bytes
    """The Parquet file."""


def sealed(result: Mapping[str, Any], marks: bytes) -> dict[str, Any]:
    """What evaluate.json holds, with the digests of the marks and of itself."""
    whole = {**result, "marks": _sha(marks)}
    return {**whole, "sha": _seal(whole)}


def is_sealed(result: Mapping[str, Any]) -> bool:
    """Whether nothing in evaluate.json was changed after it was written."""
    return bool(result.get("sha") == _seal(result))


def is_whole(result: Mapping[str, Any], marks: bytes) -> bool:
    """Whether evaluate.json is as it was written, and these are its marks."""
    return is_sealed(result) and result.get("marks") == _sha(marks)


def _seal(result: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in result.items() if name not in UNSEALED})


def tags_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What the run of an evaluation is found by."""
    names = {"evaluation": "sha", "bundle": "bundle", "settings": "config", "data_fingerprint": "data_fingerprint"}
    return {tag: str(result[name]) for tag, name in names.items()}


def is_recorded(cfg: RunsConfig, result: Mapping[str, Any]) -> bool:
    """Whether a finished run has this evaluation."""
    return _run(cfg, {"evaluation": str(result["sha"])}) is not None


def find(cfg: RunsConfig, tags: Mapping[str, str]) -> Evaluation | None:
    """The first evaluation on record with these tags, None where there is none. Raises UserError for changed files.

    The first, so that a later one of the same bundle, settings and clips changes nothing.
    """
    run_id = _run(cfg, tags)
    if run_id is None:
        return None
    marks = _artifact(cfg, run_id, MARKS)
    try:
        result = json.loads(_artifact(cfg, run_id, RESULT))
        unchanged = is_whole(result, marks) and not tags.items() - tags_of(result).items()
    except (ValueError, TypeError, AttributeError, KeyError):
        unchanged = False
    if not unchanged:
        rule = f"the files of run {run_id} are not those that `aai evaluate` put on record"
        raise UserError("tracking.uri", cfg.uri, rule, "the artifact store was changed: delete the run, evaluate again")
    return Evaluation(run_id, result, marks)


def _run(cfg: RunsConfig, tags: Mapping[str, str]) -> str | None:
    """The first finished run with these tags in the experiment: who may write there may put on record."""
    client = tracking.connect(cfg)
    experiment = tracking.attempt(cfg, client.get_experiment_by_name, cfg.experiment)
    if experiment is None:
        return None
    wanted = [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    query = " and ".join([*wanted, "attributes.status = 'FINISHED'"])
    first = ["attributes.start_time ASC"]
    runs = tracking.attempt(cfg, client.search_runs, [experiment.experiment_id], query, max_results=1, order_by=first)
    return str(runs[0].info.run_id) if runs else None


def _artifact(cfg: RunsConfig, run_id: str, name: str) -> bytes:
    client = tracking.connect(cfg)
    with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
        return Path(tracking.attempt(cfg, client.download_artifacts, run_id, name, scratch)).read_bytes()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
