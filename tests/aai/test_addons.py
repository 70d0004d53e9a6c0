"""What people load on top of a 1.5-shaped model, with A* unchanged: LoRA, ControlNet, schedulers, a safety checker."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPConfig

from aai.addons import SCHEDULERS, AddOns, absolute, add_to, blackened, with_controlnet
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.toy.recipe_clip import image_processor
from tests.aai.test_painter import pixels, sound
from tests.tiny import write_bundle_of, write_published

REQUEST = PaintRequest(steps=2, seed=3)


@pytest.fixture(scope="module")
def bundle(spec: FoundationSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle on a 1.5-shaped model."""
    root = tmp_path_factory.mktemp("addons")
    sd = write_published(root / "sd", spec.clip, "1.5")
    return write_bundle_of(root / "bundle", FoundationSpec(clip=spec.clip, diffusion=str(sd)))


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Painter:
    return Painter.load(bundle)


def painted(bundle: Path, **addons: Any) -> np.ndarray:
    return pixels(Painter.load(bundle, addons=AddOns(**addons)).generate(sound(1), REQUEST))


@pytest.fixture(scope="module")
def lora(plain: Painter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA weights of the UNet, as diffusers saves them."""
    torch.manual_seed(0)
    pipe, folder = load_diffusion(plain.foundation), tmp_path_factory.mktemp("lora")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=weights)
    return folder


def test_lora_changes_the_picture_by_its_scale(bundle: Path, plain: Painter, lora: Path) -> None:
    before = pixels(plain.generate(sound(1), REQUEST))
    full, file = painted(bundle, lora=str(lora)), painted(bundle, lora=str(lora / "pytorch_lora_weights.safetensors"))
    assert np.array_equal(full, file)
    assert not np.array_equal(full, before)
    assert np.abs(painted(bundle, lora=str(lora), lora_scale=0) - before).max() <= 1
    by_hand = load_diffusion(plain.foundation)
    by_hand.load_lora_weights(str(lora))  # diffusers' own way, unfused
    other = Painter(by_hand, plain.aligner, plain.adapter, plain.foundation, plain.vocabulary)
    assert np.abs(pixels(other.generate(sound(1), REQUEST)) - full).max() <= 1


def test_a_controlnet_guides_generation(bundle: Path, plain: Painter, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(plain.pipe.unet)
    begins_at_zero = net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out
    for block in (*net.controlnet_down_blocks, *begins_at_zero):
        torch.nn.init.normal_(block.weight, std=0.5)
    net.save_pretrained(tmp_path / "net")
    painter = Painter.load(bundle, addons=AddOns(controlnet=str(tmp_path / "net")))
    white, edges = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (40, 40))
    edges.paste((255, 255, 255), (10, 10, 30, 30))
    a, b = (pixels(painter.generate(sound(1), REQUEST, control=image)) for image in (white, edges))
    assert a.shape == (1, 64, 64, 3)
    assert not np.array_equal(a, b)
    both, words = (pixels(painter.generate([sound(1), sound(2)], REQUEST.model_copy(update=how), control=white))
                   for how in ({}, {"mixing": "words"}))  # fmt: skip
    assert not np.array_equal(both, words)
    off = AddOns(controlnet=str(tmp_path / "net"), controlnet_scale=0)
    unguided = pixels(Painter.load(bundle, addons=off).generate(sound(1), REQUEST, control=white))
    assert np.abs(unguided - pixels(plain.generate(sound(1), REQUEST))).max() <= 1
    with pytest.raises(UserError, match=r"control=\(missing\): the ControlNet needs the picture"):
        painter.generate(sound(1), REQUEST)
    with pytest.raises(UserError, match="no ControlNet is loaded"):
        plain.generate(sound(1), REQUEST, control=white)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_schedulers_paint(bundle: Path, plain: Painter, name: str) -> None:
    painter = Painter.load(bundle, addons=AddOns(scheduler=name))
    assert type(painter.pipe.scheduler).__name__ == SCHEDULERS[name]
    first = pixels(painter.generate(sound(1), REQUEST))
    assert np.array_equal(first, pixels(painter.generate(sound(1), REQUEST)))
    assert not np.array_equal(first, pixels(plain.generate(sound(1), REQUEST)))
    painter.edit(sound(1), Image.new("RGB", (64, 64)), PaintRequest(steps=4))


def write_checker(folder: Path, processor: Path) -> None:
    """A safety checker that takes everything for unfit."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 64, "patch_size": 32}, projection_dim=16
    )
    checker = StableDiffusionSafetyChecker(config)
    checker.concept_embeds_weights.data.fill_(-3.0)  # every cosine is above
    checker.save_pretrained(folder)
    image_processor(64).save_pretrained(processor)


def test_a_safety_checker_is_off_only_by_choice(bundle: Path, plain: Painter, tmp_path: Path) -> None:
    before = pixels(plain.generate(sound(1), REQUEST))
    assert before.any()
    write_checker(tmp_path / "checker", tmp_path / "checker")
    assert not painted(bundle, safety_checker=str(tmp_path / "checker")).any()
    # One in the model's own folder is used without being asked for.
    spec = FoundationSpec(clip=plain.foundation.clip, diffusion=str(tmp_path / "sd"))
    write_published(tmp_path / "sd", spec.clip, "1.5")
    write_checker(tmp_path / "sd" / "safety_checker", tmp_path / "sd" / "feature_extractor")
    own = write_bundle_of(tmp_path / "bundle", spec)
    assert not painted(own).any()
    stopping = Painter.load(own)
    black, shown = stopping.generate(sound(1), REQUEST)[0], Image.new("RGB", (2, 2), (0, 0, 1))
    assert [blackened(stopping.pipe, black), blackened(stopping.pipe, shown)] == [True, False]
    assert not blackened(plain.pipe, black), "nothing stops there"
    given = Image.new("RGB", (64, 64), "white")
    assert not pixels(Painter.load(own).edit(sound(1), given, PaintRequest(steps=4))).any()
    inverted = PaintRequest(steps=4, repaint="invert")
    assert not pixels(Painter.load(own).edit(sound(1), given, inverted)).any()
    assert painted(own, safety_checker="off").any()


def test_a_model_without_a_place_for_a_checker_says_so(spec: FoundationSpec, tmp_path: Path) -> None:
    found = FoundationSpec(clip=spec.clip, diffusion=str(write_published(tmp_path / "xl", spec.clip, "xl")))
    pipe = load_diffusion(found)
    add_to(pipe, AddOns(), found)
    with pytest.raises(UserError, match="a StableDiffusionXLPipeline has no place for a safety checker; set it to off"):
        add_to(pipe, AddOns(safety_checker=str(tmp_path)), found)


def test_a_controlnet_of_another_model_is_refused(spec: FoundationSpec, plain: Painter, tmp_path: Path) -> None:
    xl = FoundationSpec(clip=spec.clip, diffusion=str(write_published(tmp_path / "xl", spec.clip, "xl")))
    ControlNetModel.from_unet(load_diffusion(xl).unet).save_pretrained(tmp_path / "net")
    with pytest.raises(UserError, match="is for another model: its cross_attention_dim is 80, the model's 32"):
        with_controlnet(plain.pipe, AddOns(controlnet=str(tmp_path / "net")))


def test_damaged_weights_are_named(bundle: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"damaged")
    write_checker(tmp_path / "checker", tmp_path / "checker")
    (tmp_path / "checker" / "model.safetensors").write_bytes(b"damaged")
    for name, place in (("lora", tmp_path), ("safety_checker", tmp_path / "checker")):
        with pytest.raises(UserError, match=f"addons.{name}=.*: cannot be used"):
            Painter.load(bundle, addons=AddOns(**{name: str(place)}))


def test_more_steps_than_a_distilled_models_scheduler_takes(bundle: Path) -> None:
    painter = Painter.load(bundle, addons=AddOns(scheduler="lcm"))
    with pytest.raises(UserError, match=r"steps=51: addons\.scheduler=lcm takes at most 50"):
        painter.generate(sound(1), PaintRequest(steps=51))


def test_paths_hold_in_any_folder() -> None:
    moved = absolute(AddOns(lora="a/b.safetensors", safety_checker="off"))
    assert (moved.lora, moved.safety_checker) == (str(Path("a/b.safetensors").absolute()), "off")


@pytest.mark.parametrize("name", ["lora", "controlnet", "safety_checker"])
def test_what_is_not_there_or_of_another_model_is_named(bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"addons.{name}=absent: does not exist"):
        Painter.load(bundle, addons=AddOns(**{name: "absent"}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"addons.{name}=.*: cannot be used"):
        Painter.load(bundle, addons=AddOns(**{name: str(tmp_path)}))
