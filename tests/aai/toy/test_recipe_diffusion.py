"""The small diffusion model's parts, losses and folder; nothing is trained."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from aai.foundation.identity import FoundationSpec
from aai.toy.recipe_clip import to_unit
from aai.toy.recipe_diffusion import (
    UnetTask,
    build_unet,
    build_vae,
    encode_captions,
    encode_latents,
    noise_scheduler,
    reconstruction_loss,
)
from tests.tiny import SIZES


def test_latents_are_posterior_means_whatever_the_batch() -> None:
    torch.manual_seed(0)
    vae = build_vae(SIZES).eval()
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    latents = encode_latents(vae, pixels, batch_size=2)
    assert latents.shape == (3, SIZES.latent_channels, 8, 8)
    expected = vae.encode(to_unit(pixels[2:])).latent_dist.mode()
    torch.testing.assert_close(latents[2:], expected, atol=1e-5, rtol=0)
    assert not latents.requires_grad
    assert vae.decode(latents).sample.shape == (3, 3, 64, 64)


class Seen(torch.nn.Module):
    """In a UNet's place: keeps what it is given and predicts nothing."""

    def forward(self, noisy: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        self.noisy, self.t, self.states = noisy, t, encoder_hidden_states
        return SimpleNamespace(sample=torch.zeros_like(noisy))


def test_the_unet_gets_as_much_noise_as_its_timestep_says() -> None:
    torch.manual_seed(0)
    unet = Seen()
    task = UnetTask(unet, torch.zeros(1, 3, 4))  # type: ignore[arg-type]
    z = torch.ones(512, 1, 8, 8)
    task({"latents": z, "text": torch.zeros(512, dtype=torch.long)})
    share = noise_scheduler().alphas_cumprod[unet.t].sqrt()
    torch.testing.assert_close(unet.noisy.mean(dim=(1, 2, 3)), share, atol=0.5, rtol=0)
    early, late = unet.t < 100, unet.t > 900
    assert unet.noisy[early].mean() > 0.8
    assert abs(float(unet.noisy[late].mean())) < 0.2


def test_a_tenth_of_the_captions_is_dropped() -> None:
    torch.manual_seed(0)
    unet, states = Seen(), torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])  # of no caption, and of a caption
    UnetTask(unet, states)({"latents": torch.zeros(2000, 1, 2, 2), "text": torch.ones(2000, dtype=torch.long)})  # type: ignore[arg-type]
    assert unet.states.mean() == pytest.approx(0.9, abs=0.03)


def test_the_unet_listens_to_the_text() -> None:
    torch.manual_seed(0)
    unet = build_unet(SIZES).eval()
    noisy, states = torch.randn(2, SIZES.latent_channels, 8, 8), torch.randn(2, 5, SIZES.hidden_size)
    with torch.no_grad():
        first = unet(noisy, 10, encoder_hidden_states=states).sample
        other = unet(noisy, 10, encoder_hidden_states=states.flip(0)).sample
    assert first.shape == noisy.shape
    assert (first - other).abs().max() > 1e-5


def test_captions_are_padded_as_a_pipeline_pads_them(spec: FoundationSpec) -> None:
    model = CLIPTextModel.from_pretrained(spec.clip, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(spec.clip)
    texts = ["", "a clock", "dog " * 100]
    states = encode_captions(model, tokenizer, texts)
    assert states.shape == (3, tokenizer.model_max_length, SIZES.hidden_size)
    torch.testing.assert_close(encode_captions(model, tokenizer, ["a clock"])[0], states[1], atol=1e-5, rtol=0)
    assert (states[0] - states[1]).abs().max() > 1e-3


def test_lost_strokes_cost_more_than_another_brightness() -> None:
    x = torch.zeros(1, 3, 8, 8)
    x[..., 4, :] = 1
    assert reconstruction_loss(x, x) == 0
    lighter = x + 1 / 8  # as much of L1 as the lost stroke
    gone = torch.zeros_like(x)
    assert reconstruction_loss(lighter, x).item() == pytest.approx(1 / 8 + 1 / 64)
    assert reconstruction_loss(gone, x).item() == pytest.approx(1 / 8 + 1 / 8 + 2 / 7)


def test_the_folder_is_half_precision_and_names_no_place(spec: FoundationSpec) -> None:
    folder = Path(spec.diffusion)
    assert {json.loads(f.read_text()).get("_name_or_path", "") for f in folder.glob("vae/config.json")} == {""}
    for part in ("vae", "unet"):
        weights = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float16}
    written = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert written["prediction_type"] == noise_scheduler().config.prediction_type == "v_prediction"
    assert not (folder / "safety_checker").exists()
