"""The examples run as they are told to: in a process of their own, on a bundle of random weights."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aai.foundation.identity import FoundationSpec
from aai.media.waveform import write_wav
from tests.tiny import paintable_bundle, write_bundle_of, write_clip, write_diffusion

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_paint(tmp_path: Path) -> None:
    bundle = paintable_bundle(tmp_path / "made")
    sound = tmp_path / "noise.wav"
    write_wav(str(sound), np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000)
    # Neither Ray nor MLflow is there for it, as for somebody who installed the package without extras.
    for name in ("ray", "mlflow", "pipelines"):
        (tmp_path / "without" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "without" / f"{name}.py").write_text("raise ImportError('not installed')\n")
    paths = os.pathsep.join([str(tmp_path / "without"), str(ROOT)])
    command = [sys.executable, str(ROOT / "examples" / "paint.py"), str(bundle), str(sound), str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    pictures = sorted((tmp_path / "out").iterdir())
    assert [picture.name for picture in pictures] == ["photo0.png", "photo1.png", "sketch0.png", "sketch1.png"]
    assert len({Image.open(picture).tobytes() for picture in pictures}) == 4
    assert all(str(picture) in done.stdout for picture in pictures)


@pytest.mark.slow
def test_tour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder as the demo leaves it, with random weights."""
    run, out = tmp_path / "run", tmp_path / "out"
    for folder in ("adapt", "pictures"):
        (run / folder).mkdir(parents=True)
    clip = write_clip(tmp_path / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(write_diffusion(tmp_path / "sd", clip)))
    write_bundle_of(run / "adapt" / "bundle", spec)
    for number in (0, 1):
        noise = np.random.default_rng(number).normal(0, 0.1, 16_000).astype(np.float32)
        write_wav(str(run / "pictures" / f"sound{number}.wav"), noise, 16_000)
        Image.new("RGB", (90, 80), "white").save(run / "pictures" / f"sound{number}_given.png")
    monkeypatch.setattr(sys, "argv", ["tour.py", str(run), str(out)])
    runpy.run_path(str(ROOT / "examples" / "tour.py"))
    names = {"words", "mixed", "morph", "loudness", "edit", "stylize", "diffusers"}
    assert {file.name for file in out.iterdir()} == {f"{name}.png" for name in names} | {"sound.safetensors"}
    assert Image.open(out / "morph.png").size == (7 * 64, 64 + 14)


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the lines of the README, where the demo has left a bundle and a sound."""
    (lines,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len([line for line in lines.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    for folder in ("adapt", "pictures"):
        Path("runs/demo", folder).mkdir(parents=True)
    paintable_bundle(tmp_path / "made").rename("runs/demo/adapt/bundle")
    write_wav(
        "runs/demo/pictures/sound0.wav", np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32), 16_000
    )
    exec(compile(lines, "README.md", "exec"), {})
    assert Image.open("sketch.png").convert("L").getextrema() != (0, 0)


def test_the_plots_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots = runpy.run_path(str(ROOT / "docs" / "figures" / "plots.py"))
    share = {"object": 0.5, "ambience": 0.25}
    recall = {"r1": 0.1, "r5": 0.2, "r10": 0.3, "ci95": [0.05, 0.2], "chance": 0.01}
    retrieval = {"gallery": 9, **dict.fromkeys(plots["DIRECTIONS"], recall)}
    generation = {"chance": share, "sound": share, "ceiling": share}
    (tmp_path / "summary.json").write_text(json.dumps({"retrieval": retrieval, "generation": generation}))
    monkeypatch.setitem(plots["main"].__globals__, "HERE", tmp_path)
    plots["main"](str(tmp_path / "summary.json"))
    for name in ("pictures.png", "retrieval.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)))) > 50
