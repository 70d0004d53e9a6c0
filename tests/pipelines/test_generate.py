"""`aai generate` on a bundle of random weights: its flags, its files, what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from aai.painter import Painter
from pipelines.__main__ import main
from tests.aai.test_cue import write_features

QUICK = ["--set", "request.steps=1"]


def test_a_sound_becomes_as_many_pictures_as_asked(tone: str, tiny_bundle: str, tmp_path: Path) -> None:
    words = ["--audio", tone, "--bundle", tiny_bundle, "--out", str(tmp_path / "out"), "--seed", "4"]
    assert main(["generate", *words, "--num-images", "2", *QUICK]) == 0
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == ["generate_tone_seed4.png", "generate_tone_seed5.png"]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert '"verb": "generate"' in Image.open(files[0]).info["aai"]


def test_a_dry_run_reads_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--audio", "absent.wav", "--bundle", "absent", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "absent.wav" in out
    assert "image" not in out


def test_a_wrong_prompt_or_no_sound_is_one_line(
    tone: str, tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--bundle", tiny_bundle, "--out", str(tmp_path / "out"), *QUICK]
    for given, message in (
        ([], "audio=(missing)"),
        (["--audio", "absent.wav"], "no such file"),
        (["--audio", tone, "--prompt", "a photo of <elsewhere>"], "<elsewhere>"),
        (["--audio", tone, "--num-images", "9"], "request.num_images=9"),
    ):
        assert main([*words, *given]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("aai generate: error: ")
        assert message in error
    with pytest.raises(SystemExit):
        main([*words, "--audio", tone, "--image", tone])
    assert not (tmp_path / "out").exists()


def test_several_sounds_and_a_strip(tone: str, tiny_bundle: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["generate", "--bundle", tiny_bundle, "--out", str(out), *QUICK]
    sounds = ["--audio", f"dog={tone}", "--audio", f"rain={tone}"]
    assert main([*words, *sounds, "--prompt", "a photo of <dog> and <rain*0.5>"]) == 0
    (file,) = out.iterdir()
    assert file.name == "generate_tone+tone_seed0.png"
    file.unlink()
    assert main([*words, *sounds, "--strip", "morph", "--set", "strip_pictures=3"]) == 0
    assert sorted(file.name for file in out.iterdir()) == [
        f"generate_tone+tone_morph{end}.png" for end in ("", "0", "1", "2")
    ]
    assert Image.open(out / "generate_tone+tone_morph.png").size == (3 * 64, 64 + 14)
    assert '"at": "0.50"' in Image.open(out / "generate_tone+tone_morph1.png").info["aai"]


def test_what_one_sound_is_needed_for_refuses_two(
    tone: str, tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["--bundle", tiny_bundle, "--audio", tone, "--audio", tone, "--out", str(tmp_path / "out")]
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for verb, given, message in (
        ("edit", ["--image", str(tmp_path / "a.png")], "edit takes one sound"),
        ("generate", ["--strip", "shuffle"], "strip=shuffle"),
    ):
        assert main([verb, *two, *given]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_refined_pictures_stand_beside_the_first_ones(tone: str, tiny_bundle: str, tmp_path: Path) -> None:
    pictures = torch.randn(30, 32, generator=torch.Generator().manual_seed(1))
    features = write_features(tmp_path / "features", Painter.load(tiny_bundle), pictures)
    out = tmp_path / "out"
    words = ["--audio", tone, "--bundle", tiny_bundle, "--out", str(out), "--refine", features, *QUICK]
    assert main(["generate", *words, "--set", "cue.steps=3", "--set", "cue.learning_rate=1"]) == 0
    first, after = (Image.open(out / f"generate_tone_seed0{end}.png") for end in ("", "_refined"))
    assert first.tobytes() != after.tobytes()
    told = json.loads(after.info["aai"])["cue"]
    assert len(told["retrieved"]) == 8
    assert set(told) == {"retrieved", "loss"}
    assert main(["generate", *words, "--set", "cue.steps=3", "--set", "cue.learning_rate=1"]) == 0
    assert len(list(out.iterdir())) == 2  # the same pictures, not written again
    assert "cue" not in json.loads(first.info["aai"])
    assert main(["generate", "--audio", tone, "--bundle", tiny_bundle, "--out", str(tmp_path / "plain"), *QUICK]) == 0
    assert Image.open(tmp_path / "plain" / "generate_tone_seed0.png").tobytes() == first.tobytes()
