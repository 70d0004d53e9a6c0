"""`aai edit` on a bundle of random weights: A sound's object put into a picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.__main__ import main

QUICK = ["--set", "request.steps=2", "--set", "request.denoise_strength=1"]


def paint(verb: str, tone: str, bundle: str, folder: Path) -> Image.Image:
    """What a verb makes of a red picture."""
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    words = ["--audio", tone, "--image", str(folder / "red.png"), "--bundle", bundle, "--out", str(folder / "out")]
    assert main([verb, *words, *QUICK]) == 0
    return Image.open(folder / "out" / f"{verb}_tone_seed0.png")


def test_the_picture_is_of_this_verb(tone: str, tiny_bundle: str, tmp_path: Path) -> None:
    painted = paint("edit", tone, tiny_bundle, tmp_path)
    assert painted.size == (64, 64)
    assert '"verb": "edit"' in painted.info["aai"]
    other = paint("stylize", tone, tiny_bundle, tmp_path)
    assert (np.asarray(painted) != np.asarray(other)).any()


def test_it_needs_a_picture(tone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edit", "--audio", tone, "--bundle", "absent", "--out", str(tmp_path / "out"), *QUICK]) == 2
    assert "image=(missing)" in capsys.readouterr().err
    assert main(["edit", "--audio", tone, "--image", tone, "--bundle", "absent", *QUICK]) == 2
    assert "UNREADABLE" in capsys.readouterr().err
    assert main(["edit", "--audio", "absent.wav", "--image", "absent.png", "--dry-run"]) == 0
    assert "absent.png" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
