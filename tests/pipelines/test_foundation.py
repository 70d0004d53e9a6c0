"""`aai foundation` around its training: pictures of a manifest, the judge's labels, what is there already."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aai.errors import UserError
from aai.toy.judge import HEADS, ToyJudge
from pipelines import foundation
from pipelines.__main__ import load_config, main
from pipelines.foundation import FoundationVerbConfig, draw_labelled, load_pictures
from tests.clips import frame_value, make_clip


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A red picture, a clip that grows brighter, and a row without a caption."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.PNG")
    (tmp_path / "b.mp4").write_bytes(make_clip())
    file = tmp_path / "manifest.csv"
    file.write_text("uri,caption\na.PNG,a red one\nb.mp4,a clip\nc.png,\n")
    return file


def test_pictures_and_middle_frames_with_their_captions(manifest: Path) -> None:
    pixels, captions = load_pictures(str(manifest), 16)
    assert (pixels.shape, captions) == ((2, 16, 16, 3), ["a red one", "a clip"])
    assert pixels[0].unique(dim=0).shape[0] == 1
    assert pixels[0, 0, 0].tolist() == [255, 0, 0]
    assert float(pixels[1].median()) == pytest.approx(frame_value(1.0), abs=12)


def test_greys_of_sixteen_bits_are_not_white(tmp_path: Path) -> None:
    Image.fromarray(np.full((30, 40), 100 << 8, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "manifest.csv").write_text("uri,caption\ndeep.png,a grey one\n")
    pixels, _ = load_pictures(str(tmp_path / "manifest.csv"), 16)
    assert pixels.unique().tolist() == [100]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.PNG,\n", "has no captions; add a caption column"),
        ("gone.png,lost\n", r"gone\.png: cannot be read"),
        ("torn.png,torn\n", r"torn\.png: cannot be read"),
        ("torn.mp4,torn\n", r"torn\.mp4: cannot be read .*UNREADABLE"),
    ],
)
def test_what_cannot_be_shown_is_refused_by_name(rows: str, message: str, manifest: Path) -> None:
    for name in ("torn.png", "torn.mp4"):
        (manifest.parent / name).write_bytes(b"nothing")
    manifest.write_text(f"uri,caption\n{rows}")
    with pytest.raises(UserError, match=message):
        load_pictures(str(manifest), 16)


def test_the_judge_is_taught_what_is_drawn() -> None:
    drawn = draw_labelled(60, seed=1)
    read = ToyJudge.load().read([Image.fromarray(picture) for picture in drawn["pixels"].numpy()])
    for attribute, names in HEADS.items():
        truth = [names[i] for i in drawn[attribute].tolist()]
        assert np.mean([row[attribute] == name for row, name in zip(read, truth, strict=True)]) > 0.9, attribute
    assert np.corrcoef([float(row["size"]) for row in read], drawn["size"].numpy())[0, 1] > 0.9


def test_only_what_is_not_there_is_trained(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out/clip").mkdir(parents=True)
    (tmp_path / "out/clip/finished").touch()
    trained = []

    def train(recipe: Any, pixels: Any, captions: list[str], clip: Path, out: Path) -> None:
        trained.append((clip.name, out.name, captions))
        out.mkdir()

    monkeypatch.setattr(foundation, "train_diffusion", train)
    settings = {"manifest": str(manifest), "out": str(tmp_path / "out"), "models": ("clip", "diffusion")}
    config = FoundationVerbConfig.parse(settings)
    assert list(foundation.run(config)["seconds"]) == ["diffusion"]
    assert foundation.run(config)["seconds"] == {}
    assert trained == [("clip", "diffusion", ["a red one", "a clip"])]


def test_flags_and_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path / "w"), "--set", "models=[clip]", "--set", "run_dir=r"]
    config, _ = load_config("foundation", words)
    assert config.plan().outputs == {"clip": f"{tmp_path}/w/clip"}
    assert config.plan().inputs == {"manifest": "r/captioned/manifest.csv"}
    assert main(["foundation", "--set", "models=[gan]"]) == 2
    assert "models" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()
