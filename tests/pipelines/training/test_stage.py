"""What a stage decides before and around training; the training itself is tested on Ray with a recipe."""

import copy
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from aai import storage
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.features import FeatureManifest
from aai.fit import FitConfig
from aai.memory import PeakMemory
from pipelines.training import ray_train
from pipelines.training.recipe import Trained, prepare_network
from pipelines.training.stage import kept_figures, make_work, ranks_file, ranks_of_run, up_to_date, validates
from tests.aai import test_features as table
from tests.pipelines.training.third_stage import CaptionConfig, CaptionRecipe


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """21 clips of train, 9 of val."""
    folder = table.write(tmp_path_factory.mktemp("features"))
    manifest = FeatureManifest.read(folder).model_copy(update={"rows": {"train": 21, "val": 9}})
    storage.write_json(f"{folder}/manifest.json", manifest.model_dump(mode="json"))
    return folder


def settings(features: str, **fit: Any) -> dict[str, Any]:
    return {"features": features, "out": "out", "fit": {"batch_size": 6, **fit}, "map": {"width": 3}}


def test_only_the_first_rank_validates_and_all_begin_alike(features: str) -> None:
    works = [make_work(worker, 2, (CaptionRecipe, settings(features, seed=5), 2)) for worker in range(2)]
    assert [work.evaluate is None for work in works] == [False, True]
    first, second = (work.task.state_dict() for work in works)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = make_work(0, 2, (CaptionRecipe, settings(features, seed=6), 2)).task.state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    batches = [next(work.batches(0)) for work in works]
    assert {len(batch["image_features"]) for batch in batches} == {3}  # each rank's share of six
    assert not torch.equal(*(batch["image_features"] for batch in batches))
    assert works[0].evaluate is not None
    assert {name.split("_")[0] for name in works[0].evaluate()} == {"val"}


def test_fewer_workers_take_the_same_clips_in_each_step(features: str) -> None:
    """Three ranks' clips, by three workers, by two (one of which takes two ranks') and by one."""
    seen = []
    for workers in (3, 2, 1):
        works = [make_work(n, workers, (CaptionRecipe, settings(features, seed=5), 3)) for n in range(workers)]
        steps = [[] for _ in range(7)]
        for work in works:
            for step, batch in zip(range(7), work.batches(2), strict=False):
                assert len(batch["clip_id"]) == len(batch["image_features"]) == len(batch["caption_id"])
                steps[step] += batch["clip_id"]
        assert [len(step) for step in steps] == [6] * 7
        seen.append([sorted(step) for step in steps])
    assert seen[0] == seen[1] == seen[2]


def test_a_run_keeps_the_ranks_it_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def of(workers: Any, digest: str = "d") -> int:
        values = settings("unused") | {"out": str(tmp_path), "cluster": {"num_workers": workers}}
        return ranks_of_run(CaptionConfig.parse(values), digest)

    def begun(ranks: int) -> None:
        config = CaptionConfig.parse(settings("unused") | {"out": str(tmp_path)})
        storage.write_json(ranks_file(config, "d"), {"ranks": ranks})

    assert [of([2, 3]), of(2)] == [3, 2]
    begun(3)
    assert of(2) == 2, "it has no checkpoint yet"
    storage.write_bytes(f"{tmp_path}/_checkpoints/d/checkpoint_1/state.safetensors", b"")
    assert [of(2), of(1), of([2, 4])] == [3, 3, 3]
    assert "begun with 3 workers, which more cannot share: 1 are not used (for all of them, delete " in caplog.text
    assert of(6, "another run") == 6
    with pytest.raises(UserError, match=r"fit\.batch_size=6: is not a multiple of the 4 workers"):
        of(4, "another run")


def test_only_old_checkpoints_of_dead_workers_are_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = 2**22 + 1  # more than a process can have
    for name, age_s in ((f"{dead}-old", 7200), (f"{dead}-new", 0), (f"{os.getpid()}-old", 7200), ("x-old", 7200)):
        folder = tmp_path / f"{ray_train.LOCAL}{name}"
        folder.mkdir()
        os.utime(folder, (time.time() - age_s,) * 2)
    ray_train.remove_leftovers()
    left = sorted(folder.name.removeprefix(ray_train.LOCAL) for folder in tmp_path.iterdir())
    assert left == sorted([f"{dead}-new", f"{os.getpid()}-old", "x-old"])


def test_validation_that_is_asked_for_needs_clips(features: str) -> None:
    manifest = FeatureManifest.read(features)
    assert validates(FitConfig(), manifest)
    alone = manifest.model_copy(update={"rows": {"train": 21, "val": 1}})  # one clip has nothing to be told from
    assert not validates(FitConfig(eval_every=0), alone)
    with pytest.raises(UserError, match=r"fit\.eval_every=5: .*; curate with val_share=0\.02, or "):
        validates(FitConfig(eval_every=5), alone)


def loss_of(fit: FitConfig) -> tuple[list[torch.Tensor], int]:
    """Gradients of a small encoder, and the bytes that its step held at most."""
    torch.manual_seed(0)
    encoder = AudioEncoder(AudioEncoderConfig(num_layers=4, stride=4, clip_s=1.0, num_mel_bins=32, dropout=0.0))
    prepare_network(encoder.backbone, fit)
    with PeakMemory() as memory:
        (encoder(torch.ones(8, 16_000)) * torch.arange(128.0)).sum().backward()
    return [p.grad for p in encoder.parameters() if p.grad is not None], memory.peak


def test_fewer_activations_are_kept_and_the_gradient_stays() -> None:
    (whole, most), (again, least) = loss_of(FitConfig()), loss_of(FitConfig(checkpoint_activations=True))
    assert len(whole) == len(again) > 20
    for ours, theirs in zip(again, whole, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert least < 0.6 * most
    with pytest.raises(UserError, match=r"fit\.checkpoint_activations=True: Linear does not offer it"):
        prepare_network(torch.nn.Linear(1, 1), FitConfig(checkpoint_activations=True))


@pytest.mark.slow
def test_a_compiled_network_has_the_same_names_and_gradients() -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
    compiled = copy.deepcopy(plain)
    prepare_network(compiled, FitConfig(compile=True))
    assert compiled._compiled_call_impl is not None
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for network in (plain, compiled):
        network(torch.ones(3, 4)).sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_figures_are_of_the_weights_that_are_kept() -> None:
    entries = [{"step": s, **f} for s in (2, 4) for f in ({"loss": s + 0.5}, {"val_r1": float(s)})]
    for kept, expected in ((2, {"val_r1": 2.0}), (4, {"val_r1": 4.0}), (None, {"val_r1": 4.0})):
        assert kept_figures(entries, Trained({}, {}, 4, "float32", kept)) == expected
    assert kept_figures(entries[:1], Trained({}, {}, 2, "float32", 2)) == {"loss": 2.5}


def test_a_finished_result_is_taken_only_for_its_own_settings(features: str, tmp_path: Path) -> None:
    config = CaptionConfig.parse(settings(features) | {"out": str(tmp_path)})
    assert up_to_date(config, "a") is None
    storage.write_json(f"{tmp_path}/caption.json", {"digest": "a", "steps": 3})
    assert up_to_date(config, "a") == {"digest": "a", "steps": 3}
    with pytest.raises(UserError, match=r"caption\.json: was made with other settings or data; give another --out"):
        up_to_date(config, "b")
    storage.write_json(f"{tmp_path}/caption.json", {"steps": 3})
    with pytest.raises(UserError, match="was made with other settings"):
        up_to_date(config, "a")
