"""Sweeps over align on real Ray: three tiny trainings, one of which is stopped early, and one that cannot work."""

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.features import FeatureManifest
from pipelines import featurize, tune
from pipelines.__main__ import main
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.orphans import remove_last_orphans
from pipelines.settings import ClusterConfig
from pipelines.tune import TuneConfig
from tests.pipelines.conftest import run_here
from tests.tiny import write_clip, write_clip_table, write_diffusion

ENCODER = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_mel_bins": 32, "head_size": 32}
FIT = {"steps": 8, "batch_size": 8, "log_every": 2, "eval_every": 4, "warmup_steps": 1, "learning_rate": 0.01}
NOTHING_LEARNED, NOT_FINITE = 1e-9, 1e30


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with features and a config of align."""
    folder = tmp_path_factory.mktemp("tune")
    clip = write_clip(folder / "clip")
    foundation = {"clip": str(clip), "diffusion": str(write_diffusion(folder / "diffusion", clip))}
    clips = str(write_clip_table(folder / "accepted", 3, 16))
    table = {"input": clips, "out": str(folder / "features"), "foundation": foundation}
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        featurize.run(featurize.FeaturizeConfig.parse(table))
    connect(ClusterConfig())
    base = {
        "features": str(folder / "features"),
        "out": str(folder / "align"),
        "foundation": foundation,
        "encoder": ENCODER,
        "augment": {f"{kind}_probability": 0 for kind in ("reverb", "lowpass", "noise", "gain")},  # eight steps are few
        "fit": {**FIT, "precision": "float32", "max_skipped_in_a_row": 1},
        "cluster": {"num_workers": 1},
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
    }
    (folder / "align.yaml").write_text(yaml.safe_dump(base))
    yield folder
    shutdown()


def settings(root: Path, **changed: Any) -> TuneConfig:
    """A sweep with one trial that is stopped and one that fails."""
    given = {
        "base": str(root / "align.yaml"),
        "space": {"fit.learning_rate": {"choice": [NOTHING_LEARNED, NOT_FINITE]}},
        "trials": 3,
        "seed": 2,  # the one that is stopped comes before the one that fails
        "metric": "val_label1_r1",
        "stopping": {"min_trials": 1},
        "out": str(root / "sweep"),
    }
    return TuneConfig.parse({**given, **changed})


@pytest.fixture(scope="module")
def swept(root: Path) -> dict[str, Any]:
    """What the sweep returned."""
    return tune.run(settings(root))


def trial(swept: dict[str, Any], number: int) -> dict[str, Any]:
    return next(dict(standing) for standing in swept["standing"] if standing["number"] == number)


def runs_of(root: Path, name: str) -> list[Any]:
    """MLflow's runs of a name, oldest first."""
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("aai")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [run for run in found if run.info.run_name == name]


def test_a_sweep_ends_with_a_table_and_a_winner(root: Path, swept: dict[str, Any]) -> None:
    assert [(s["number"], s["state"]) for s in swept["standing"]] == [(0, "finished"), (1, "stopped"), (2, "failed")]
    base, stopped, failed = (trial(swept, number) for number in range(3))
    assert (base["step"], stopped["step"]) == (8, 4)
    assert base["value"] == swept["base_value"] == swept["best"]["value"] > stopped["value"]
    assert [setting["settings"]["fit.learning_rate"] for setting in (base, stopped)] == [0.01, NOTHING_LEARNED]
    assert "is not finite at step" in failed["error"]
    assert swept["summary"].startswith("nothing is better than the base settings' val_label1_r1")
    for number, finished in ((0, True), (1, False), (2, False)):
        folder = root / "sweep" / "trials" / f"{number:03d}"
        assert (folder / "align.json").exists() == (folder / "bundle").exists() == finished
        assert not (folder / "_checkpoints").exists() or number == 2
    assert json.loads((root / "sweep" / "tune.json").read_text()) == swept
    assert Image.open(io.BytesIO((root / "sweep" / "trials.png").read_bytes())).size == (960, 600)
    assert not (root / "sweep" / "_tune").exists()


def test_no_worker_is_left_behind(swept: dict[str, Any]) -> None:
    assert remove_last_orphans(60) == 0  # the CPUs themselves Ray frees later, now and then only when the job ends
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        names = []
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                names.append(" ".join(child.cmdline()[:1]))
        left = [name for name in names if "RayTrainWorker" in name or "TrainController" in name]
        if not left:
            return
        time.sleep(0.5)
    pytest.fail(f"still there: {left}")


def test_mlflow_has_the_sweep_and_its_trials(root: Path, swept: dict[str, Any]) -> None:
    (parent,) = runs_of(root, "tune")
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == {"best_value": swept["best"]["value"], "base_value": swept["base_value"]}
    assert parent.data.params["best.fit.learning_rate"] == "0.01"
    assert parent.data.params["space.fit.learning_rate"] == "one of 1e-09, 1e+30"
    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert names == {"best.yaml", "trials.png", "tune.json"}
    children = runs_of(root, "align")
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    states = {run.data.tags["trial"]: run.info.status for run in children}
    assert states == {"000": "FINISHED", "001": "KILLED", "002": "FAILED"}
    base = next(run for run in children if run.data.tags["trial"] == "000")
    points = client.get_metric_history(base.info.run_id, "val_label1_r1")
    assert [point.step for point in points] == [4, 8]
    assert base.data.params["fit.learning_rate"] == "0.01"


def test_it_goes_on_without_training_what_is_done(
    root: Path, swept: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = root / "sweep"
    files = [*folder.glob("trials/00[01]/**/*.json*"), *folder.glob("trials/000/bundle/*")]
    before = {file: file.stat().st_mtime_ns for file in files}
    assert len(before) > 5
    (folder / "tune.json").unlink()  # as a kill leaves it
    again = tune.run(settings(root, trials=2))
    assert again["standing"] == [s for s in swept["standing"] if s["number"] < 2]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert len(runs_of(root, "tune")) == 1
    assert len(runs_of(root, "align")) == 3
    assert tune.run(settings(root, trials=2)) == again
    assert "tune: up to date" in caplog.text


def test_the_winner_is_a_config_that_runs(root: Path, swept: dict[str, Any]) -> None:
    best = root / "sweep" / "best.yaml"
    text = best.read_text()
    assert text.startswith("# Trial 0 of a sweep by `aai tune align`:\n# nothing is better than")
    config, base = AlignConfig.load(best), AlignConfig.load(root / "align.yaml")
    assert config.out == str(root / "sweep" / "best")
    assert config.content() == base.content()
    AlignRecipe(config).prepare(FeatureManifest.read(config.features))  # nothing that is refused is set
    trial_0 = root / "sweep" / "trials" / "000"
    before = (trial_0 / "align.json").stat().st_mtime_ns
    assert main(["align", "--config", str(best), "--out", str(trial_0)]) == 0  # it is that training: up to date
    assert (trial_0 / "align.json").stat().st_mtime_ns == before


def test_another_sweep_is_not_mixed_with_it(root: Path, swept: dict[str, Any]) -> None:
    for changed in ({"seed": 3}, {"overrides": {"fit": {"steps": 9}}}, {"metric": "val_a2v_r1"}):
        with pytest.raises(UserError, match="holds a sweep with other settings or data"):
            tune.run(settings(root, **changed))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {"fit.learnin_rate": {"choice": [1]}}}, r"space\.fit\.learnin_rate=1: unknown key .*learning_rate"),
        ({"space": {"fit.batch_size": {"choice": [8, -1]}}}, r"space\.fit\.batch_size=-1: Input should be greater"),
        ({"space": {"fit.steps": {"uniform": [2, 9]}}}, r"space\.fit\.steps=.*valid integer"),
        ({"space": {"max_val_clips": {"choice": [8]}}}, r"space\.max_val_clips=.* decides no weights"),
        ({"space": {"out": {"choice": ["x"]}}}, r"space\.out=.* decides no weights"),
        ({"metric": "loss"}, "is no figure of the val split"),
        ({"overrides": {"fit": {"step": 3}}}, r"fit\.step=3: unknown key .*did you mean 'steps'"),
        ({"base": "absent.yaml"}, "no such file"),
        ({"overrides": {"encoder": {"mel_mean": 1.0}}}, r"encoder\.mel_mean=1\.0: is decided by data"),
    ],
)
def test_mistakes_are_found_before_anything_starts(
    changed: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tune.run(settings(root, out=str(tmp_path / "out"), **changed))
    assert not (tmp_path / "out").exists()


def test_features_without_a_val_split_are_refused(root: Path, tmp_path: Path) -> None:
    manifest = FeatureManifest.read(str(root / "features"))
    without = manifest.model_copy(update={"rows": {"train": manifest.rows["train"], "test": 12}})
    storage.write_json(str(tmp_path / "features" / "manifest.json"), without.model_dump(mode="json"))
    config = settings(root, out=str(tmp_path / "out"), overrides={"features": str(tmp_path / "features")})
    with pytest.raises(UserError, match=r"has no clips of the split val.*val_share=0\.02"):
        tune.run(config)


@pytest.mark.accept
def test_a_metric_that_no_validation_has_is_refused_at_the_first(root: Path, tmp_path: Path) -> None:
    """A sample: what ends everything, in tuning/test_sweep.py."""
    with pytest.raises(UserError, match=r"metric=val_a2v_r2: no validation has .*val_a2t_r1, val_a2v_r1, val_label1"):
        tune.run(settings(root, out=str(tmp_path / "out"), metric="val_a2v_r2"))
    assert sorted(path.name for path in (tmp_path / "out" / "trials").iterdir()) == ["000"]


def test_a_loss_whose_weights_are_swept_is_no_metric(root: Path) -> None:
    given = {"stage": "adapt", "base": None, "space": {"loss.w_clip": {"choice": [0.1]}}}
    with pytest.raises(UserError, match=r"metric=val_loss: means something else .*loss\.w_clip"):
        settings(root, metric=None, **given).candidates()
    assert settings(root, metric="val_hidden", **given).metric_and_mode() == ("val_hidden", "min")


def test_the_plan_tells_what_is_swept(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "adapt", "--trials", "5", "--set", "space.fit.steps.choice=[10,20,30,40]", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for line in (
        "  trials         5: the stage as it is, and 4 drawn",
        "  early stop     at step 100, 200",
        "  fit.steps      one of 10, 20, 30, 40",
        "  metric         val_loss, less is better, on the val split",
        "  winner         runs/demo/tune/adapt/best.yaml",
        "  at a time      1 trials",
    ):
        assert line in out.splitlines()
