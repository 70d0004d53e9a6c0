"""The adapter and its losses on small random foundation models."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter, denoising_loss, prompt_of
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_clip, load_diffusion
from aai.inject import Injector
from tests.ranks import on_ranks
from tests.tiny import write_clip, write_diffusion

CAPTIONS = ("a sketch of a small bell at night", "a clock", "a photo of a big dog in the rain", "a clock")


class Echo(nn.Module):
    """A stand-in for the UNet: predicts its own input, and keeps what it was called with."""

    def forward(self, noisy: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor) -> SimpleNamespace:
        self.noisy, self.timesteps, self.states = noisy, timesteps, encoder_hidden_states
        return SimpleNamespace(sample=noisy)


def make_task(spec: FoundationSpec, pipe: StableDiffusionPipeline, cfg: AdaptLossConfig) -> AdaptTask:
    torch.manual_seed(0)
    shape = AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32)
    adapter = AudioAdapter(shape, Injector(pipe.text_encoder, pipe.tokenizer).median_norm)
    clip, _, _ = load_clip(spec)
    return AdaptTask(adapter, pipe, clip.text_projection, cfg)


def make_batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "aligned": torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=-1),
        "latents": torch.randn(4, 8, 8, 8, generator=generator),
        "image_features": torch.nn.functional.normalize(torch.randn(4, 2, 32, generator=generator), dim=-1),
        "caption": list(CAPTIONS),
        "clip_hash": torch.tensor([1, 2, 3, 2]),  # the second and the last are copies of one clip
    }


def test_only_the_adapter_learns_and_its_losses_fall(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    task = make_task(spec, pipe, AdaptLossConfig(denoise_rows=1))
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("adapter.") for name in trained)
    frozen = {k: v.clone() for k, v in task.state_dict().items() if not k.startswith("adapter.")}
    optimizer = torch.optim.Adam(task.adapter.parameters(), lr=2e-2)
    losses = []
    for _ in range(6):
        torch.manual_seed(1)
        loss, terms = task.train()(make_batch())
        assert set(terms) == {"denoise", "clip", "hidden", "norm"}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(terms["hidden"] + terms["clip"]))
    assert losses[-1] < 0.9 * losses[0]
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


def test_denoising_loss_by_hand() -> None:
    """alpha = 1/4: the input is x / 2 + e sqrt(3) / 2, the velocity e / 2 - x sqrt(3) / 2."""
    latents = torch.tensor([2.0, 4.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    noise = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    half = 0.75**0.5
    inputs = torch.tensor([1 + half, 2 - half])
    targets = {
        "epsilon": torch.tensor([1.0, -1.0]),
        "v_prediction": torch.tensor([0.5 - 2 * half, -0.5 - 4 * half]),
    }
    for kind, target in targets.items():
        scheduler = DDPMScheduler(num_train_timesteps=2, trained_betas=[0.5, 0.5], prediction_type=kind)
        unet, states = Echo(), torch.ones(2, 3, 4)
        loss = denoising_loss(unet, scheduler, latents, states, torch.tensor([1, 1]), noise)
        torch.testing.assert_close(unet.noisy[:, 0, 0, 0], inputs)
        torch.testing.assert_close(loss, (inputs - target).square())
        assert unet.states is states


def noise_levels(task: AdaptTask, batch: dict[str, Any], rows: int) -> Tensor:
    """The levels drawn for so many rows, with an echo in the UNet's place."""
    task.unet = Echo()
    task({**batch, "latents": batch["latents"][:1].expand(rows, -1, -1, -1)})
    return task.unet.timesteps


def test_noise_levels_cover_the_whole_schedule_and_are_drawn_anew(
    spec: FoundationSpec, pipe: StableDiffusionPipeline
) -> None:
    task, batch = make_task(spec, pipe, AdaptLossConfig(w_clip=0, w_hidden=0, w_norm=0)), make_batch()
    torch.manual_seed(0)
    levels = noise_levels(task, batch, 400)
    noisy = task.unet.noisy
    assert levels.shape == (400,)
    assert (levels.float().histc(10, 0, 1000) > 20).all()
    assert not torch.equal(noise_levels(task, batch, 400), levels)
    assert (task.unet.noisy - noisy).std() > 0.01
    task.scheduler = DDPMScheduler(num_train_timesteps=3)
    assert set(noise_levels(task, batch, 60).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_chunks_have_the_loss_and_gradients_of_the_whole(
    spec: FoundationSpec, pipe: StableDiffusionPipeline, chunk_size: int
) -> None:
    found = []
    for size in (0, chunk_size):
        task = make_task(spec, pipe, AdaptLossConfig())
        task.chunk_size = size
        seen: list[int] = []
        noting = task.unet.register_forward_pre_hook(lambda _, rows, seen=seen: seen.append(len(rows[0])))
        torch.manual_seed(3)
        loss, _ = task.train()(make_batch())
        loss.backward()
        noting.remove()  # the UNet is that of other tests, too
        assert max(seen) == (size or 4)
        found.append([loss.detach(), *(p.grad for p in task.adapter.parameters())])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_denoise_rows_are_the_first_clips_with_their_own_prompts(
    spec: FoundationSpec, pipe: StableDiffusionPipeline
) -> None:
    task = make_task(spec, pipe, AdaptLossConfig(w_clip=0, w_hidden=0, w_norm=0, denoise_rows=2))
    task.unet, task.scheduler = Echo(), DDPMScheduler(num_train_timesteps=2, trained_betas=[1e-6, 1e-6])
    batch = make_batch()
    task({**batch, "latents": batch["latents"].half()})
    tokens = task.adapter(batch["aligned"])
    prompts = ["a sketch of <sound>", "a photo of <sound>"]
    torch.testing.assert_close(task.unet.states, task.injector.encode(prompts, tokens[:2])[0])
    torch.testing.assert_close(task.unet.noisy, batch["latents"][:2], atol=0.02, rtol=0)
    task.cfg = AdaptLossConfig()
    task(batch)
    assert len(task.unet.noisy) == 4


def test_every_term_by_hand(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    cfg = AdaptLossConfig(w_denoise=0.25, w_clip=3.0, w_contrast=1.5, w_hidden=0.5, w_norm=2.0)
    task, batch = make_task(spec, pipe, cfg), make_batch()
    torch.manual_seed(3)
    loss, terms = task(batch)
    tokens = task.adapter(batch["aligned"])
    prompts = ["a sketch of <sound>", "a photo of <sound>", "a photo of <sound>", "a photo of <sound>"]
    states, pooled = task.injector.encode(prompts, tokens)
    target = batch["image_features"].mean(1)
    cosine = (task.text_projection(pooled) * target).sum(-1)
    cosine = cosine / task.text_projection(pooled).norm(dim=-1) / target.norm(dim=-1)
    whole_captions = [CAPTIONS[0], "a photo of a clock", CAPTIONS[2], "a photo of a clock"]
    want, want_pooled = task.injector.encode(whole_captions)
    tail = states.shape[1] // 2
    median = float(pipe.text_encoder.get_input_embeddings().weight.norm(dim=-1).median())
    each = F.normalize(task.text_projection(pooled), dim=-1) @ F.normalize(target, dim=-1).T / 0.05
    own = torch.arange(4)
    each[1, 3] = each[3, 1] = float("-inf")
    expected = {
        "clip": 1 - cosine.mean(),
        "contrast": (F.cross_entropy(each, own) + F.cross_entropy(each.T, own)) / 2,
        "hidden": (states - want)[:, tail:].square().mean() + (pooled - want_pooled).square().mean(),
        "norm": (tokens.norm(dim=-1) / median - 1).square().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value.detach())
    torch.manual_seed(3)
    timesteps, noise = torch.randint(0, 1000, (4,)), torch.randn(4, 8, 8, 8)
    denoise = denoising_loss(pipe.unet, pipe.scheduler, batch["latents"], states, timesteps, noise).mean()
    torch.testing.assert_close(terms["denoise"], denoise.detach())
    whole = (
        0.25 * denoise
        + 3 * expected["clip"]
        + 1.5 * expected["contrast"]
        + 0.5 * expected["hidden"]
        + 2 * expected["norm"]
    )
    torch.testing.assert_close(loss, whole)
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())


class Told:
    """In the injector's place: states [T, 6, 4] of its texts, all with the text's number."""

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        values = torch.tensor([float(text) for text in texts])
        return values[:, None, None].expand(-1, 6, 4), values[:, None].expand(-1, 4)


SHARES = [3, 1]


def _rank(rank: int, folder: str) -> None:
    """One of two processes with unequal shares; `folder` holds the foundation."""
    spec = FoundationSpec(clip=f"{folder}/clip", diffusion=f"{folder}/diffusion")
    task = make_task(spec, load_diffusion(spec), STILL)
    part = {n: x.split(SHARES)[rank] for n, x in make_batch().items() if isinstance(x, Tensor)}
    part["caption"] = list(CAPTIONS[:3] if rank == 0 else CAPTIONS[3:])
    if rank == 0:
        task.terms(part)  # as in validation: the other process does not come along
    wrapped = nn.parallel.DistributedDataParallel(task)
    loss, terms = wrapped(part)
    loss.backward()
    gradients = {name: p.grad for name, p in task.adapter.named_parameters()}
    torch.save({**terms, **gradients}, f"{folder}/{rank}.pt")


STILL = AdaptLossConfig(w_denoise=0, w_norm=2.0, w_contrast=0.7)
"""Nothing is drawn at random: what is drawn differs between processes."""


@pytest.mark.slow
def test_processes_with_unequal_shares_have_the_terms_and_gradients_of_one(tmp_path: Path) -> None:
    spec = FoundationSpec(clip=f"{tmp_path}/clip", diffusion=f"{tmp_path}/diffusion")
    write_diffusion(tmp_path / "diffusion", write_clip(tmp_path / "clip"))
    task = make_task(spec, load_diffusion(spec), STILL)
    loss, expected = task(make_batch())
    loss.backward()
    expected |= {name: p.grad for name, p in task.adapter.named_parameters()}
    on_ranks(2, _rank, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_denoised_clips_are_of_the_whole_step(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    """Two of four clips, of which this process holds half."""
    task = make_task(spec, pipe, AdaptLossConfig(denoise_rows=2))
    task.unet = Echo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aai.adapt.rows_of_ranks", lambda rows, device: [4, 4])
        loss, terms = task(make_batch())
        assert len(task.unet.noisy) == 1
        torch.testing.assert_close(loss.detach(), task.total(terms))
    task(make_batch())
    assert len(task.unet.noisy) == 2
    task.terms(make_batch())
    assert len(task.unet.noisy) == 4


def test_hidden_states_count_from_the_middle_of_the_context(
    spec: FoundationSpec, pipe: StableDiffusionPipeline
) -> None:
    task = make_task(spec, pipe, AdaptLossConfig())
    task.injector = Told()
    captions = ["3", "1", "3"]
    states = torch.tensor([3.0, 1.0, 3.0])[:, None, None].repeat(1, 6, 4)
    pooled = states[:, 0].clone()
    assert task._hidden_distance(states, pooled, captions) == 0
    states[:, :3] += 5  # positions 0, 1 and 2 of 6
    assert task._hidden_distance(states, pooled, captions) == 0
    states[0, 3] += 2
    assert task._hidden_distance(states, pooled, captions) == pytest.approx(4 / 9)
    assert task._hidden_distance(states, pooled + 1, captions) == pytest.approx(1 + 4 / 9)


def test_without_a_projection_there_is_no_clip_term(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    whole = make_task(spec, pipe, AdaptLossConfig())
    task = AdaptTask(whole.adapter, pipe, None, AdaptLossConfig(w_denoise=0))
    assert set(task(make_batch())[1]) == {"hidden", "norm"}
    with pytest.raises(UserError, match=r"loss\.w_clip=0\.5: and loss\.w_contrast are the only losses, and"):
        AdaptTask(whole.adapter, pipe, None, AdaptLossConfig(w_denoise=0, w_hidden=0))


def test_only_the_adapter_enters_training_mode(spec: FoundationSpec, pipe: StableDiffusionPipeline) -> None:
    task = make_task(spec, pipe, AdaptLossConfig())
    for mode in (True, False):
        task.train(mode)
        training = {name for name, module in task.named_modules() if module.training}
        assert all(name.split(".")[0] == "adapter" for name in training)
        assert ("adapter" in training) is mode
    assert task.train().adapter.training


def test_the_adapter_scales_and_cuts_into_tokens() -> None:
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=8, embed_dim=6, token_dim=3), 0.5)
    assert [type(part).__name__ for part in adapter.net] == [
        *["Linear", "GELU", "LayerNorm"] * 2,
        "Linear",
    ]
    adapter.net = nn.Identity()
    embed = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapter(embed), 0.5 * 6**0.5 * embed.view(5, 2, 3))
    plain = AudioAdapter(AdapterConfig(hidden_size=8, embed_dim=6, token_dim=6))
    plain.net = nn.Identity()
    torch.testing.assert_close(plain(embed), 6**0.5 * embed[:, None])


def test_each_word_attends_to_the_parts_of_a_sound_for_itself() -> None:
    torch.manual_seed(0)
    adapter = AudioAdapter(AdapterConfig(num_tokens=3, parts=4, hidden_size=16, embed_dim=6, token_dim=5), 0.5)
    rows = F.normalize(torch.randn(2, 5, 6), dim=-1)
    tokens = adapter(rows)
    assert tokens.shape == (2, 3, 5)
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(0.5, rel=0.5)
    assert (tokens[0, 0] - tokens[0, 1]).abs().max() > 1e-3
    torch.testing.assert_close(adapter(rows[1:])[0], tokens[1])
    for part in range(5):  # of the whole, and of each part
        changed = rows.clone()
        changed[0, part] = -changed[0, part]
        assert (adapter(changed)[0] - tokens[0]).abs().max() > 1e-4
    tokens.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    with pytest.raises(ValueError, match="multiple of 4"):
        AdapterConfig(parts=2, hidden_size=10)


def test_bounds_and_defaults_of_the_settings() -> None:
    """Defaults are part of every result: another one is another experiment."""
    sizes = {"num_tokens": 1, "parts": 0, "hidden_size": 512, "embed_dim": 128, "token_dim": 128}
    assert AdapterConfig().model_dump() == sizes
    assert AdaptLossConfig().model_dump(exclude={"head_pattern", "prompt"}) == {
        "w_denoise": 1.0,
        "denoise_rows": 0,
        "w_clip": 0.5,
        "w_contrast": 0.0,
        "contrast_temperature": 0.05,
        "w_hidden": 1.0,
        "w_norm": 0.01,
    }
    AdapterConfig(num_tokens=16, hidden_size=8, embed_dim=1, token_dim=1)
    for bad in ({"num_tokens": 0}, {"num_tokens": 17}, {"hidden_size": 7}, {"embed_dim": 0}, {"token_dim": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            AdapterConfig.parse(bad)
    for name in ("w_denoise", "denoise_rows", "w_clip", "w_contrast", "w_hidden", "w_norm"):
        with pytest.raises(UserError, match=name):
            AdaptLossConfig.parse({name: -1 if name == "denoise_rows" else -0.5})
    for only in ("w_denoise", "w_clip", "w_contrast", "w_hidden"):
        AdaptLossConfig.parse({"w_denoise": 0, "w_clip": 0, "w_hidden": 0, only: 1})


def test_tokens_start_as_long_as_an_ordinary_word(pipe: StableDiffusionPipeline) -> None:
    injector = Injector(pipe.text_encoder, pipe.tokenizer)
    torch.manual_seed(0)
    adapter = AudioAdapter(AdapterConfig(num_tokens=3, embed_dim=32, token_dim=32), injector.median_norm)
    tokens = adapter(torch.nn.functional.normalize(torch.randn(64, 32), dim=-1))
    assert tokens.shape == (64, 3, 32)
    assert tokens.norm(dim=-1).mean().item() == pytest.approx(injector.median_norm, rel=0.1)
    last = adapter.net[-1]
    assert last.weight.std().item() == pytest.approx((512 * 32) ** -0.5, rel=0.05)
    assert (last.bias == 0).all()


def test_what_cannot_be_heard_stays_text() -> None:
    cfg = AdaptLossConfig()
    assert prompt_of("a sketch of a small bell at night", cfg) == "a sketch of <sound>"
    assert prompt_of("dog barking", cfg) == "a photo of <sound>"


def test_foundation_errors_name_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip_revision"):
        load_clip(FoundationSpec(clip="openai/clip-vit-large-patch14"))
    with pytest.raises(UserError, match=r"foundation\.diffusion"):
        load_diffusion(FoundationSpec(diffusion=str(tmp_path)))
