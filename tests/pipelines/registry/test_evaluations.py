"""Evaluations on record: sealed, found by what they are about, the first one first."""

import json
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry import tracking
from pipelines.registry.evaluations import find, is_recorded, is_sealed, is_whole, sealed, tags_of
from pipelines.settings import TrackingConfig
from tests.pipelines.workshop import Workshop

RESULT: dict[str, Any] = {
    "bundle": "b", "config": "c", "data_fingerprint": "d", "retrieval": {"r1": 0.1, "low": float("nan"), "ks": (1, 5)},
    "seconds": 3.0, "written_by": "1.0",
}  # fmt: skip


@pytest.fixture
def cfg(tmp_path: Path, empty_store: Path) -> TrackingConfig:
    return Workshop(tmp_path, empty_store).cfg


def record(cfg: TrackingConfig, result: dict[str, Any], marks: bytes = b"m", finished: bool = True) -> str:
    with tracking.run(cfg, "evaluate", tags=tags_of(result)) as run:
        run.log_bytes("marks.parquet", marks)
        run.log_json("evaluate.json", result)
    if not finished:
        tracking.connect(cfg).update_run(run.run_id, status="RUNNING")
    return run.run_id


def test_a_seal_holds_through_a_file_and_breaks_with_any_change() -> None:
    result = sealed(RESULT, b"m")
    read = json.loads(json.dumps(result))
    assert is_whole(read, b"m")
    assert not is_whole(read, b"n")
    assert is_sealed({**read, "seconds": 9.0, "written_by": "2.0"}), "when and by whom is no part of what was found"
    for name in ("bundle", "config", "retrieval", "marks"):
        assert not is_sealed({**read, name: "other"})
        assert not is_sealed({key: value for key, value in read.items() if key != name})
    assert not is_sealed({**read, "more": 1})
    assert not is_sealed({})


def test_the_first_finished_one_is_found_by_what_it_is_about(cfg: TrackingConfig) -> None:
    first, other = sealed(RESULT, b"m"), sealed({**RESULT, "retrieval": {"r1": 0.9}}, b"m")
    assert find(cfg, {"bundle": "b"}) is None
    record(cfg, other, finished=False)
    assert not is_recorded(cfg, other)
    run_id = record(cfg, first)
    record(cfg, other), record(cfg, first)
    found = find(cfg, {"bundle": "b", "settings": "c"})
    assert found is not None
    assert (found.run_id, found.figures["sha"], found.marks) == (run_id, first["sha"], b"m")
    again = find(cfg, {"evaluation": str(other["sha"])})
    assert again is not None
    assert again.figures["retrieval"] == {"r1": 0.9}
    assert find(cfg, {"bundle": "b", "settings": "z"}) is None
    elsewhere = cfg.model_copy(update={"experiment": "another"})
    assert find(elsewhere, {"bundle": "b"}) is None, "who may write elsewhere puts nothing on record here"


def test_a_run_whose_files_are_of_another_evaluation_is_refused(cfg: TrackingConfig) -> None:
    mine, other = sealed(RESULT, b"m"), sealed({**RESULT, "bundle": "z"}, b"m")
    with tracking.run(cfg, "evaluate", tags=tags_of(mine)) as run:
        run.log_bytes("marks.parquet", b"m")
        run.log_json("evaluate.json", other)
    with pytest.raises(UserError, match="are not those that `aai evaluate` put on record"):
        find(cfg, {"bundle": "b"})
