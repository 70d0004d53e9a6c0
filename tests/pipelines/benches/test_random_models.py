"""Random models have the sizes of those they stand for."""

from pathlib import Path

import pytest
import torch
from torch import nn

from aai.foundation.identity import TOY_WEIGHTS
from pipelines.benches import random_models
from pipelines.benches.random_models import adapt_task, ast_encoder, build_pipeline, clip_folder


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_sizes_are_those_of_stable_diffusion_and_ast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of the published checkpoints; the text encoder's without its vocabulary, which is the toy's."""
    scheduler = random_models.noise_scheduler()  # it computes with numbers, which meta tensors have not
    monkeypatch.setattr(random_models, "noise_scheduler", lambda: scheduler)
    with torch.device("meta"):
        pipe, encoder = build_pipeline("vitl14", TOY_WEIGHTS / "clip"), ast_encoder("vitl14")
    assert parameters(pipe.unet) == 859_520_964
    assert parameters(pipe.vae) == 83_653_863
    assert parameters(pipe.text_encoder.encoder) == 85_054_464
    assert parameters(encoder.backbone) == 86_187_264
    assert pipe.tokenizer.model_max_length == 77


def test_a_tiny_task_of_all_terms(tmp_path: Path) -> None:
    folder = clip_folder(str(tmp_path), "tiny")
    written_s = (folder / "model.safetensors").stat().st_mtime_ns
    assert clip_folder(str(tmp_path), "tiny") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written_s  # once
    task = adapt_task("tiny", build_pipeline("tiny", folder))
    batch = {
        "aligned": torch.randn(2, 768),
        "latents": torch.randn(2, 8, 8, 8),
        "image_features": torch.randn(2, 4, 768),
        "caption": ["a bell", "a dog"],
    }
    loss, terms = task(batch)
    assert set(terms) == {"denoise", "clip", "hidden", "norm"}
    assert loss.isfinite()
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in task.named_parameters() if name.startswith("adapter.")}


@pytest.mark.parametrize("samples", [16_000])
def test_a_tiny_ast_hears_a_second(samples: int) -> None:
    assert ast_encoder("tiny")(torch.randn(2, samples)).shape == (2, 768)
