"""The adapter and its losses on small random foundation models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter, denoising_loss, prompt_of
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_clip, load_diffusion
from aai.inject import Injector
from tests import tiny


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> FoundationSpec:
    folder = tmp_path_factory.mktemp("tiny")
    clip = tiny.write_clip(folder / "clip")
    return FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(folder / "diffusion", clip)))


@pytest.fixture(scope="module")
def pipe(spec: FoundationSpec) -> StableDiffusionPipeline:
    return load_diffusion(spec)


def make_task(spec: FoundationSpec, pipe: StableDiffusionPipeline, cfg: AdaptLossConfig) -> AdaptTask:
    torch.manual_seed(0)
    aligner = AudioEncoder(AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32))
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32), 0.1)
    clip, _, _ = load_clip(spec)
    return AdaptTask(adapter, aligner, pipe, clip.text_projection, cfg)


def make_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    captions = ["a photo of a big dog in the rain", "a sketch of a small bell at night", "a clock", "a clock"]
    return {
        "audio": 0.1 * torch.randn(4, 32000, generator=generator),
        "latents": torch.randn(4, 8, 8, 8, generator=generator),
        "image_features": torch.nn.functional.normalize(torch.randn(4, 2, 32, generator=generator), dim=-1),
        "caption": captions,
    }


def test_only_the_adapter_learns_and_its_losses_fall(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    task = make_task(spec, pipe, AdaptLossConfig())
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("adapter.") for name in trained)
    frozen = {k: v.clone() for k, v in task.state_dict().items() if not k.startswith("adapter.")}
    optimizer = torch.optim.Adam(task.adapter.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(1)
        loss, terms = task.train()(make_batch())
        assert set(terms) == {"denoise", "clip", "hidden", "norm"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["hidden"] + terms["clip"]))
    assert losses[-1] < 0.8 * losses[0]
    after = task.state_dict()
    assert all(torch.equal(after[k], v) for k, v in frozen.items())


def test_a_weight_of_zero_leaves_its_term_out(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    _, terms = make_task(spec, pipe, AdaptLossConfig(w_denoise=0, w_norm=0))(make_batch())
    assert set(terms) == {"clip", "hidden"}
    with pytest.raises(UserError, match="nothing to learn"):
        AdaptLossConfig.parse({"w_denoise": 0, "w_clip": 0, "w_hidden": 0})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoising_loss_equals_the_schedulers_own_arithmetic(pipe: StableDiffusionPipeline, kind: str) -> None:
    scheduler = DDPMScheduler(prediction_type=kind)
    latents, noise = torch.randn(3, 8, 8, 8), torch.randn(3, 8, 8, 8)
    timesteps, states = torch.tensor([5, 400, 990]), torch.randn(3, 32, 32)
    ours = denoising_loss(pipe.unet, scheduler, latents, states, timesteps, noise)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    theirs = (pipe.unet(noisy, timesteps, encoder_hidden_states=states).sample - target).square().mean(dim=(1, 2, 3))
    assert torch.allclose(ours, theirs, rtol=1e-4)


def test_tokens_start_as_long_as_an_ordinary_word(pipe: StableDiffusionPipeline) -> None:
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    torch.manual_seed(0)
    adapter = AudioAdapter(AdapterConfig(num_tokens=3, embed_dim=32, token_dim=32), injector.median_norm)
    tokens = adapter(torch.nn.functional.normalize(torch.randn(64, 32), dim=-1))
    assert tokens.shape == (64, 3, 32)
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(injector.median_norm, rel=0.3)


def test_what_cannot_be_heard_stays_text() -> None:
    cfg = AdaptLossConfig()
    assert prompt_of("a sketch of a small bell at night", cfg) == "a sketch of <sound>"
    assert prompt_of("dog barking", cfg) == "a photo of <sound>"


def test_foundation_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip_revision"):
        load_clip(FoundationSpec(clip="openai/clip-vit-large-patch14"))
    with pytest.raises(UserError, match=r"foundation\.diffusion"):
        load_diffusion(FoundationSpec(diffusion=str(tmp_path)))
