"""Diffusion folders of the published shapes (random weights): painting, a training step, the token file."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from aai.adapt import AdapterConfig, AdaptLossConfig, AdaptTask, AudioAdapter
from aai.concepts import Vocabulary
from aai.cue import CueConfig, Examples, _tuned
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import diffusion_skeleton, load_diffusion
from aai.inject import Sound, export_textual_inversion
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.sdxl import DoubleInjector, conditions, injector_of
from tests.aai.test_painter import pixels, sound
from tests.fake_cuda import fake_cuda
from tests.tiny import write_published

KINDS = ("1.5", "2.1", "xl")
LATENTS = (4, 8, 8)
WIDTHS = {"1.5": 32, "2.1": 32, "xl": 80}


@pytest.fixture(scope="module")
def folders(spec: FoundationSpec, tmp_path_factory: pytest.TempPathFactory) -> dict[str, FoundationSpec]:
    root = tmp_path_factory.mktemp("published")
    return {
        kind: FoundationSpec(clip=spec.clip, diffusion=str(write_published(root / kind, spec.clip, kind)))
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def painters(folders: dict[str, FoundationSpec]) -> dict[str, Painter]:
    made = {}
    for kind, found in folders.items():
        torch.manual_seed(0)
        small = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, head_size=32, embed_dim=32)
        shape = AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=WIDTHS[kind])
        vocabulary = Vocabulary(objects=("a dog", "a bell", "a clock"), ambiences=("at night", "in the rain"))
        parts = AudioEncoder(small).eval(), AudioAdapter(shape, 1.0).eval()
        made[kind] = Painter(load_diffusion(found), *parts, found, vocabulary)
    return made


def plain(painter: Painter, prompt: str, seed: int, **given: Any) -> np.ndarray:
    """What diffusers alone paints."""
    pipe = painter.pipe
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(seed)
    return pixels(pipe(prompt, num_inference_steps=3, guidance_scale=3.0, generator=generator, **given).images)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_what_diffusers_alone_paints(painters: dict[str, Painter], kind: str) -> None:
    painter, request = painters[kind], PaintRequest(steps=3, seed=4, sound_strength=0)
    assert painter.injector.token_dim == WIDTHS[kind]
    silent = pixels(painter.generate(sound(1), request))
    assert silent.shape == (1, 64, 64, 3)
    assert np.array_equal(silent, plain(painter, "a photo of thing", 4))
    avoided = request.model_copy(update={"negative_prompt": "a clock"})
    expected = plain(painter, "a photo of thing", 4, negative_prompt="a clock")
    assert np.array_equal(pixels(painter.generate(sound(1), avoided)), expected)
    assert not np.array_equal(expected, silent)


@pytest.mark.parametrize("kind", KINDS)
def test_sounds_and_pictures_reach_the_picture(painters: dict[str, Painter], kind: str) -> None:
    painter, request = painters[kind], PaintRequest(steps=3, num_images=2)
    first, second = (pixels(painter.generate(sound(i), request)) for i in (1, 2))
    assert not np.array_equal(first, second)
    mixed = request.model_copy(update={"prompt": "<sound> and <sound2*0.5>"})
    assert not np.array_equal(pixels(painter.generate([sound(1), sound(2)], mixed)), first)
    alone = pixels(painter.generate(sound(1), PaintRequest(steps=3, seed=1)))
    assert np.abs(first[1] - alone[0]).max() <= 1
    white, black = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (64, 64), "black")
    for verb in (painter.edit, painter.stylize):
        little = PaintRequest(steps=10, denoise_strength=0.2)
        assert not np.array_equal(pixels(verb(sound(1), white, little)), pixels(verb(sound(1), black, little)))
        inverted = PaintRequest(steps=4, repaint="invert")
        assert not np.array_equal(pixels(verb(sound(1), white, inverted)), pixels([white]))


def test_each_encoder_of_xl_hears_its_own_half(painters: dict[str, Painter]) -> None:
    injector = painters["xl"].injector
    tokens = torch.randn(2, 80, generator=torch.Generator().manual_seed(0))
    whole = injector.embed("a photo of <sound>", {"sound": Sound(tokens)})
    assert whole.shape == (1, 33, 80)
    for part, states in ((slice(0, 32), slice(0, 32)), (slice(32, 80), slice(32, 80))):
        other = tokens.clone()
        other[:, part] *= -1
        changed = injector.embed("a photo of <sound>", {"sound": Sound(other)})
        rest = slice(32, 80) if states.start == 0 else slice(0, 32)
        assert not torch.allclose(changed[:, :-1, states], whole[:, :-1, states])
        torch.testing.assert_close(changed[:, :-1, rest], whole[:, :-1, rest])
        assert torch.equal(changed[:, -1], whole[:, -1]) == (part.start == 0)  # the pooled one is the second's


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_behind_other_words_says_what_it_learned(painters: dict[str, Painter], kind: str) -> None:
    injector = painters[kind].injector
    one = {"a": Sound(torch.randn(2, injector.token_dim, generator=torch.Generator().manual_seed(0)))}
    there, row = injector.states("a photo of the dog and <a>", one, 1.0)
    ((_, at),) = row.places
    found, learned = injector.embed("a photo of the dog and <a>", one), injector.embed("a photo of <a>", one)
    assert torch.equal(found[:, at.start : at.stop], learned[:, 4:6])
    others = [i for i in range(found.shape[1]) if i not in at]
    assert torch.equal(found[:, others], there[:, others])


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_trains_through_it(painters: dict[str, Painter], kind: str) -> None:
    pipe = load_diffusion(painters[kind].foundation)
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=WIDTHS[kind]), 1.0)
    task = AdaptTask(adapter, pipe, None, AdaptLossConfig(w_hidden=0.1), chunk_size=2)
    batch = {
        "aligned": torch.randn(3, 32),
        "image_features": torch.randn(3, 1, 32),
        "latents": torch.randn(3, 4, 8, 8),
        "caption": ["a photo of a dog", "a sketch of a bell", "a clock"],
    }
    loss, terms = task(batch)
    assert {"denoise", "hidden"} <= set(terms)
    loss.backward()
    last = adapter.get_parameter([name for name, _ in adapter.named_parameters() if "weight" in name][-1])
    assert last.grad is not None
    rows = last.grad.reshape(2, WIDTHS[kind], -1).abs().sum((0, 2))
    assert (rows > 0).all()  # every number of A*, of both encoders
    assert all(p.grad is None for name, p in task.named_parameters() if not name.startswith("adapter"))


def test_xl_trains_under_the_sizes_that_it_paints_with(painters: dict[str, Painter]) -> None:
    pipe = painters["xl"].pipe
    embeds = torch.randn(3, 33, 80)
    given = conditions(pipe.unet, embeds, 64)
    own = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), torch.float32, text_encoder_projection_dim=40)
    assert torch.equal(given["added_cond_kwargs"]["time_ids"], own.expand(3, -1))
    assert torch.equal(given["added_cond_kwargs"]["text_embeds"], embeds[:, -1, :40])
    assert conditions(painters["1.5"].pipe.unet, embeds, 64) == {"encoder_hidden_states": embeds}


def test_both_text_encoders_move_with_the_task(painters: dict[str, Painter]) -> None:
    adapter = AudioAdapter(AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=80), 1.0)
    task = AdaptTask(adapter, load_diffusion(painters["xl"].foundation), None, AdaptLossConfig()).to("meta")
    assert isinstance(task.injector, DoubleInjector)
    for encoder in (task.injector.text_encoder, task.injector.second.text_encoder):
        assert {p.device.type for p in encoder.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_it_paints_and_edits_on_a_gpu(painters: dict[str, Painter], kind: str) -> None:
    cpu, made = painters[kind], []
    with fake_cuda():
        pipe = load_diffusion(cpu.foundation, "cuda")
        parts = copy.deepcopy(cpu.aligner).to("cuda"), copy.deepcopy(cpu.adapter).to("cuda")
        for own in (cpu, Painter(pipe, *parts, cpu.foundation, cpu.vocabulary)):
            pictures = own.generate(sound(0), PaintRequest(steps=2, num_images=2))
            given = Image.new("RGB", (64, 64))
            made.append([*pictures, *own.edit(sound(0), given, PaintRequest(steps=4, repaint="invert"))])
    assert np.abs(pixels(made[0]) - pixels(made[1])).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_precision_paints_too(painters: dict[str, Painter], kind: str) -> None:
    """As on a GPU: A* comes in float32, the text encoder in bfloat16."""
    full = painters[kind]
    pipe = load_diffusion(full.foundation, dtype=torch.bfloat16)
    half = Painter(pipe, full.aligner, full.adapter, full.foundation, full.vocabulary)
    request = PaintRequest(steps=2, prompt="<sound*0.5> at night")
    told, expected = (painter.embed_request(sound(1), request)[0].float() for painter in (half, full))
    assert (told - expected).norm() < 0.05 * expected.norm()
    assert half.generate(sound(1), request)[0].size == (64, 64)
    given = Image.new("RGB", (64, 64), "white")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    few = PaintRequest(steps=4, denoise_strength=0.5, repaint="invert")
    kept = pixels(half.edit(sound(1), given, few, mask))
    assert (kept[:, :, 32:] == 255).all()
    assert kept[:, :, :32].any()
    heard = half.hear(sound(1))
    examples = Examples(torch.randn(2, *LATENTS), torch.stack([heard, half.hear(sound(2))]), ["a <sound>"] * 2)
    tuned, _, _ = _tuned(half, heard, examples, CueConfig(steps=1), 0)
    assert tuned.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_token_gives_diffusers_alone_the_same_picture(
    folders: dict[str, FoundationSpec], painters: dict[str, Painter], kind: str, tmp_path: Path
) -> None:
    painter, file = painters[kind], str(tmp_path / "a.safetensors")
    ours = pixels(painter.generate(sound(1), PaintRequest(steps=3, seed=4)))
    export_textual_inversion(painter.injector, painter.hear(sound(1)), file)
    pipe = load_diffusion(folders[kind])
    if kind == "xl":
        parts = load_file(file)
        pipe.load_textual_inversion(
            parts["clip_l"], token="<sound>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            parts["clip_g"], token="<sound>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    else:
        pipe.load_textual_inversion(file, token="<sound>")
    generator = torch.Generator().manual_seed(4)
    theirs = pipe("a photo of <sound>", num_inference_steps=3, guidance_scale=3.0, generator=generator).images
    assert np.abs(ours - pixels(theirs)).max() <= 1
    different = pipe("a photo of thing", num_inference_steps=3, guidance_scale=3.0, generator=generator).images
    assert np.abs(ours - pixels(different)).max() > 1


@pytest.mark.parametrize("kind", KINDS)
def test_its_skeleton_has_the_same_shapes(
    folders: dict[str, FoundationSpec], painters: dict[str, Painter], kind: str
) -> None:
    parts = diffusion_skeleton(folders[kind])
    assert injector_of(parts).token_dim == WIDTHS[kind]
    ours, theirs = ({k: v.shape for k, v in p.unet.state_dict().items()} for p in (parts, painters[kind].pipe))
    assert ours == theirs


def test_another_kind_of_pipeline_is_refused(folders: dict[str, FoundationSpec], tmp_path: Path) -> None:
    shutil.copytree(folders["1.5"].diffusion, tmp_path / "sd")
    index = tmp_path / "sd" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"holds a FluxPipeline; give Stable Diffusion 1.x, 2.x or XL"):
        load_diffusion(FoundationSpec(clip=folders["1.5"].clip, diffusion=str(tmp_path / "sd")))
