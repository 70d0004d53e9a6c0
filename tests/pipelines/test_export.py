"""`aai export`: files that diffusers alone paints with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aai.foundation.identity import FoundationSpec
from aai.foundation.loaders import load_diffusion
from aai.media.waveform import write_wav
from aai.painter import Painter
from pipelines.__main__ import main


def test_diffusers_alone_paints_the_same_picture(
    tone: str, tiny_bundle: str, spec: FoundationSpec, tmp_path: Path
) -> None:
    words = ["--audio", tone, "--bundle", tiny_bundle]
    assert main(["export", *words, "--out", str(tmp_path / "tokens")]) == 0
    file = tmp_path / "tokens" / "sound.safetensors"
    made = file.read_bytes()
    assert main(["export", *words, "--out", str(tmp_path / "tokens")]) == 0, "the same again"
    assert file.read_bytes() == made
    sets = ["--set", "request.steps=2", "--set", "request.seed=4"]
    assert main(["generate", *words, *sets, "--out", str(tmp_path / "out")]) == 0
    ours = np.asarray(Image.open(next((tmp_path / "out").glob("*.png"))), np.int16)
    pipe = load_diffusion(Painter.load(tiny_bundle).foundation)
    pipe.load_textual_inversion(str(file), token="<sound>")
    generator = torch.Generator().manual_seed(4)
    theirs = pipe("a photo of <sound>", num_inference_steps=2, guidance_scale=3.0, generator=generator).images[0]
    assert np.abs(ours - np.asarray(theirs, np.int16)).max() <= 1


def test_each_sound_has_a_file_and_no_file_is_lost(
    tone: str, tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "tokens")
    words = ["export", "--bundle", tiny_bundle, "--out", out]
    assert main([*words, "--audio", f"dog={tone}", "--audio", f"rain={tone}"]) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()}
    assert files.keys() == {"dog.safetensors", "rain.safetensors"}
    other = str(tmp_path / "other.wav")
    write_wav(other, 0.1 * np.sin(np.arange(16_000) ** 1.3 / 900).astype(np.float32), 16_000)
    assert main([*words, "--audio", f"bell={tone}", "--audio", f"dog={other}"]) == 2
    assert "dog.safetensors: holds the word of another sound" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").iterdir()} == files, "and nothing is written"
    assert main(words) == 2
    assert "this command needs a file for audio" in capsys.readouterr().err.splitlines()[-1]
