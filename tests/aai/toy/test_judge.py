"""The judge learns from drawn scenes, and saves and loads; the committed judge is graded in the evaluation."""

from pathlib import Path

import numpy as np
import torch

from aai.toy.draw import draw_scene
from aai.toy.grammar import random_scene
from aai.toy.judge import ToyJudge


def test_the_committed_judge_reads_fresh_pictures() -> None:
    rng = np.random.default_rng(12345)
    scenes = [random_scene(rng) for _ in range(200)]
    read = ToyJudge.load().read([draw_scene(scene, 128, time_s=float(rng.random())) for scene in scenes])
    for attribute, truth in (
        ("object", [scene.obj for scene in scenes]),
        ("ambience", [scene.ambience for scene in scenes]),
        ("medium", [scene.medium for scene in scenes]),
    ):
        assert np.mean([r[attribute] == t for r, t in zip(read, truth, strict=True)]) >= 0.98, attribute
    sizes = [float(r["size"]) for r in read]
    assert np.corrcoef(sizes, [scene.size for scene in scenes])[0, 1] > 0.95


def test_saved_weights_read_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    judge = ToyJudge().eval()
    judge.save(tmp_path / "judge.safetensors")
    pictures = [draw_scene(random_scene(np.random.default_rng(i))) for i in range(4)]
    again = ToyJudge.load(tmp_path / "judge.safetensors").read(pictures)
    for a, b in zip(judge.read(pictures), again, strict=True):
        assert abs(float(a["size"]) - float(b["size"])) < 1e-2
