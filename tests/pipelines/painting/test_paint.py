"""What the painting commands refuse before they load anything, and that no picture is written over."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from aai.bundle import read_bundle, write_bundle
from aai.errors import UserError
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import write_wav
from aai.painter import Painter
from aai.version import code_version
from pipelines.__main__ import main
from pipelines.painting.paint import decode_picture, paint, write_picture
from pipelines.painting.request import PaintConfig
from pipelines.settings import InputLimits
from tests import hostile
from tests.tiny import write_bundle_of

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_a_repaint_of_no_step_is_refused_before_anything_is_read(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--audio", "absent.wav", "--image", "absent.png"]
    assert main([verb, *files, "--set", "request.steps=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"aai {verb}: error: denoise_strength=0.8: times 1 steps is below 1")
    assert error.endswith("raise it to 1, or give more steps")


@pytest.mark.parametrize("name", hostile.PICTURES)
def test_a_hostile_picture_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"(UNREADABLE|TOO_LARGE): .*; give a PNG, JPEG or WebP file"):
        decode_picture(hostile.PICTURES[name][0], "a.png", InputLimits(max_pixels=128 * 128))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pictures_of_all_named_formats_are_read(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a", kind)
    image = decode_picture((tmp_path / "a").read_bytes(), "a", InputLimits())
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_a_picture_that_was_made_otherwise_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_picture(str(tmp_path), "a", PICTURE, {"seed": 1})
    facts = Image.open(first).info
    assert (facts["Software"], json.loads(facts["aai"])) == (f"aai {code_version()}", {"seed": 1})
    before = Path(first).read_bytes()
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 2}) == str(tmp_path / "a_2.png")
    assert write_picture(str(tmp_path), "a", Image.new("RGB", (8, 8)), {"seed": 1}) == str(tmp_path / "a_3.png")
    # The same picture by another commit is the same picture.
    monkeypatch.setattr("aai.png.code_version", lambda: "9.9 (commit fffffff)")
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 1}) == first
    assert write_picture(str(tmp_path), "a", PICTURE, {"seed": 2}) == str(tmp_path / "a_2.png")
    assert Path(first).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 3


def test_a_sound_is_decoded_at_the_rate_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = read_bundle(write_bundle_of(tmp_path / "made", FoundationSpec()))
    config = made.config.model_copy(update={"encoder": {**made.config.encoder, "sample_rate_hz": 8_000}})
    write_bundle(tmp_path / "bundle", config, made.aligner(), made.adapter(), {})
    write_wav(str(tmp_path / "a.wav"), np.zeros(44_100, np.float32), 44_100)
    heard: list[dict[str, np.ndarray]] = []
    painter = SimpleNamespace(generate=lambda sound, request, control: heard.append(sound) or [], dtype="float32")
    monkeypatch.setattr(Painter, "load", lambda *args: painter)
    paint("generate", PaintConfig(bundle=str(tmp_path / "bundle"), audio=(str(tmp_path / "a.wav"),)))
    assert len(heard[0]["sound"]) == pytest.approx(8_000, abs=10)
