"""Distillation into few steps, beside the library's own samplers."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline

from aai.addons import AddOns, add_to
from aai.foundation.identity import FoundationSpec
from aai.toy.recipe_clip import TrainSteps
from aai.toy.recipe_consistency import ConsistencyTask, train_consistency
from aai.toy.recipe_diffusion import build_unet, noise_scheduler
from tests.tiny import SIZES


@pytest.fixture
def task() -> ConsistencyTask:
    torch.manual_seed(0)
    return ConsistencyTask(build_unet(SIZES).eval(), torch.randn(3, 5, SIZES.hidden_size), 2.0, rank=2)


@torch.no_grad()
def test_the_named_end_is_what_the_few_step_sampler_takes_it_for(task: ConsistencyTask) -> None:
    sampler = LCMScheduler.from_config(noise_scheduler().config)
    sampler.set_timesteps(4)
    noisy, text = torch.randn(1, SIZES.latent_channels, 8, 8), task.states[1:2]
    for t in sampler.timesteps:
        v = task.unet(noisy, t, encoder_hidden_states=text).sample
        expected = sampler.step(v, t, noisy).denoised
        torch.testing.assert_close(task._end(noisy, t[None], text), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_path_is_that_of_the_guided_model_without_its_low_rank_weights(task: ConsistencyTask) -> None:
    sampler = DDIMScheduler.from_config(noise_scheduler().config, clip_sample=False)
    sampler.set_timesteps(50)
    noisy, text, t = torch.randn(1, SIZES.latent_channels, 8, 8), task.states[1:2], torch.tensor([499])
    plain = build_unet(SIZES).eval()
    own = {name.replace(".base_layer", ""): weight for name, weight in task.unet.state_dict().items()}
    plain.load_state_dict({name: weight for name, weight in own.items() if "lora_" not in name})
    for name, weight in task.unet.named_parameters():
        if "lora_B" in name:
            weight.fill_(0.5)
    empty, named = (plain(noisy, t, encoder_hidden_states=states).sample for states in (task.states[:1], text))
    expected = sampler.step(empty + 2.0 * (named - empty), 499, noisy).prev_sample
    torch.testing.assert_close(task._solved(noisy, t, t - 20, text), expected, atol=1e-4, rtol=1e-4)


def test_the_loss_holds_the_named_end_against_that_of_the_point_before(task: ConsistencyTask) -> None:
    for name, weight in task.unet.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    z, text = torch.randn(2, SIZES.latent_channels, 8, 8), task.states[[1, 2]]
    torch.manual_seed(5)
    loss, _ = task({"latents": z, "text": torch.tensor([1, 2])})
    torch.manual_seed(5)
    t = torch.randint(1, 51, (2,)) * 20 - 1
    alpha = task.alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * z + (1 - alpha).sqrt() * torch.randn_like(z)
    before = (t - 20).clamp(min=0)
    with torch.no_grad():
        wanted = task._end(task._solved(noisy, t, before, text), before, text)
        error = (task._end(noisy, t, text) - wanted).square().sum((1, 2, 3))
    scale = 1e-3 * 512**0.5
    assert loss.item() == pytest.approx((((error + scale**2).sqrt() - scale).mean() / 512**0.5).item(), rel=1e-4)
    assert loss.requires_grad


def test_only_low_rank_weights_learn(task: ConsistencyTask) -> None:
    loss, _ = task({"latents": torch.randn(2, SIZES.latent_channels, 8, 8), "text": torch.tensor([1, 2])})
    loss.backward()
    learning = {name for name, p in task.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert learning
    assert all("lora_" in name for name in learning)


def test_its_file_is_loaded_like_any_lora(tmp_path: Path, spec: FoundationSpec) -> None:
    pixels = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    sizes = SIZES.model_copy(update={"lcm": TrainSteps(steps=3, batch_size=2, learning_rate=1e-2), "lcm_rank": 2})
    train_consistency(sizes, pixels, ["a dog", "a bell", "", "a dog"], Path(spec.diffusion), tmp_path)
    assert (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size < 1_000_000
    pipe = StableDiffusionPipeline.from_pretrained(spec.diffusion, torch_dtype=torch.float32, safety_checker=None)
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    add_to(pipe, AddOns(lora=str(tmp_path), scheduler="lcm"), spec)
    changed = [name for name, weight in pipe.unet.state_dict().items() if not torch.equal(weight, before[name])]
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert any("attn2.to_k" in name for name in changed)
    assert any("conv_in" in name for name in changed)
