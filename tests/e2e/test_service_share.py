"""What the service adds to a picture that takes a second, four times the demo's (make accept)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from aai import storage
from aai.foundation.identity import FoundationSpec
from aai.toy.recipe_diffusion import build_unet, build_vae, save_pipeline
from tests.tiny import SIZES, write_bundle_of, write_clip

ROOT = Path(__file__).resolve().parents[2]
CHANNELS = (256, 384)
"""Of the UNet: a picture of 20 steps takes about a second on two cores."""


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_m3_what_the_service_adds_to_a_picture_of_a_second(tmp_path: Path) -> None:
    torch.manual_seed(1)
    clip, sizes = write_clip(tmp_path / "clip"), SIZES.model_copy(update={"unet_channels": CHANNELS})
    parts = CLIPTextModel.from_pretrained(clip, dtype=torch.float32), CLIPTokenizer.from_pretrained(clip)
    save_pipeline(tmp_path / "diffusion", build_vae(sizes).eval(), build_unet(sizes).eval(), *parts)
    spec = FoundationSpec(clip=str(clip), diffusion=str(tmp_path / "diffusion"))
    bundle = write_bundle_of(tmp_path / "bundle", spec)
    told = {
        "out": str(tmp_path / "bench"), "serve.bundle": str(bundle), "repeats": "3", "serve.cell_s": "10",
        "serve.clients": "[1]", "serve.open_shares": "[]", "serve.overload": "1",
        "overrides": '["trust.public_keys=[]"]',
    }  # fmt: skip
    words = [word for name, value in told.items() for word in ("--set", f"{name}={value}")]
    subprocess.run([sys.executable, "-m", "pipelines", "bench", "serve", *words], cwd=ROOT, check=True)
    found = storage.read_json(str(tmp_path / "bench" / "serve.json"))
    print({name: value for name, value in found.items() if "ratio" in name or name == "figures"})
    assert found["ratios"]["batch_p50/bare_p50"] <= 1.05
