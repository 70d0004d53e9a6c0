"""`aai verify`: what a picture proves, from painting to the registry."""

import hashlib
import shutil
from pathlib import Path

import pytest
from PIL import Image

from aai.bundle import read_bundle
from aai.png import encode_png
from aai.proof import read_proof
from pipelines.__main__ import main
from pipelines.registry import origins, tracking, versions
from pipelines.settings import TrackingConfig
from tests.certificates import certified
from tests.pipelines.tracing.archive import write_table


@pytest.fixture(scope="module")
def painted(tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A run folder with a registered bundle, its training, a sound, a picture, and what was painted of them, signed."""
    import numpy as np

    from aai.media.waveform import write_wav

    folder = tmp_path_factory.mktemp("run")
    shutil.copy(empty_store, folder / "mlflow.db")
    cfg = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model_name="aai-demo")
    write_table(folder / "1", 0, "f1")
    bundle = read_bundle(tiny_bundle)
    with tracking.run(cfg, "adapt", {"features": f"{folder}/1/features", "fingerprint": "f1"}) as run:
        run.set_tags({origins.MADE: bundle.sha})
    versions.set_alias(cfg, "champion", versions.register(cfg, bundle.folder, {}, {}))
    certified(folder, "painter", certified(folder, "root"))
    certified(folder, "stranger")
    write_wav(str(folder / "tone.wav"), np.sin(np.arange(8000) / 5).astype(np.float32) / 2, 16_000)
    Image.new("RGB", (64, 64), "red").save(folder / "red.png")
    shared = ["--set", f"run_dir={folder}", "--set", f"proof.certificate={folder}/painter.chain",
              "--set", f"proof.private_key={folder}/painter.pem", "--set", "request.steps=2"]  # fmt: skip
    assert main(["generate", "--audio", f"{folder}/tone.wav", *shared]) == 0
    repaint = ["--image", f"{folder}/red.png", "--set", "request.denoise_strength=1"]
    assert main(["edit", "--audio", f"{folder}/tone.wav", *repaint, *shared]) == 0
    return folder


def verify(folder: Path, picture: str, *words: str) -> int:
    return main(["verify", f"{folder}/pictures/{picture}", "--set", f"run_dir={folder}", *words])


def test_a_picture_is_walked_back_to_its_clips(painted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for picture in ("generate_tone_seed0.png", "edit_tone_seed0.png"):
        assert verify(painted, picture, "--authorities", f"{painted}/root.crt", "--audio", f"{painted}/tone.wav") == 0
        told = capsys.readouterr().out
        assert "trusted, signed by Tests / painter" in told
        assert "model 'aai-demo/1'" in told
        assert "version 1 of aai-demo (champion)" in told
        assert "clips  20 of train, 10 of val" in told
    assert verify(painted, "edit_tone_seed0.png", "--image", f"{painted}/red.png") == 0
    proof = read_proof((painted / "pictures" / "edit_tone_seed0.png").read_bytes())
    assert proof.made["image_sha256"] == hashlib.sha256((painted / "red.png").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--authorities", "stranger.crt"], "none of"),
        (["--audio", "red.png"], "is not what"),
        (["--image", "red.png"], "is not what"),
        (["--authorities", "none"], "no such file"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: list[str], told: str, painted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(painted, "generate_tone_seed0.png", words[0], f"{painted}/{words[1]}") == 2
    assert told in capsys.readouterr().err


def test_changed_and_unsigned_pictures_are_refused_and_still_walked_back(
    painted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((painted / "pictures" / "generate_tone_seed0.png").read_bytes())
    data[-100] ^= 1
    (painted / "pictures" / "changed.png").write_bytes(data)
    made = read_proof((painted / "pictures" / "generate_tone_seed0.png").read_bytes()).made
    (painted / "pictures" / "plain.png").write_bytes(encode_png(Image.new("RGB", (8, 8)), made))
    (painted / "pictures" / "no.png").write_bytes(b"text")
    for picture, told in (
        ("changed.png", "was changed since"), ("plain.png", "carries no manifest"), ("no.png", "is no PNG"),
        ("none.png", "no such file"),
    ):  # fmt: skip
        assert verify(painted, picture) == 2
        out, err = capsys.readouterr()
        assert told in err
        assert ("clips  20 of train" in out) == (picture == "plain.png")
    assert main(["verify"]) == 2
    assert main(["verify", "a.png", "--dry-run"]) == 0


def test_what_it_proves_needs_no_registry(painted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--authorities", f"{painted}/root.crt", "--set", f"tracking.uri=sqlite:///{painted}/none.db"]
    assert verify(painted, "generate_tone_seed0.png", *words) == 0
    assert "unknown: tracking.uri" in capsys.readouterr().out
    assert not (painted / "none.db").exists()


def test_a_picture_that_had_no_proof_gets_one(painted: Path) -> None:
    picture = painted / "pictures" / "generate_tone_seed0.png"
    signed = picture.read_bytes()
    picture.write_bytes(encode_png(Image.open(picture), read_proof(signed).made))
    words = ["--audio", f"{painted}/tone.wav", "--set", f"run_dir={painted}", "--set", "request.steps=2"]
    assert main(["generate", *words]) == 0
    assert read_proof(picture.read_bytes()).state == "missing"  # nobody asked for one
    keys = [f"proof.certificate={painted}/painter.chain", f"proof.private_key={painted}/painter.pem"]
    assert main(["generate", *words, "--set", keys[0], "--set", keys[1]]) == 0
    assert read_proof(picture.read_bytes()).state == "valid"
    assert not (painted / "pictures" / "generate_tone_seed0_2.png").exists()
