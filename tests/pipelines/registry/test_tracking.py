"""Runs on a real sqlite store: what they keep, and none stays half open."""

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from aai.errors import UserError
from aai.version import code_version
from pipelines.registry import tracking
from pipelines.settings import TrackingConfig
from tests.pipelines.conftest import python


@pytest.fixture
def cfg(empty_store: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    # An experiment keeps its artifact folder, and the copy's own must not be the template's.
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test", model_name="toy")


def client(cfg: TrackingConfig) -> MlflowClient:
    return MlflowClient(tracking_uri=cfg.uri, registry_uri=cfg.uri)


def test_two_processes_may_open_a_new_store_at_once(empty_store: Path) -> None:
    store = MlflowClient(f"sqlite:///{empty_store}")
    experiment = store.get_experiment_by_name("aai")
    assert experiment is not None
    assert experiment.artifact_location == str(empty_store.parent / "mlartifacts")
    assert [run.info.status for run in store.search_runs([experiment.experiment_id])] == ["FINISHED"] * 2


def test_a_run_keeps_params_metrics_and_artifacts(cfg: TrackingConfig, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    params = {"fit": {"rate": 0.1, "layers": [1, 2]}, "empty": {}, "long": "x" * 9000, "odd name!": None}
    params |= {f"p{i}": i for i in range(150)}
    with tracking.run(cfg, "align", params, {"digest": "abc"}) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        run.log_metrics({"loss": 1.0, "nested": {"r1": 0.5}, "text": "no", "flag": True, "nan": float("nan")}, step=2)
        run.log_artifact(tmp_path / "notes.txt")
        run.log_bytes("plots/a.png", b"\x89PNG")
        run.log_json("result.json", {"a": [1]})
    found = client(cfg).get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "align"
    assert found.data.params["fit.rate"] == "0.1"
    assert found.data.params["fit.layers"] == "[1, 2]"
    assert len(found.data.params["long"]) == 6000
    assert found.data.params["odd name_"] == "null"
    assert len(found.data.params) == 155
    assert found.data.tags["digest"] == "abc"
    assert found.data.tags["written_by"] == code_version()
    assert found.data.metrics == {"loss": 1.0, "nested.r1": 0.5}
    history = client(cfg).get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 2.0), (2, 1.0)]
    artifacts = tmp_path / "mlartifacts" / run.run_id / "artifacts"
    assert (artifacts / "notes.txt").read_text() == "hello"
    assert (artifacts / "plots" / "a.png").read_bytes() == b"\x89PNG"
    assert json.loads((artifacts / "result.json").read_text()) == {"a": [1]}


def test_an_exception_marks_the_run_failed(cfg: TrackingConfig) -> None:
    with pytest.raises(ZeroDivisionError), tracking.run(cfg, "broken") as run:
        _ = 1 / 0
    assert client(cfg).get_run(run.run_id).info.status == "FAILED"
    with pytest.raises(KeyboardInterrupt), tracking.run(cfg, "stopped") as run:
        raise KeyboardInterrupt
    assert client(cfg).get_run(run.run_id).info.status == "KILLED"


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("http://127.0.0.1:9", "no tracking server answers"),
        ("http://me:secret@127.0.0.1:9", "holds a password"),
        ("file:///tmp/mlruns", "is not supported"),
        ("sqlite:///s3://bucket/mlflow.db", "needs a file on this machine"),
        ("sqlite:////proc/no/mlflow.db", "cannot be opened"),
        ("sqlite:///{tmp}/text.db", "cannot be opened .file is not a database"),
    ],
)
def test_unusable_stores(tmp_path: Path, uri: str, rule: str) -> None:
    (tmp_path / "text.db").write_text("this is not a database " * 100)
    cfg = TrackingConfig(uri=uri.format(tmp=tmp_path), wait_s=0)
    with pytest.raises(UserError, match=rule) as error, tracking.run(cfg, "x"):
        pytest.fail("the run was opened")
    assert "secret" not in str(error.value)


def test_waits_for_another_process_lock(cfg: TrackingConfig, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    code = """
        import sys
        from pipelines.registry import tracking, versions
        from pipelines.settings import TrackingConfig
        print("go", flush=True)
        with tracking.run(TrackingConfig(uri=sys.argv[1]), "patient"):
            pass
    """
    process = python(code, cfg.uri)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "go\n"
        with pytest.raises(subprocess.TimeoutExpired):  # longer than sqlite's own 5 s
            process.wait(timeout=9)
    finally:
        holder.execute("ROLLBACK")
        holder.close()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err


def test_an_earlier_run_goes_on_with_the_params_it_has(cfg: TrackingConfig) -> None:
    with pytest.raises(ZeroDivisionError), tracking.run(cfg, "tune", {"trials": 8}) as first:
        raise ZeroDivisionError
    with tracking.run(cfg, "tune", {"trials": 9}, {"digest": "abc"}, again=first.run_id) as second:
        assert client(cfg).get_run(first.run_id).info.status == "RUNNING"
        second.log_params({"best": {"fit.steps": 3}})
    assert second.run_id == first.run_id
    found = client(cfg).get_run(first.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"trials": "8", "best.fit.steps": "3"}
    assert found.data.tags["digest"] == "abc"
    with tracking.run(cfg, "tune", {"trials": 9}, again="0" * 32) as third:  # the store is another one now
        pass
    assert third.run_id not in ("0" * 32, first.run_id)
    assert client(cfg).get_run(third.run_id).data.params == {"trials": "9"}
