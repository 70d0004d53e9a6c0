"""Operations that are counted are those of the formulas."""

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from pipelines.benches.flops import Flops
from pipelines.benches.vitl14 import vision_flops


def test_a_linear_layer_forward_and_backward() -> None:
    layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
    with Flops() as counted:
        loss = layer(x).sum()
    assert counted.total == 2 * 3 * 8 * 4
    with Flops() as counted:
        loss.backward()
    assert counted.total == 2 * 3 * 8 * 4  # of the weight; x needs no gradient


@pytest.mark.parametrize("inference", [False, True])
def test_attention_with_and_without_inference_mode(inference: bool) -> None:
    x = torch.randn(2, 3, 16, 8)
    with Flops() as counted, torch.inference_mode(inference):
        F.scaled_dot_product_attention(x, x, x)
    assert counted.total == 2 * 3 * (4 * 16 * 16 * 8)


def test_attention_backward_takes_five_products() -> None:
    x = torch.randn(2, 3, 16, 8, requires_grad=True)
    out = F.scaled_dot_product_attention(x, x, x).sum()
    with Flops() as counted:
        out.backward()
    assert counted.total == 2 * 3 * (10 * 16 * 16 * 8)


def test_a_vision_tower_as_by_its_formula() -> None:
    config = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    model = CLIPVisionModelWithProjection(config)
    with Flops() as counted, torch.inference_mode():
        model(pixel_values=torch.randn(3, 3, 28, 28))
    assert counted.total == pytest.approx(3 * vision_flops(config, 16), rel=1e-6)
