"""A third stage is one file: trained on two Ray workers, killed, resumed."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aai import storage
from aai.errors import UserError
from aai.features import FeatureManifest
from pipelines.engine.cluster import connect, shutdown
from pipelines.overview.stage_states import StageStatus, read_stages
from pipelines.settings import ClusterConfig
from pipelines.training import following
from pipelines.training.recipe import Trained
from pipelines.training.stage import content_digest, run_stage
from tests.aai import test_features as table
from tests.pipelines.training import third_stage
from tests.pipelines.training.third_stage import CaptionConfig, CaptionRecipe, CaptionTask

STEPS, DIES_AT = 9, 6


class MortalTask(CaptionTask):
    """Its process is killed, once, in the middle of a step."""

    def __init__(self, mapping: third_stage.CaptionMap, flag: str) -> None:
        super().__init__(mapping)
        self.flag, self.seen = Path(flag), 0

    def forward(self, batch: dict[str, Any]) -> Any:
        self.seen += self.training
        if self.seen == DIES_AT and torch.distributed.get_rank() == 1 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(batch)


class MortalRecipe(CaptionRecipe):
    """The third stage on a machine that fails."""

    def build(self) -> MortalTask:
        """See TrainRecipe."""
        return MortalTask(super().build().mapping, storage.join(self.config.features, "killed"))


def written(place: Path) -> str:
    """A table of 21 rows of train and 9 of val, with a manifest that says so."""
    folder = table.write(place)
    manifest = FeatureManifest.read(folder).model_copy(update={"rows": {"train": 21, "val": 9}})
    storage.write_json(f"{folder}/manifest.json", manifest.model_dump(mode="json"))
    return folder


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = written(tmp_path_factory.mktemp("features"))
    connect(ClusterConfig())
    yield folder
    shutdown()


def settings(features: str, out: Path) -> CaptionConfig:
    fit = {"steps": STEPS, "batch_size": 4, "log_every": 1, "checkpoint_every": 2, "warmup_steps": 1}
    tracking = {"uri": f"sqlite:///{out.parent}/mlflow.db"}
    return CaptionConfig.parse({"features": features, "out": str(out), "fit": fit, "tracking": tracking})


def test_a_third_stage_is_one_file_of_at_most_120_lines() -> None:
    assert len(Path(third_stage.__file__).read_text().splitlines()) <= 120


def test_a_third_stage_killed_and_resumed_ends_where_it_would_have(
    features: str, empty_store: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    whole = third_stage.run(settings(features, tmp_path / "whole"))
    seen: list[StageStatus] = []

    def look(step: int, figures: dict[str, float]) -> None:
        seen.extend(stage for stage in read_stages(str(tmp_path)) if stage.stage == "align")

    killed = run_stage(MortalRecipe, settings(features, tmp_path / "align"), look)
    check_status(seen)
    assert Path(features, "killed").exists()
    assert killed["digest"] == whole["digest"]
    assert killed["steps"] == STEPS
    assert {"val_error"} <= whole["metrics"].keys()
    weights = load_file(Path(whole["bundle"], "map.safetensors"))
    assert weights.keys() == {"linear.weight", "linear.bias", "scale"}
    assert weights["linear.weight"].shape == (3, 3)  # the data's width
    for name, value in load_file(Path(killed["bundle"], "map.safetensors")).items():
        assert torch.equal(value, weights[name]), name
    assert killed["sha"] == whole["sha"]
    written = storage.read_json(storage.join(whole["bundle"], "map.json"))
    assert (written["map"], written["data_fingerprint"]) == ({"width": 3, "bias": True}, "f")
    steps = [(entry["step"], "loss" in entry) for entry in following.history(str(tmp_path / "align"))]
    assert steps == [(step, True) for step in range(1, STEPS + 1)] + [(STEPS, False)]
    assert third_stage.run(settings(features, tmp_path / "whole")) == whole  # nothing to do


def check_status(seen: list[StageStatus]) -> None:
    """What `aai status` tells while a training runs."""
    assert {stage.state for stage in seen} == {"running"}
    assert {stage.holder.pid for stage in seen if stage.holder} == {os.getpid()}
    last = {part.what: (part.done, part.of) for part in seen[-1].progress}
    assert last["trained"] == (STEPS, STEPS)
    assert last["last checkpoint"][0] >= DIES_AT
    assert seen[-1].figures["loss"] > 0


def test_what_changes_the_weights_changes_the_digest(tmp_path: Path) -> None:
    folder = table.write(tmp_path / "features")
    manifest = FeatureManifest.read(folder)
    config = settings(folder, tmp_path / "out")

    def of(values: dict[str, Any], parents: tuple[str, ...] = (), data: str = "f") -> str:
        recipe = CaptionRecipe(CaptionConfig.parse(config.model_dump() | values))
        recipe.parents = parents
        return content_digest(recipe, manifest.model_copy(update={"fingerprint": data}))

    first = of({})
    for same in (
        {"out": "b"},
        {"features": "b"},
        {"max_val_clips": 2},
        {"run_dir": "b"},
        {"cluster": {"num_workers": 4}},
    ):
        assert of(same) == first, same
    for other in ({"map": {"bias": False}}, {"fit": {"seed": 1}}):
        assert of(other) != first, other
    how = {"chunk_size": 2, "log_every": 7, "checkpoint_every": 7, "compile": True, "checkpoint_activations": True}
    assert of({"fit": config.fit.model_dump() | how}) == first
    assert of({}, parents=("bundle",)) != first
    assert of({}, data="g") != first


def test_what_was_trained_survives_the_file(tmp_path: Path) -> None:
    weights = {"a": torch.arange(6.0).view(2, 3).T, "count": torch.tensor(3)}
    Trained(weights, {"width": 3}, 7, "bfloat16", 5).save(tmp_path / "x")
    found = Trained.load(tmp_path / "x")
    assert (found.settings, found.step, found.precision, found.kept_step) == ({"width": 3}, 7, "bfloat16", 5)
    assert all(torch.equal(found.weights[name], value) for name, value in weights.items())


def test_more_clips_a_step_than_there_are_is_told_before_anything_starts(tmp_path: Path) -> None:
    settings = {"features": written(tmp_path), "out": str(tmp_path / "out")}
    CaptionConfig.parse({**settings, "fit": {"batch_size": 20}}).plan()
    with pytest.raises(UserError, match=r"fit\.batch_size=22: is more than the 21 rows of split 'train'; lower it"):
        CaptionConfig.parse({**settings, "fit": {"batch_size": 22}}).plan()
