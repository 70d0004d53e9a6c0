"""What each choice of align and adapt is worth on the demo's world (make accept): held-out figures, several seeds.

AAI_DEMO names the run folder of a finished demo (else one is made in runs/accept), AAI_SEEDS how many seeds (3). One
choice differs from the demo's settings at a time. As many trainings run at a time as there are cores, of one worker
and one thread each, those of align without Ray. Tables go to RUN/figures; what was trained and evaluated stays in
RUN/ablations and is not made again.
"""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aai.align import validate
from aai.bundle import read_bundle
from aai.encoders.aligner import load_aligner
from aai.encoders.audio import AudioEncoder
from aai.features import load_split
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.toy.judge import ToyJudge
from tests.e2e.plain_align import Learnable, settings_of, trained

pytestmark = [pytest.mark.accept, pytest.mark.timeout(8 * 3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("AAI_DEMO", ROOT / "runs" / "accept"))
SEEDS = range(int(os.environ.get("AAI_SEEDS", "3")))
DEMO = "as in the demo"
ALIGN: dict[str, dict[str, Any]] = {
    DEMO: {},
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
SPOKEN = 200
"""Held-out sounds that are painted with other words."""
WHOLE = {"loss.denoise_rows": 0}
"""As the demo, with the costly term for all clips: the other rows change one thing of that."""
ADAPT: dict[str, dict[str, Any]] = {
    DEMO: {},
    "all clips denoised": WHOLE,
    "1 word": WHOLE | {"adapter.num_tokens": 1},
    "2 words": WHOLE | {"adapter.num_tokens": 2},
    "4 words": WHOLE | {"adapter.num_tokens": 4},
    "attention to 8 parts": WHOLE | {"adapter.parts": 8},
    "no denoising": WHOLE | {"loss.w_denoise": 0},
    "no contrast": WHOLE | {"loss.w_contrast": 0},
    "no cosine": WHOLE | {"loss.w_clip": 0},
    "no hidden states": WHOLE | {"loss.w_hidden": 0},
    "no norm": WHOLE | {"loss.w_norm": 0},
    "half of the clips denoised, no hidden states": {"loss.w_hidden": 0},
    "denoising and contrast alone": WHOLE | {"loss.w_clip": 0, "loss.w_hidden": 0, "loss.w_norm": 0},
    "hidden states weigh as much": WHOLE | {"loss.w_hidden": 1},
    "4 words, attention to 8 parts": WHOLE | {"adapter.num_tokens": 4, "adapter.parts": 8},
}


def aai(verb: str, out: Path, **settings: Any) -> None:
    changed = {"tracking.uri": f"sqlite:///{out}.db", "run_dir": RUN} | settings
    sets = [part for name, value in changed.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    words = [sys.executable, "-m", "pipelines", verb, "--out", str(out), *sets]
    subprocess.run(words, cwd=ROOT, check=True, timeout=3600, capture_output=True)


def kept(stage: str, name: str, seed: int, make: Callable[[Path], dict[str, float]]) -> dict[str, float]:
    """Figures of one training, of an earlier call where there was one."""
    out = RUN / "ablations" / f"{stage}-{name.replace(' ', '_')}-{seed}"
    figures = out.with_suffix(".json")
    if not figures.exists():
        out.parent.mkdir(exist_ok=True)
        figures.write_text(json.dumps(make(out)))
    return dict(json.loads(figures.read_text()))


def heard_by(encoder: AudioEncoder) -> dict[str, float]:
    return validate(encoder, load_split(str(RUN / "features"), "test", encoder.config.clip_samples))


def aligned(name: str, seed: int) -> dict[str, float]:
    def make(_: Path) -> dict[str, float]:
        return heard_by(trained(settings_of(RUN, fit__seed=seed, fit__eval_every=0, **ALIGN[name])))

    return kept("align", name, seed, make)


def selected(name: str, seed: int) -> dict[str, float]:
    def make(_: Path) -> dict[str, float]:
        config = settings_of(RUN, fit__seed=seed, fit__steps=JEST[name], fit__eval_every=0)
        count = config.fit.batch_size
        reference = load_aligner(read_bundle(str(RUN / "align" / "bundle")))
        selecting = lambda task: Learnable(task, reference, count)  # noqa: E731
        return heard_by(trained(config, wrapped=selecting, read_at_once=2 * count))

    return kept("jest", name, seed, make)


def adapted(name: str, seed: int) -> dict[str, float]:
    def make(out: Path) -> dict[str, float]:
        aai("adapt", out, fit__seed=seed, cluster__num_workers=1, **ADAPT[name])
        pictures = "{sound: 320, nearest_caption: 32}"
        aai("evaluate", out / "evaluate", bundle=out / "bundle", pictures=pictures, request__steps=10)
        found = json.loads((out / "evaluate" / "evaluate.json").read_text())["generation"]
        figures = {of: found["sound"][of] for of in ("object", "ambience")}
        figures |= {of: found["uncaptioned"][of]["sound"] for of in ("colour", "count", "place")}
        return figures | {"uncaptioned": float(np.mean([figures[of] for of in ("colour", "count", "place")]))}

    return kept("adapt", name, seed, make)


def spoken(name: str, seed: int) -> dict[str, float]:
    """Whether words beside the sound count: the share of pictures in which snow is seen that the prompt asks for."""

    def make(_: Path) -> dict[str, float]:
        torch.set_num_threads(1)
        painter = Painter.load(str(RUN / "ablations" / f"adapt-{name.replace(' ', '_')}-{seed}" / "bundle"))
        clips = load_split(str(RUN / "features"), "test", painter.aligner.config.clip_samples, ("audio",))
        rows = np.random.default_rng(0).permutation(len(clips["audio"]))[:SPOKEN]
        asked = PaintRequest(prompt="a painting of <sound> in the snow", steps=5, sound_parts=1)
        embeds = torch.cat([painter.embed_request(clips["audio"][row].numpy(), asked)[0] for row in rows])
        pictures = []
        for at in range(0, len(rows), 25):
            pictures += painter.paint(embeds[at : at + 25], list(range(at, at + len(embeds[at : at + 25]))), asked)
        seen = [reading["ambience"] for reading in ToyJudge.load().read(pictures)]
        return {"snow by words": seen.count("snow") / len(seen)}

    return kept("spoken", name, seed, make)


def adapted_and_spoken(name: str, seed: int) -> dict[str, float]:
    return adapted(name, seed) | spoken(name, seed)


Row = Callable[[str, int], dict[str, float]]


@pytest.fixture(scope="module", autouse=True)
def demo() -> None:
    if not (RUN / "adapt" / "bundle").exists():
        subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)


def table(title: str, rows: Mapping[str, Row], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Of every figure of every row: mean and spread over the seeds, mean difference from the first row's, its error."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pool = ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))
    try:
        asked = {name: [pool.submit(row, name, seed) for seed in SEEDS] for name, row in rows.items()}
        found = {name: [told(future) for future in futures] for name, futures in asked.items()}
    finally:
        pool.shutdown(cancel_futures=True)
    first = next(iter(found.values()))
    lines: dict[str, dict[str, Any]] = {}
    for name, seeds in found.items():
        lines[name] = {}
        for figure in seeds[0]:
            values = np.array([of[figure] for of in seeds])
            above = values - np.array([of[figure] for of in first])
            lines[name][figure] = {"mean": values.mean(), "spread": values.std(), "above": above.mean(),
                                   "error": above.std() / np.sqrt(len(above))}  # fmt: skip
        cells = [f"{of['mean']:.3f} ± {of['spread']:.3f}" for of in lines[name].values()]
        print(f"| {name} | {' | '.join(cells)} |")
    (RUN / "figures").mkdir(exist_ok=True)
    (RUN / "figures" / f"{title}.json").write_text(json.dumps({"rows": found, "table": lines}, indent=1))
    return lines


def better(lines: dict[str, dict[str, Any]], figure: str) -> list[str]:
    """Rows that are above the demo's by more than the seeds' spread explains, and by 0.01 or more."""
    return [name for name, of in lines.items() if of[figure]["above"] - 2 * of[figure]["error"] > 0.01]


def told(future: "Future[dict[str, float]]") -> dict[str, float]:
    try:
        return future.result()
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr.decode()[-2000:]) from error


def test_l11_align(monkeypatch: pytest.MonkeyPatch) -> None:
    """JEST hears twice the sounds for its steps: it may be better."""
    lines = table("ablation_align", dict.fromkeys(ALIGN, aligned) | dict.fromkeys(JEST, selected), monkeypatch)
    assert not set(better(lines, "a2v_r1")) - set(JEST)


def test_l11_adapt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is better in one thing costs words beside the sound their say."""
    lines = table("ablation_adapt", dict.fromkeys(ADAPT, adapted_and_spoken), monkeypatch)
    for name in {*better(lines, "uncaptioned"), *better(lines, "object")}:
        assert lines[name]["snow by words"]["above"] < -0.1, name
