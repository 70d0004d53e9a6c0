"""Runs and the registry on a real sqlite store and a real tracking server; no pickle, no half-open runs."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file

from aai.bundle import PICKLE_SUFFIXES, Bundle, BundleConfig, read_bundle, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import write_wav
from aai.version import code_version
from pipelines.registry import tracking
from pipelines.settings import TrackingConfig
from tests.pipelines.conftest import python
from tests.tiny import paintable_bundle


@pytest.fixture
def cfg(empty_store: Path, tmp_path: Path) -> TrackingConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    # An experiment keeps its artifact folder, and the copy's own must not be the template's.
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test", model_name="toy")


def make_bundle(folder: Path, seed: int) -> Bundle:
    """A bundle of meaningless weights."""
    for name in ("clip", "sd"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        save_file({"w": torch.ones(1)}, folder / name / "m.safetensors")
    spec = FoundationSpec(clip=str(folder / "clip"), diffusion=str(folder / "sd"))
    config = BundleConfig(foundation=spec, encoder={}, adapter={})
    weights = {"w": torch.full((3,), float(seed))}
    return write_bundle(folder / "bundle", config, weights, weights, {"data_fingerprint": f"d{seed}"})


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


def test_same_content_same_version(cfg: TrackingConfig, tmp_path: Path) -> None:
    one, two = make_bundle(tmp_path / "1", 1), make_bundle(tmp_path / "2", 2)
    assert tracking.register(cfg, one.folder, {"r1": 0.1}, {"reason": "a"}) == 1
    assert tracking.register(cfg, two.folder, {}, {}) == 2
    assert tracking.register(cfg, one.folder, {"r1": 0.2}, {"reason": "b"}) == 1
    tags = tracking.version_tags(cfg, 1)
    assert tags["bundle_sha"] == one.sha
    assert (tags["reason"], json.loads(tags["metrics"])) == ("a", {"r1": 0.1})  # what is recorded stays
    assert tracking.find_version(cfg, "unknown") is None


def test_aliases_and_pins(cfg: TrackingConfig, tmp_path: Path) -> None:
    assert tracking.aliases(cfg, "toy") == {}
    for seed in (1, 2):
        tracking.register(cfg, make_bundle(tmp_path / str(seed), seed).folder, {}, {})
    tracking.set_alias(cfg, "champion", 1)
    assert tracking.get_alias(cfg, "champion") == 1
    assert tracking.get_alias(cfg, "previous") is None
    pinned = tracking.pin_bundle("models:/toy@champion", cfg)
    assert pinned == ("models:/toy/1", "toy", "1", "champion")
    tracking.set_alias(cfg, "champion", 2)
    assert tracking.pin_bundle("models:/toy@champion", cfg)[0] == "models:/toy/2"
    for uri, weight in ((pinned[0], 1), ("models:/toy@champion", 2)):
        folder = tracking.resolve_bundle(uri, cfg)
        assert read_bundle(folder).adapter()["w"].tolist() == [weight] * 3
    tracking.delete_alias(cfg, "champion")
    assert tracking.aliases(cfg, "toy") == {}
    assert tracking.pin_bundle("some/folder", cfg) == ("some/folder", "", "", "")
    assert tracking.resolve_bundle(str(tmp_path / "1" / "bundle"), cfg) == str(tmp_path / "1" / "bundle")


def test_tags_of_the_registered_model(cfg: TrackingConfig, tmp_path: Path) -> None:
    assert tracking.model_tags(cfg) == {}
    tracking.register(cfg, make_bundle(tmp_path / "1", 1).folder, {}, {})
    tracking.set_model_tag(cfg, "move-champion", "{}")
    assert tracking.model_tags(cfg) == {"move-champion": "{}"}
    for _ in range(2):  # it may be absent
        tracking.delete_model_tag(cfg, "move-champion")
    assert tracking.model_tags(cfg) == {}


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("models:/toy@staging", r"no alias 'staging' .*aliases of toy: champion \(version 1\)"),
        ("models:/other@champion", "no alias 'champion' of model 'other' .*aliases of other: none"),
        ("models:/toy/7", "models:/toy/7: no such version"),
        ("models:/toy", "write models:/NAME@ALIAS"),
        ("models:/toy@champion", "the artifact store was changed"),
    ],
)
def test_what_cannot_be_resolved(cfg: TrackingConfig, tmp_path: Path, uri: str, rule: str) -> None:
    tracking.set_alias(cfg, "champion", tracking.register(cfg, make_bundle(tmp_path / "1", 1).folder, {}, {}))
    if uri.endswith("toy@champion"):  # a whole bundle, but another one than was registered
        stored = Path(tracking.resolve_bundle(uri, cfg))
        shutil.rmtree(stored)
        shutil.copytree(make_bundle(tmp_path / "2", 2).folder, stored)
    with pytest.raises(UserError, match=rule):
        tracking.resolve_bundle(uri, cfg)


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
    with pytest.raises(UserError, match=rule) as error, tracking.run(TrackingConfig(uri=uri.format(tmp=tmp_path)), "x"):
        pytest.fail("the run was opened")
    assert "secret" not in str(error.value)


def test_waits_for_another_process_lock(cfg: TrackingConfig, tmp_path: Path) -> None:
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    code = """
        import sys
        from pipelines.registry import tracking
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


def test_champion_paints_in_a_fresh_process_without_pickle(cfg: TrackingConfig, tmp_path: Path) -> None:
    version = tracking.register(cfg, paintable_bundle(tmp_path / "b"), {}, {})
    tracking.set_alias(cfg, "champion", version)
    names = [path.name for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert {"MLmodel", "config.yaml", "meta.json", "aligner.safetensors", "adapter.safetensors"} <= set(names)
    assert not [name for name in names if name.lower().endswith(PICKLE_SUFFIXES)]
    write_wav(str(tmp_path / "noise.wav"), torch.randn(16_000).mul(0.1).numpy(), 16_000)
    code = """
        import os, sys
        import mlflow, pandas as pd
        mlflow.set_tracking_uri(sys.argv[1])
        os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
        model = mlflow.pyfunc.load_model("models:/toy@champion")
        audio = open(sys.argv[2], "rb").read()
        table = pd.DataFrame({"audio": [audio, audio], "prompt": ["a sketch of <sound>", None]})
        for png in model.predict(table):
            print(png[:8].hex(), b"Software\\0aai " in png)
    """
    out, err = python(code, cfg.uri, str(tmp_path / "noise.wav")).communicate(timeout=300)
    assert out.split() == [b"\x89PNG\r\n\x1a\n".hex(), "True"] * 2, err


def test_a_tracking_server_stores_and_returns_bundles(cfg: TrackingConfig, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        cfg.uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
        "--artifacts-destination",
        str(tmp_path / "served"),
    ]
    remote = TrackingConfig(uri=f"http://127.0.0.1:{port}", experiment="remote", model_name="toy")
    with (tmp_path / "server.log").open("wb") as sink:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=sink, stderr=sink, start_new_session=True)
        try:
            wait_for(remote, tmp_path / "server.log")
            made = make_bundle(tmp_path / "1", 1)
            tracking.set_alias(remote, "champion", tracking.register(remote, made.folder, {"r1": 1}, {"a": "b"}))
            assert tracking.register(remote, made.folder, {}, {}) == 1
            folder = tracking.resolve_bundle("models:/toy@champion", remote)
            assert read_bundle(folder).sha == made.sha
            assert not folder.startswith(str(tmp_path))
            with pytest.raises(UserError, match=r"no alias 'x' .* champion \(version 1\)"):
                tracking.resolve_bundle("models:/toy@x", remote)
        finally:
            os.killpg(server.pid, 15)
            server.wait(timeout=20)


def wait_for(cfg: TrackingConfig, log: Path) -> None:
    """Opens a run once the server answers."""
    for attempt in range(240):
        try:
            with tracking.run(cfg, f"attempt {attempt}"):
                return
        except UserError:
            subprocess.run(["sleep", "0.5"], check=True)
    pytest.fail(log.read_text()[-2000:])


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
