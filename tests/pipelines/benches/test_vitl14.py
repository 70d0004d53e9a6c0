import json
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig

from pipelines.__main__ import main
from pipelines.benches import vitl14


def test_the_bench_runs_from_jpeg_to_features_on_any_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["model.size=tiny", "model.images=2", "model.batch_size=1", "model.threads=2", f"out={tmp_path}"]
    assert main(["bench", "vitl14", *[word for setting in sets for word in ("--set", setting)]]) == 0
    result = json.loads((tmp_path / "vitl14.json").read_text())
    figures, ratios = result["figures"], result["ratios"]
    for name in ("forward", "framing", "framing_and_forward", "jpeg_to_features"):
        assert figures[f"{name}_images_per_s"] > 0
    assert figures["matmul_tflops"] > 0
    assert ratios["forward/matmul"] > 0
    assert result["inputs"]["images"] == 2
    assert "x matmul" in capsys.readouterr().out


def test_operations_of_vitl14_by_formula() -> None:
    """The paper's appendix and others count about 81 giga multiply-adds, 162 GFLOP, for ViT-L/14 at 224 px."""
    vision = CLIPVisionConfig(**vitl14._TOWERS["vitl14"]["vision"])
    assert vitl14.vision_flops(vision, 768) == pytest.approx(162e9, rel=0.01)
