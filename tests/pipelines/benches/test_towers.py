"""Steps from features and from towers: what each computes, and the ratios made of their times."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aai.fit import FitConfig
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from pipelines.benches.options import BenchConfig
from pipelines.benches.random_models import ast_encoder, build_pipeline, clip_folder
from pipelines.benches.towers import Clips, Loop, Towers, measure_towers
from tests.pipelines.benches.test_bare import Line


def config(out: Path, name: str) -> BenchConfig:
    return BenchConfig.model_validate({"name": name, "out": str(out), "repeats": 2, "model": {"size": "tiny"}})


def test_sources_take_turns_and_the_first_of_each_warms_up() -> None:
    asked: list[str] = []

    def source(name: str, delay_s: float) -> Callable[[], dict[str, Any]]:
        def make() -> dict[str, Any]:
            asked.append(name)
            time.sleep(delay_s)
            return {"x": torch.randn(4, 1), "clip_id": []}

        return make

    loop = Loop({"cached": source("cached", 0.02), "towers": source("towers", 0.2)})
    loop.run(Line(), 3)
    pair = ["cached", "towers"]
    assert asked == [*pair, *pair[::-1], *pair, *pair[::-1]]
    assert {name: len(times) for name, times in loop.seconds.items()} == {"cached": 3, "towers": 3}
    assert min(loop.seconds["towers"]) >= 0.2
    assert min(loop.seconds["cached"]) >= 0.02


def test_a_ratio_is_of_pairs() -> None:
    loop = Loop({"cached": dict, "towers": dict}, {"cached": [1.0, 2.0, 4.0], "towers": [3.0, 4.0, 40.0]})
    assert loop.times_slower("towers") == 3.0  # of 3, 2 and 10: not 4 / 2


def test_towers_compute_what_featurize_keeps(tmp_path: Path) -> None:
    folder = clip_folder(str(tmp_path), "tiny")
    clip = FrozenClip(FoundationSpec(clip=str(folder)))
    clips, towers = Clips.of_noise(2, 3, "tiny"), Towers(clip, "cpu", torch.float32)
    batch = towers.for_align(clips, 3)
    assert torch.allclose(batch["image_features"][1], clip.images(clips.pictures[3:]), atol=1e-5)
    assert batch["text_features"].shape == (2, 1, 768)
    assert torch.equal(towers.for_align(clips, 1)["image_features"], clip.images(clips.pictures[::3])[:, None])
    pipe, encoder = build_pipeline("tiny", folder), ast_encoder("tiny").eval()
    batch = towers.for_adapt(clips, pipe.vae.eval(), encoder)
    assert batch["latents"].shape == (2, 8, 8, 8)
    assert batch["aligned"].shape == (2, 768)
    assert not any(value.is_inference() for value in batch.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("align", ["ast_base_cached/ast_base_towers", "ast_base_cached/ast_base_towers_one_picture"]),
        ("adapt", ["cached/towers", "towers_gflop/cached_gflop"]),
    ],
)
def test_a_tiny_run_has_every_figure(tmp_path: Path, name: str, ratios: list[str]) -> None:
    found = measure_towers(config(tmp_path, name))
    assert found["ratios"].keys() >= set(ratios)
    assert all(ratio > 0 for ratio in found["ratios"].values())
    prefixes = ("ast_base_", "scratch_") if name == "align" else ("",)
    for prefix in prefixes:
        figures = {key.removeprefix(prefix): value for key, value in found["figures"].items()}
        assert figures["cached_clips_per_s"] > 0
        assert figures["towers_clips_per_s"] > 0
        assert figures["towers_gflop_per_clip"] > figures["cached_gflop_per_clip"] > 0
    assert found["inputs"]["clips_per_step_with_towers"] == {"align": 2, "adapt": 1}[name]
    assert not any("gpu" in key for key in found["figures"])


def test_the_steps_are_those_of_fit() -> None:
    """A loop changes the weights as a training does."""
    line = Line()
    before = line.linear.weight.detach().clone()
    Loop({"only": lambda: {"x": torch.ones(4, 1), "clip_id": []}}).run(line, 1)
    assert not torch.equal(before, line.linear.weight)
    assert FitConfig().precision == "auto"
