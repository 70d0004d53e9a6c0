"""The examples run as they are told to: in a process of their own, on a bundle of random weights."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aai.media.waveform import write_wav
from tests.tiny import paintable_bundle

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
