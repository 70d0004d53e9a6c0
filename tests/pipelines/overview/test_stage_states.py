"""Where each stage stands, off what the stages themselves write."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aai import features, storage
from aai.errors import UserError
from aai.fit import State
from pipelines.curation.ledger import Entry, Ledger
from pipelines.engine.lock import output_lock
from pipelines.overview.stage_states import FOLDERS, StageStatus, read_stages
from tests.counting import counted

MANIFEST = {"fingerprint": "f1", "rows": {"train": 8, "val": 2}, "dtype": "float32", "seconds": 1.0}


def states(run_dir: str | Path) -> dict[str, StageStatus]:
    return {stage.stage: stage for stage in read_stages(str(run_dir))}


def progress(stage: StageStatus) -> dict[str, tuple[int, int | None]]:
    return {f"{part.what} {part.unit}": (part.done, part.of) for part in stage.progress}


def plan(out: str, shards: int, rows_per_shard: int = 4) -> None:
    """A curation that was planned."""
    entries = [Entry(key=f"{n:024d}", uri=f"{n}.mp4", start_s=None, end_s=None) for n in range(shards * rows_per_shard)]
    Ledger(out).add(entries, rows_per_shard)


def write(run_dir: str | Path, *names: str, value: Any = None) -> None:
    for name in names:
        storage.write_json(f"{run_dir}/{name}", value)


def test_names_are_those_that_the_stages_write() -> None:
    assert features.MANIFEST == "manifest.json"
    assert list(FOLDERS)[:3] == ["world", "curate", "featurize"]


def test_a_folder_with_nothing_in_it(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        found = states(place)
        assert found.keys() == {"curate", "featurize", "align", "adapt", "evaluate", "promote"}
        assert {stage.state for stage in found.values()} == {"not begun"}


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    write(tmp_path, "letters/a.json")
    with pytest.raises(UserError, match=r"run_dir=.*: holds no run: neither .* but letters; give the folder that"):
        read_stages(str(tmp_path))
    with pytest.raises(UserError, match="is a file"):
        read_stages(f"{tmp_path}/letters/a.json")


def test_a_curation_that_runs_and_one_that_broke_off(tmp_path: Path) -> None:
    out = f"{tmp_path}/curated"
    with output_lock(out):
        plan(out, shards=3)
        write(out, "_measured/shard-00000.parquet", "_measured/shard-00002.parquet")
        write(out, "accepted/shard-00000.parquet", "rejected/shard-00000.parquet", "accepted/shard-00001.parquet")
        found = states(tmp_path)["curate"]
        assert found.state == "running"
        assert found.holder is not None
        assert found.holder.pid > 0
        assert found.last_write_s is not None
        assert abs(time.time() - found.last_write_s) < 60
    assert progress(found) == {"measured clips": (8, 12), "measured shards": (2, 3), "split shards": (1, 3)}
    found = states(tmp_path)["curate"]
    assert (found.state, found.holder) == ("broke off", None)


def test_a_plan_in_several_batches(tmp_path: Path) -> None:
    plan(f"{tmp_path}/curated", shards=2)
    write(tmp_path, "curated/_measured/shard-00003.parquet")
    entries = [Entry(key=f"9{n:023d}", uri=f"{n}.mp4", start_s=None, end_s=None) for n in range(5)]
    Ledger(f"{tmp_path}/curated").add(entries, 4)
    assert progress(states(tmp_path)["curate"]) == {"measured clips": (1, 13), "measured shards": (1, 4)}


def test_features_that_are_not_all_there(tmp_path: Path) -> None:
    write(tmp_path, *[f"curated/accepted/shard-0000{n}.parquet" for n in range(3)], "features/shard-00000.parquet")
    found = states(tmp_path)["featurize"]
    assert (found.state, progress(found)) == ("broke off", {"made shards": (1, 3)})


def test_a_training_that_broke_off(tmp_path: Path) -> None:
    place = tmp_path / "align/_checkpoints/d1"
    for step in (100, 200):
        (place / f"checkpoint_{step}").mkdir(parents=True)
        State(step, {"w": torch.zeros(3)}, {}).save(place / f"checkpoint_{step}/state.safetensors")
    write(tmp_path, "align/_checkpoints/d1.json", value={"ranks": 2, "steps": 500})
    lines = [
        '{"step": 200, "loss": 2.0, "learning_rate": 0.1}',
        '{"step": 200, "val_a2v_r1": 0.5}',
        '{"step": 210, "loss": 1.5, "learning_rate": 0.1, "data_wait_share": 0.25}',
    ]
    storage.write_bytes(f"{tmp_path}/align/history.jsonl", "\n".join(lines).encode())
    found = states(tmp_path)["align"]
    assert found.state == "broke off"
    assert progress(found) == {"trained steps": (210, 500), "last checkpoint steps": (200, 500)}
    assert found.figures == {"loss": 1.5, "data_wait_share": 0.25, "val_a2v_r1": 0.5}
    write(tmp_path, "align/_checkpoints/d1.json", value={"ranks": 2})  # of an earlier version
    assert progress(states(tmp_path)["align"])["trained steps"] == (210, None)


def test_adapt_embeds_before_it_trains(tmp_path: Path) -> None:
    write(tmp_path, *[f"features/shard-0000{n}.parquet" for n in range(3)], "features-aligned/a1/shard-00000.parquet")
    with output_lock(f"{tmp_path}/adapt"):
        write(tmp_path, "adapt/_x.json")
        assert progress(states(tmp_path)["adapt"])["sounds embedded shards"] == (1, 3)


def test_an_evaluation_and_a_sweep_under_way(tmp_path: Path) -> None:
    begun = {"clips_per_shard": 4, "cases_per_shard": 5, "planned": {"clips": 10, "pictures": 12}}
    write(tmp_path, "evaluate/_started.json", value=begun)
    names = [*(f"heard/test-0000{n}" for n in range(3)), "heard/train-00000", "pictures/sound-00000"]
    write(tmp_path, *[f"evaluate/{name}.parquet" for name in names])
    write(tmp_path, "tune/align/sweep.json", value={"trials": 4})
    write(tmp_path, "tune/align/trials/000/align.json", "tune/align/trials/001/stopped.json")
    write(tmp_path, "tune/align/trials/002/history.jsonl")
    found = states(tmp_path)
    assert progress(found["evaluate"]) == {"heard clips": (10, 10), "painted pictures": (5, 12)}
    assert progress(found["tune align"]) == {"ended trials": (2, 4)}


def finished_run(run_dir: Path) -> None:
    """The small files of a run that ended."""
    accepted = f"{run_dir}/curated/accepted"
    curated = {"rows_in": 12, "accepted": 10, "rejected": 2, "by_code": {"SILENT": 2}, "hours": 0.1, "seconds": 3.0}
    write(run_dir, "curated/curate.json", value=curated)
    write(run_dir, "features/manifest.json", value={**MANIFEST, "input": accepted})
    trained = {"steps": 5, "kept_step": 5, "metrics": {"val_loss": 1.0}, "data_fingerprint": "f1", "seconds": 2.0}
    write(run_dir, "align/align.json", value={**trained, "sha": "a1"})
    write(run_dir, "adapt/adapt.json", value={**trained, "sha": "b1"})
    write(run_dir, "adapt/bundle/meta.json", value={"parents": ["a1"]})
    evaluation = {"bundle": "b1", "sha": "e1", "retrieval": {"same_object_r1": 0.5}, "generation": {"pictures": 9}}
    write(run_dir, "evaluate/evaluate.json", value=evaluation)
    gates = [{"gate": "retrieval.overlap", "passed": False}]
    write(run_dir, "promote/promote.json", value={"version": 3, "passed": False, "bundle": "b1", "gates": gates})


def test_a_run_that_ended(tmp_path: Path) -> None:
    finished_run(tmp_path)
    found = states(tmp_path)
    assert {stage.state for stage in found.values()} == {"finished"}
    assert {stage.outdated for stage in found.values()} == {""}
    assert (found["curate"].rejects, found["curate"].figures["accepted"]) == ({"SILENT": 2}, 10)
    assert [found[name].sha for name in ("align", "adapt", "evaluate", "promote")] == ["a1", "b1", "b1", "b1"]
    assert found["promote"].figures["gates_failed"] == ["retrieval.overlap"]


@pytest.mark.parametrize(
    ("file", "changed", "stage"),
    [
        ("curated/curate.json", {"accepted": 11}, "featurize"),
        ("features/manifest.json", {"fingerprint": "f2"}, "align"),
        ("align/align.json", {"sha": "a2"}, "adapt"),
        ("adapt/adapt.json", {"sha": "b2"}, "evaluate"),
        ("evaluate/evaluate.json", {"bundle": "b2"}, "promote"),
    ],
)
def test_what_is_not_of_what_stands_before_it_is_told(tmp_path: Path, file: str, changed: Any, stage: str) -> None:
    finished_run(tmp_path)
    write(tmp_path, file, value=storage.read_json(f"{tmp_path}/{file}") | changed)
    assert states(tmp_path)[stage].outdated.startswith("not made of what ")


def test_a_hundred_shards_on_s3_are_few_requests(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(f"{s3}/curated", shards=100)
    write(s3, *[f"curated/_measured/shard-{n:05d}.parquet" for n in range(60)])
    write(s3, *[f"features/shard-{n:05d}.parquet" for n in range(10)])
    storage.write_bytes(f"{s3}/align/history.jsonl", b'{"step": 3, "loss": 1.0}')
    with counted(monkeypatch) as requests:
        found = states(s3)
    assert progress(found["curate"])["measured shards"] == (60, 100)
    assert requests.total() <= 20, requests
