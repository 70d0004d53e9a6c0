"""What each choice of align and adapt is worth on the demo's world (make accept): held-out figures, several seeds.

AAI_DEMO names the run folder of a finished demo (else one is made in runs/accept), AAI_SEEDS how many seeds (3). One
choice differs from the demo's settings at a time. Tables go to RUN/figures; what was trained and evaluated stays in
RUN/ablations and is not made again.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aai.align import validate
from aai.bundle import read_bundle
from aai.encoders.aligner import load_aligner
from aai.features import load_split
from tests.e2e.plain_align import Learnable, settings_of, trained

pytestmark = [pytest.mark.accept, pytest.mark.timeout(4 * 3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("AAI_DEMO", ROOT / "runs" / "accept"))
SEEDS = range(int(os.environ.get("AAI_SEEDS", "3")))
ALIGN: dict[str, dict[str, Any]] = {
    "as in the demo": {},
    "pictures alone": {"loss.w_text": 0},
    "captions alone": {"loss.w_image": 0},
    "sigmoid loss": {"loss.kind": "sigmoid", "loss.temperature": 0.1},
    "a frame drawn at random": {"loss.frames": "random"},
    "captions weigh as much": {"loss.w_text": 1},
    "no augmentation": {"augment.noise_probability": 0, "augment.lowpass_probability": 0, "augment.time_shift": 0},
    "more augmentation": {"augment.noise_probability": 0.35, "augment.lowpass_probability": 0.2},
    "a transformer (AST)": {"encoder.backbone": "ast"},
    "half the steps": {"fit.steps": 150},
    "a third of the steps": {"fit.steps": 100},
}
JEST = {"JEST": 300, "JEST, a third of the steps": 100}
"""Steps of trainings on the more learnable half of batches twice as large; the demo's own bundle is the reference."""
ADAPT: dict[str, dict[str, Any]] = {
    "as in the demo": {},
    "K = 1": {"adapter.num_tokens": 1},
    "K = 2": {"adapter.num_tokens": 2},
    "K = 4": {"adapter.num_tokens": 4},
    "attention to 8 parts": {"adapter.parts": 8},
    "hidden states weigh as much": {"loss.w_hidden": 1},
    "no denoising": {"loss.w_denoise": 0},
    "no contrast": {"loss.w_contrast": 0},
    "no cosine": {"loss.w_clip": 0},
    "no hidden states": {"loss.w_hidden": 0},
    "no norm": {"loss.w_norm": 0},
}


def aai(verb: str, out: Path, **settings: Any) -> None:
    sets = [part for name, value in settings.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    words = [sys.executable, "-m", "pipelines", verb, "--out", str(out), "--set", f"run_dir={RUN}", *sets]
    subprocess.run(words, cwd=ROOT, check=True, timeout=3600, capture_output=True)


@pytest.fixture(scope="module", autouse=True)
def demo() -> None:
    if not (RUN / "adapt" / "bundle").exists():
        subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)


def table(name: str, rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, str]]:
    """Mean and spread over the seeds of every figure of every row."""
    told: dict[str, dict[str, str]] = {}
    for row, seeds in rows.items():
        told[row] = {}
        for figure in seeds[0]:
            values = [found[figure] for found in seeds]
            told[row][figure] = f"{np.mean(values):.3f} ± {np.std(values):.3f}"
    (RUN / "figures").mkdir(exist_ok=True)
    (RUN / "figures" / f"{name}.json").write_text(json.dumps({"rows": rows, "table": told}, indent=1))
    for row, figures in told.items():
        print(f"| {row} | {' | '.join(figures.values())} |")
    return told


def test_l11_align(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    held_out: dict[str, Any] = {}
    for name, settings in ALIGN.items():
        for seed in SEEDS:
            out = RUN / "ablations" / f"align-{name.replace(' ', '_')}-{seed}"
            if not (out / "bundle").exists():
                aai("align", out, fit__seed=seed, tracking__uri=f"sqlite:///{tmp_path}/mlflow.db", **settings)
            aligner = load_aligner(read_bundle(str(out / "bundle")))
            held_out = held_out or load_split(str(RUN / "features"), "test", aligner.config.clip_samples)
            rows.setdefault(name, []).append(validate(aligner, held_out))
    for name, steps in JEST.items():
        for seed in SEEDS:
            config = settings_of(RUN, fit__seed=seed, fit__steps=steps, fit__eval_every=0)
            count = config.fit.batch_size
            reference = load_aligner(read_bundle(str(RUN / "align" / "bundle")))
            selecting = lambda task, reference=reference, count=count: Learnable(task, reference, count)  # noqa: E731
            encoder = trained(config, wrapped=selecting, read_at_once=2 * count)
            rows.setdefault(name, []).append(validate(encoder, held_out))
    table("ablation_align", rows)
    assert len(rows) == len(ALIGN) + len(JEST)


def test_l11_adapt(tmp_path: Path) -> None:
    rows: dict[str, list[dict[str, float]]] = {}
    runs = f"sqlite:///{tmp_path}/mlflow.db"
    for name, settings in ADAPT.items():
        for seed in SEEDS:
            out = RUN / "ablations" / f"adapt-{name.replace(' ', '_')}-{seed}"
            if not (out / "bundle").exists():
                aai("adapt", out, fit__seed=seed, tracking__uri=runs, **settings)
            result = out / "evaluate" / "evaluate.json"
            if not result.exists():
                pictures = "{sound: 320, nearest_caption: 32}"
                aai("evaluate", out / "evaluate", bundle=out / "bundle", pictures=pictures, tracking__uri=runs)
            found = json.loads(result.read_text())["generation"]
            figures = {name: found["sound"][name] for name in ("object", "ambience")}
            figures |= {name: found["uncaptioned"][name]["sound"] for name in ("colour", "count", "place")}
            figures["uncaptioned"] = float(np.mean([figures[name] for name in ("colour", "count", "place")]))
            rows.setdefault(name, []).append(figures)
    table("ablation_adapt", rows)
    assert len(rows) == len(ADAPT)
