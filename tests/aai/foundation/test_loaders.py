"""Frozen models come from whole folders of safetensors, or not at all; never out of a pickle."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_clip, load_diffusion, load_vae


@pytest.fixture
def copied(spec: FoundationSpec, tmp_path: Path) -> FoundationSpec:
    """Folders that a test may spoil."""
    shutil.copytree(spec.clip, tmp_path / "clip")
    shutil.copytree(spec.diffusion, tmp_path / "diffusion")
    return FoundationSpec(clip=str(tmp_path / "clip"), diffusion=str(tmp_path / "diffusion"))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


LOADERS: dict[str, tuple[Callable[[FoundationSpec], Any], str, str]] = {
    "clip": (load_clip, "clip", "model.safetensors"),
    "diffusion": (load_diffusion, "diffusion", "unet/diffusion_pytorch_model.safetensors"),
    "vae": (load_vae, "diffusion", "vae/diffusion_pytorch_model.safetensors"),
}
PICKLES = {
    "clip": "pytorch_model.bin",
    "diffusion": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_pickle_in_place_of_the_weights_is_refused_unopened(
    name: str, copied: FoundationSpec, tmp_path: Path
) -> None:
    load, folder, weights = LOADERS[name]
    file = tmp_path / folder / weights
    file.unlink()
    torch.save(Bomb(tmp_path / "exploded"), file.with_name(PICKLES[name]))
    with pytest.raises(UserError, match=rf"^foundation\.{folder}=.*cannot be loaded \(.*; give a folder") as caught:
        load(copied)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("gone", ["tokenizer", "processor", "config.json"])
def test_a_folder_with_something_missing_is_named(gone: str, copied: FoundationSpec, tmp_path: Path) -> None:
    for file in (tmp_path / "clip").iterdir():
        if gone in file.name:
            file.unlink()
    with pytest.raises(UserError, match=rf"^foundation\.clip={tmp_path}/clip: cannot be loaded"):
        load_clip(copied)


def test_a_pipeline_without_the_words_of_its_tokenizer_is_named(copied: FoundationSpec, tmp_path: Path) -> None:
    (tmp_path / "diffusion/tokenizer/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"^foundation\.diffusion=.*its tokenizer knows \d+ tokens"):
        load_diffusion(copied)


def test_models_are_frozen_and_of_the_asked_type(spec: FoundationSpec) -> None:
    clip, tokenizer, processor = load_clip(spec, dtype=torch.bfloat16)
    pipe = load_diffusion(spec)
    vae, edge_px = load_vae(spec)
    for part, dtype in (
        (clip, torch.bfloat16), (pipe.unet, torch.float32), (pipe.vae, torch.float32),
        (pipe.text_encoder, torch.float32), (vae, torch.float32),
    ):  # fmt: skip
        assert not part.training
        assert {(p.requires_grad, p.dtype) for p in part.parameters()} == {(False, dtype)}
    assert pipe.safety_checker is None
    assert edge_px == 64  # 8 x 8 latents, each of 8 x 8 pixels
    assert torch.equal(vae.encoder.conv_in.weight, pipe.vae.encoder.conv_in.weight)
    assert len(tokenizer("a dog").input_ids) > 2
    assert processor.crop_size["height"] == 64
