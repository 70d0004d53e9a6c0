"""How near featurizing comes to the GPU's limit (pytest -m gpu tests/gpu)."""

import json
from pathlib import Path

import pytest

from pipelines.__main__ import main

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]


def test_b9_vitl14_comes_near_the_matrix_product(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert main(["bench", "vitl14", "--set", f"out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "vitl14.json").read_text())
    assert result["ratios"]["forward/matmul"] >= 0.5
    if "H200" in result["machine"]["gpu"]:
        assert result["figures"]["jpeg_to_features_images_per_s"] >= 2500
