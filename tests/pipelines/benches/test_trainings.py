"""The trainings of a capacity plan, by hand: from the work of a step that the stage itself tells."""

from dataclasses import replace
from pathlib import Path

import pytest

from aai import storage
from aai.features import FeatureManifest
from aai.memory import StepCost
from pipelines.align import AlignConfig
from pipelines.benches.trainings import HEADER, Nodes, foundation_note, plan_training
from tests.aai import test_features as table
from tests.test_configs import CONFIGS

DEMO = str(CONFIGS / "demo" / "align.yaml")
GPUS = Nodes("big", 32, 4, gpu_tflops=50.0)


def test_the_time_is_the_work_of_a_workers_clips() -> None:
    found = plan_training("align", DEMO, "none", 1280, GPUS)
    alone = AlignConfig.load(DEMO, ["features=none", "cluster.num_workers=4", "cluster.gpus_per_worker=1"]).step_cost()
    assert isinstance(alone, StepCost)
    assert (found.workers, found.steps, found.epochs) == (4, 300, 30.0)
    assert found.step_s == pytest.approx(alone.flop / 50e12)
    assert found.hours == pytest.approx(300 * alone.flop / 50e12 / 3600)
    assert found.gb_per_worker == pytest.approx(alone.num_bytes / 1e9)
    assert found.read_mb_per_s == 0, "there are no features to read"
    assert found.note == ""
    halved = plan_training("align", DEMO, "none", 1280, replace(GPUS, gpus=8, gpu_tflops=100.0))
    assert halved.step_s == pytest.approx(found.step_s / 4, rel=0.01), "twice the GPUs, each twice as fast"


def test_workers_share_a_step_evenly() -> None:
    found = plan_training("align", DEMO, "none", 1280, replace(GPUS, gpus=6))
    assert (found.workers, found.note) == (4, "2 of 6 GPUs have no part in 128 clips")
    on_cpus = plan_training("align", DEMO, "none", 1280, replace(GPUS, gpus=0, cpus=32))
    whole = plan_training("align", DEMO, "none", 1280, replace(GPUS, gpus=0, cpus=1))
    assert (on_cpus.workers, whole.workers, on_cpus.note) == (32, 1, "")
    assert on_cpus.hours == pytest.approx(whole.hours / 32, rel=0.1)


def test_what_is_not_here_is_said() -> None:
    """The real models are on no machine of the tests."""
    here = "told when the features are there"
    for stage, batch, reason in (("align", 1024, "told when MIT/ast-"), ("adapt", 128, here)):
        file = str(CONFIGS / stage / "vggsound_vitl14_gpu8.yaml")
        found = plan_training(stage, file, "none", 184_000, GPUS)
        assert found.hours is None
        assert reason in found.line()
        assert found.epochs == pytest.approx(found.steps * batch / 184_000)


def test_columns_stand_below_their_names(tmp_path: Path) -> None:
    line = plan_training("align", DEMO, str(tmp_path), 1280, GPUS).line()
    assert len(line) == len(HEADER)


def test_what_is_read_and_how_many_epochs_follow_from_the_sample(tmp_path: Path) -> None:
    """Features of 21 training clips of 30: audio of 30,000 bytes each for align, latents for adapt."""
    folder = table.write(tmp_path)
    foundation = {"clip": "another", "clip_revision": "1", "diffusion": "toy:diffusion", "diffusion_revision": "1"}
    changes = {"rows": {"train": 21, "val": 9}, "latent_shape": (8, 8, 8), "foundation": foundation}
    manifest = FeatureManifest.read(folder).model_copy(update=changes)
    storage.write_json(f"{folder}/manifest.json", manifest.model_dump(mode="json"))
    align = plan_training("align", DEMO, folder, 3000, GPUS)
    assert align.epochs == pytest.approx(300 * 128 / 2100)
    adapt = plan_training("adapt", DEMO.replace("align", "adapt"), folder, 3000, replace(GPUS, gpus=64))
    assert (adapt.workers, adapt.note) == (32, "32 of 64 GPUs have no part in 32 clips")  # half of 64 are denoised
    assert 0 < adapt.read_mb_per_s * adapt.step_s / 64 < align.read_mb_per_s * align.step_s / 128
    assert foundation_note(DEMO, folder).startswith("the sample is featurized for another: give --set featurize=")
    assert plan_training("align", DEMO, folder, 3000, GPUS, "why").line().endswith("why")
