"""What the painting commands refuse before they load anything, and that no picture is written over."""

import json
from pathlib import Path

import pytest
from PIL import Image

from aai.errors import UserError
from aai.version import code_version
from pipelines.__main__ import main
from pipelines.painting.paint import load_picture, write_picture
from pipelines.settings import InputLimits
from tests import hostile

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.mark.parametrize("verb", ["edit", "stylize"])
def test_a_repaint_of_no_step_is_refused_before_anything_is_read(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--audio", "absent.wav", "--image", "absent.png"]
    assert main([verb, *files, "--set", "request.steps=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"aai {verb}: error: denoise_strength=0.8: times 1 steps is below 1")
    assert error.endswith("raise it to 1, or give more steps")


@pytest.mark.parametrize("name", hostile.PICTURES)
def test_a_hostile_picture_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(hostile.PICTURES[name][0])
    with pytest.raises(UserError, match=r"(UNREADABLE|TOO_LARGE): .*; give a PNG, JPEG or WebP file"):
        load_picture(str(tmp_path / "a.png"), InputLimits(max_pixels=128 * 128))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_pictures_of_all_named_formats_are_read(kind: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a", kind)
    image = load_picture(str(tmp_path / "a"), InputLimits())
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
