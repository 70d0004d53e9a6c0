"""Injection: positions, strength, gradients, the portable token file."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.inject import Injector, Sound, export_textual_inversion
from tests import tiny


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    folder = tmp_path_factory.mktemp("tiny")
    clip = tiny.write_clip(folder / "clip")
    diffusion = tiny.write_diffusion(folder / "diffusion", clip)
    return load_diffusion(FoundationSpec(clip=str(clip), diffusion=str(diffusion)))


@pytest.fixture(scope="module")
def injector(pipe: StableDiffusionPipeline) -> Injector:
    return Injector(pipe.text_encoder, pipe.tokenizer)


def tokens(injector: Injector, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, injector.embedding.weight.shape[1], generator=generator)


def plain(pipe: StableDiffusionPipeline, prompt: str) -> torch.Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def test_strength_zero_is_exactly_plain_diffusion(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    silent = injector.embed("a photo of <sound> at night", {"sound": Sound(tokens(injector), 0.0)})
    assert torch.equal(silent, plain(pipe, "a photo of thing at night"))


def test_sound_changes_the_prompt_and_strength_grades_it(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    one = tokens(injector, 1)
    neutral = plain(pipe, "a photo of thing")
    distances = [
        (injector.embed("a photo of <sound>", {"sound": Sound(one, s)}) - neutral).norm() for s in (0.0, 0.5, 1.0)
    ]
    assert distances[0] == 0
    assert 0 < distances[1] < distances[2]


def test_several_sounds_each_at_its_own_strength(injector: Injector) -> None:
    a, b = tokens(injector, 1), tokens(injector, 3)
    both = {"dog": Sound(a), "rain": Sound(b)}
    full = injector.embed("a photo of <dog> in <rain>", both)
    swapped = injector.embed("a photo of <dog> in <rain>", {"dog": Sound(a), "rain": Sound(b, 0.3)})
    assert not torch.allclose(full, swapped)
    muted = injector.embed("a photo of <dog> in <rain>", {"dog": Sound(a), "rain": Sound(b, 0)})
    assert torch.equal(muted, injector.embed("a photo of <dog> in thing", {"dog": Sound(a)}))


def test_the_hook_is_gone_afterwards(pipe: StableDiffusionPipeline, injector: Injector) -> None:
    before = plain(pipe, "a photo of thing")
    injector.embed("a photo of <sound>", {"sound": Sound(tokens(injector))})
    assert torch.equal(plain(pipe, "a photo of thing"), before)


def test_batch_rows_equal_single_prompts_and_gradients_reach_the_tokens(injector: Injector) -> None:
    batch = torch.stack([tokens(injector, 2), tokens(injector, 2) * 2]).requires_grad_(True)
    states, pooled = injector.encode(["a photo of <sound>", "a sketch of <sound> at night"], batch)
    alone = injector.embed("a sketch of <sound> at night", {"sound": Sound(batch[1].detach())})
    assert torch.allclose(states[1:], alone, atol=1e-5)
    (pooled * torch.linspace(-1, 1, pooled.shape[-1])).sum().backward()
    assert batch.grad is not None
    assert batch.grad.abs().amin(dim=-1).gt(0).all()


@pytest.mark.parametrize(
    ("prompt", "rule"),
    [
        ("a photo of a dog", "no placeholder"),
        ("a photo of <sound> and <other>", "has no sound"),
        ("a photo of " + "thing " * 400 + "<sound>", "falls off"),
    ],
)
def test_bad_prompts_are_refused(injector: Injector, prompt: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        injector.embed(prompt, {"sound": Sound(tokens(injector))})


def test_exported_token_is_read_by_diffusers(pipe: StableDiffusionPipeline, injector: Injector, tmp_path: Path) -> None:
    sound = tokens(injector, 2)
    ours = injector.embed("a photo of <sound>", {"sound": Sound(sound)})
    export_textual_inversion(sound, str(tmp_path / "sound.safetensors"))
    pipe.load_textual_inversion(str(tmp_path / "sound.safetensors"), token="<sound>")
    try:
        assert torch.allclose(plain(pipe, "a photo of <sound>"), ours, atol=1e-5)
    finally:
        pipe.unload_textual_inversion()
