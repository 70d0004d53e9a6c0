"""Every path that runs on a GPU, run with a fake one: a tensor on the wrong device fails here, without a GPU.

What is computed on the fake GPU is also held against the CPU's own result. The last test plants mistakes and sees them
found, so that the fake GPU (tests/test_fake_cuda.py) cannot go blind unnoticed.
"""

import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from aai import storage
from aai.adapt import AdapterConfig, AudioAdapter, denoising_loss
from aai.align import AlignLossConfig, AlignTask
from aai.augment import AugmentConfig
from aai.batching import Together, view_of
from aai.bundle import BundleConfig, write_bundle
from aai.concepts import Concepts, Vocabulary
from aai.conditions import CONDITIONS, Conditions
from aai.cue import CueConfig, Examples, _tuned
from aai.encoders.aligner import embed_files
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.fit import FitConfig, State, fit
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import encode_flac
from aai.painter import Painter
from aai.sampling import PaintRequest
from aai.strips import paint_strip
from pipelines.adapt import AdaptConfig, AdaptRecipe
from pipelines.align import AlignConfig, AlignRecipe
from pipelines.curation.curate_config import ScoreConfig
from pipelines.curation.layout import SCORED, shard_file
from pipelines.curation.measured import MEASURED_TABLE
from pipelines.curation.scores import ScoreWorker
from pipelines.curation.similarity import CaptionedClip, ScoreShard
from pipelines.evaluation.cases import PICTURES, Case, PictureShard, PictureWorker
from pipelines.evaluation.clips import ClipPlace, ListenShard
from pipelines.evaluation.listening import HEARD, INPUTS, TEXTS, ListenWorker
from pipelines.featurize import FeaturizeShard, FeaturizeWorker
from tests import tiny
from tests.fake_cuda import CudaTensor, fake_cuda

ENCODER = AudioEncoderConfig(
    hidden_size=32, num_layers=1, num_heads=2, num_mel_bins=16, clip_s=0.5, head_size=16, embed_dim=32
)
ADAPTER = AdapterConfig(num_tokens=2, hidden_size=32, embed_dim=32, token_dim=32)
VOCABULARY = Vocabulary(objects=("a dog", "a bell"), ambiences=("at night", "in the rain"))
REQUEST = PaintRequest(steps=2)
TEST = "test-00000"
CAPTIONS = ["a sketch of a big dog in the rain", "a photo of a bell at night"]


@dataclass(frozen=True)
class Files:
    """A tiny foundation, a bundle on it, and eight clips of curate with their features, in one file each."""

    root: Path
    spec: FoundationSpec
    bundle: str
    clips: str
    features: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("devices")
    clip = tiny.write_clip(root / "clip")
    spec = FoundationSpec(clip=str(clip), diffusion=str(tiny.write_diffusion(root / "diffusion", clip)))
    torch.manual_seed(0)
    aligner, adapter = AudioEncoder(ENCODER), AudioAdapter(ADAPTER)
    config = BundleConfig(
        foundation=spec, encoder=ENCODER.model_dump(), adapter=ADAPTER.model_dump(), vocabulary=VOCABULARY.model_dump()
    )
    meta = {"data_fingerprint": "d", "metrics": {}, "parents": []}
    write_bundle(root / "bundle", config, aligner.state_dict(), adapter.state_dict(), meta)
    tiny.write_clip_table(root / "accepted", 1, 8)
    rows = storage.read_table(str(root / "accepted")).to_pylist()
    measured = [{**row, "key": f"key{i}", "code": None} for i, row in enumerate(rows)]
    storage.write_table(
        str(root / "_measured/shard-00000.parquet"), pa.Table.from_pylist(measured, schema=MEASURED_TABLE)
    )
    clips, features = str(root / "accepted/shard-00000.parquet"), str(root / "features.parquet")
    featurize(spec, clips, features, "cpu")
    return Files(root, spec, str(root / "bundle"), clips, features)


def featurize(spec: FoundationSpec, clips: str, out: str, device: str) -> None:
    settings = {"input": "unused", "out": "unused", "foundation": spec.model_dump(), "device": device}
    worker = FeaturizeWorker(settings, "digest")
    assert worker(FeaturizeShard(name="s", rows=8, input=clips, output=out, fingerprint="f")).rows == 8


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with fake_cuda():
        yield


def sound(seed: int) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(16_000)).astype(np.float32)


def everything(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


# ---------------------------------------------------------------- painting


@pytest.fixture(scope="module")
def painter(files: Files) -> Painter:
    with fake_cuda():
        return Painter.load(files.bundle, "cuda")


def test_generate_edit_and_stylize(files: Files, painter: Painter) -> None:
    assert painter.device == torch.device("cuda", 0)
    picture = Image.new("RGB", (80, 70), "red")
    cpu = Painter.load(files.bundle)
    for paint in (
        lambda p: p.generate({"dog": sound(0), "rain": sound(1)}, PaintRequest(steps=1, prompt="a <dog> in <rain>")),
        lambda p: p.edit(sound(1), picture, PaintRequest(steps=2)),
        lambda p: p.stylize(sound(1), picture, PaintRequest(steps=2, num_images=2)),
        lambda p: p.generate(
            sound(0), PaintRequest(steps=4, reuse_steps=2, negative_prompt="<sound>", prompt="a bell")
        ),
        lambda p: p.edit(sound(1), picture, PaintRequest(steps=4, repaint="invert")),
        lambda p: p.stylize(sound(1), picture, PaintRequest(steps=4, repaint="invert"), Image.new("L", (9, 9), 255)),
        lambda p: [paint_strip(p, "morph", [sound(0), sound(1)], REQUEST, 2)[1][1]],
        lambda p: p.generate(np.tile(sound(0), 4), PaintRequest(steps=1, window="mean")),
    ):
        ours, theirs = paint(painter), paint(cpu)
        difference = np.asarray(ours[-1], np.int16) - np.asarray(theirs[-1], np.int16)
        assert np.abs(difference).max() <= 1


def test_requests_that_are_painted_together(files: Files, painter: Painter) -> None:
    picture, pictures = Image.new("RGB", (80, 70), "red"), {}
    wanted = [
        lambda p: p.generate(sound(0), PaintRequest(steps=3, seed=1)),
        lambda p: p.generate(sound(1), PaintRequest(steps=2, seed=2, num_images=2, guidance_scale=1)),
        lambda p: p.edit(sound(2), picture, PaintRequest(steps=4, seed=3)),
        lambda p: p.stylize(sound(3), picture, PaintRequest(steps=4, seed=4, repaint="invert")),
    ]
    rows: list[int] = []
    for device, own in (("cuda", painter), ("cpu", Painter.load(files.bundle))):
        _ = own.concepts
        together, begin = Together(own.pipe.unet, rows.append), threading.Barrier(len(wanted))

        def work(paint: Any, own: Any = own, together: Any = together, begin: Any = begin) -> Any:
            begin.wait()
            return together.run(lambda: paint(view_of(own)), threading.Event())

        with ThreadPoolExecutor(len(wanted)) as pool:
            pictures[device] = [np.asarray(made[-1], np.int16) for made in pool.map(work, wanted)]
        together.close()
    assert max(rows) > 4, "several requests shared a call"
    for ours, theirs in zip(pictures["cuda"], pictures["cpu"], strict=True):
        assert np.abs(ours - theirs).max() <= 1


def test_a_cue_is_tuned(files: Files, painter: Painter) -> None:
    cpu = Painter.load(files.bundle)
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    cue = CueConfig(steps=3, learning_rate=0.1)
    tuned = []
    for own in (painter, cpu):
        examples = Examples(latents, torch.stack([own.hear(sound(1)), own.hear(sound(2))]), ["a photo of <sound>"] * 2)
        tuned.append(_tuned(own, own.hear(sound(0)), examples, cue, 0))
    assert tuned[0][0].device == torch.device("cuda", 0)
    np.testing.assert_allclose(everything(tuned[0][0]), everything(tuned[1][0]), atol=1e-3)
    assert tuned[0][1:] == pytest.approx(tuned[1][1:], rel=1e-3)


@pytest.fixture(scope="module")
def workers(files: Files) -> dict[str, PictureWorker]:
    """What paints an evaluation's pictures, by device, once the clips have been heard there."""
    places = [ClipPlace(row=i, at=i, clips_file=files.clips, clips_at=i, painted=True) for i in range(4)]
    trained = [ClipPlace(row=i, at=i) for i in range(4, 8)]
    made = {}
    for device in ("cuda", "cpu"):
        out = str(files.root / f"evaluate-{device}")
        with fake_cuda():
            listen = ListenWorker(files.bundle, out, {}, device, graded_frames_every=2)
            listen(ListenShard(name=TEST, rows=4, features=files.features, clips=places, texts=["a dog"], alone=2))
            listen(ListenShard(name="train-00000", rows=4, features=files.features, clips=trained))
            made[device] = PictureWorker(files.bundle, out, {}, REQUEST.model_dump(), {}, device, "float32")
    return made


def test_evaluation_hears_alike(workers: dict[str, PictureWorker]) -> None:
    for table, column in ((HEARD, "audio"), (TEXTS, "feature")):
        files = [storage.join(worker.out, table, f"{TEST}.parquet") for worker in workers.values()]
        ours, theirs = (np.array(storage.read_table(file)[column].to_pylist()) for file in files)
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("condition", [*CONDITIONS, "loudness", "edit", "stylize"])
def test_evaluation_paints_every_condition(workers: dict[str, PictureWorker], condition: str) -> None:
    cases = [Case(case=i, condition=condition, row=0, audio_row=1, picture_row=2, seed=i) for i in range(2)]
    features = {}
    for device, worker in workers.items():
        inputs = {storage.join(worker.out, INPUTS, f"{TEST}.parquet"): [0, 1, 2]}
        assert worker(PictureShard(name=condition, rows=2, cases=cases, inputs=inputs)).rows == 2
        out = storage.join(worker.out, PICTURES, f"{condition}.parquet")
        features[device] = np.array(storage.read_table(out)["clip_feature"].to_pylist())
    np.testing.assert_allclose(features["cuda"], features["cpu"], atol=1e-2)


@pytest.mark.parametrize(("native", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_what_the_device_has(
    files: Files, native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("aai.precision.native_bfloat16", lambda device: asked.append(device) or native)
    assert Painter.load(files.bundle, "cuda", "auto").dtype == expected
    assert asked == ["cuda"]


# ---------------------------------------------------------------- training


def align_batch(size: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "audio": 0.1 * torch.randn(size, ENCODER.clip_samples, generator=g),
        "image_features": nn.functional.normalize(torch.randn(size, 3, 32, generator=g), dim=-1),
        "text_features": nn.functional.normalize(torch.randn(size, 1, 32, generator=g), dim=-1),
        "caption_id": torch.arange(size),  # the first has no caption
        "clip_hash": torch.arange(11, size + 11),
        "labels": [["dog" if i % 2 else "bell"] for i in range(size)],
    }


def adapt_batch(size: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    return {
        "aligned": nn.functional.normalize(torch.randn(size, 32, generator=g), dim=-1),
        "latents": torch.randn(size, 8, 8, 8, generator=g),
        "image_features": nn.functional.normalize(torch.randn(size, 2, 32, generator=g), dim=-1),
        "caption": [CAPTIONS[i % 2] for i in range(size)],
    }


def check_training(task: nn.Module, batch: dict[str, Any], evaluate: Callable[[int], dict[str, float]]) -> None:
    """Three steps with validation, and two more from a checkpoint, whose batches come from the CPU as the reader's."""
    config = FitConfig(steps=3, batch_size=len(batch["image_features"]), log_every=1, warmup_steps=1)
    figures: list[dict[str, float]] = []

    def batches(start: int) -> Iterator[dict[str, Any]]:
        while True:
            yield batch

    state = fit(task, batches, config, lambda step, entry: figures.append(entry), evaluate=evaluate)
    assert all(isinstance(value, CudaTensor) for value in state.weights.values())
    assert figures[-1].keys() == evaluate(3).keys()
    on_host = State(2, {k: v.cpu() for k, v in state.weights.items()}, {k: v.cpu() for k, v in state.moments.items()})
    fit(task, batches, config, resume=on_host)


def test_align_trains_validates_and_resumes() -> None:
    recipe = AlignRecipe(AlignConfig(features="unused", out="unused", encoder=ENCODER.model_dump()))
    task = recipe.build().to("cuda")
    clips = align_batch(6)
    check_training(task, clips, lambda step: recipe.validate(task, clips))


def test_adapt_trains_validates_and_resumes(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    config = AdaptConfig(features="unused", out="unused", bundle=files.bundle, adapter=ADAPTER)
    recipe = AdaptRecipe(config)
    task = recipe.build().to("cuda")
    assert task.text_projection is not None
    batch = adapt_batch(3)
    check_training(task, batch, lambda step: recipe.validate(task, batch))
    shown = Image.open(io.BytesIO(recipe.sample(task, batch) or b""))
    assert shown.width / 3 == shown.height / 2 > 0, "two rows of three squares"
    assert recipe.pipe.vae.device.type == "cpu", "it takes no room between two validations"

    def no_room(*args: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("pipelines.adapt.paint", no_room)
    assert recipe.sample(task, batch) is None, "the training goes on without pictures"
    assert recipe.pipe.vae.device.type == "cpu"


# ---------------------------------------------------------------- features and scores


def test_featurize(files: Files, tmp_path: Path) -> None:
    featurize(files.spec, files.clips, str(tmp_path / "cuda.parquet"), "cuda")
    tables = [storage.read_table(file) for file in (str(tmp_path / "cuda.parquet"), files.features)]
    for name in ("image_features", "text_features", "latents"):
        ours, theirs = (np.array(table[name].to_pylist()) for table in tables)
        np.testing.assert_allclose(ours, theirs, atol=1e-2)


def test_score(files: Files) -> None:
    config = ScoreConfig(caption=True, foundation=files.spec, bundle=files.bundle)
    clips = [CaptionedClip(key=f"key{i}", caption=f"caption {i}") for i in range(8)]
    shard = ScoreShard(name="shard-00000", rows=8, digest="d", clips=clips)
    found = []
    for gpu in (True, False):
        worker = ScoreWorker(str(files.root), config.model_dump(mode="json"), 1, gpu)
        assert worker.aligner is not None
        assert next(worker.aligner.parameters()).is_cuda == gpu
        assert worker(shard).rows == 8
        columns = ["caption_similarity", "av_similarity"]
        scores = storage.read_table(shard_file(str(files.root), SCORED, "shard-00000"), columns)
        found.append([list(row.values()) for row in scores.to_pylist()])
    np.testing.assert_allclose(np.array(found[0], float), np.array(found[1], float), atol=1e-4)


def test_embed_files_returns_arrays_of_the_host() -> None:
    aligner = AudioEncoder(ENCODER).eval()
    sounds = [encode_flac(sound(i), 16_000) for i in range(3)]
    expected = embed_files(aligner, sounds, batch_size=2)
    np.testing.assert_allclose(embed_files(aligner.to("cuda"), sounds, batch_size=2), expected, atol=1e-5)


# ---------------------------------------------------------------- planted mistakes


def test_mistakes_planted_in_our_own_code_are_found(
    files: Files, painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, states = torch.ones(1, 8, 8, 8, device="cuda"), torch.ones(1, 32, 32, device="cuda")
    arguments = (painter.pipe.unet, painter.pipe.scheduler, latents, states)
    noise, timesteps = torch.zeros_like(latents), torch.ones(1, dtype=torch.int64, device="cuda")
    denoising_loss(*arguments, timesteps, noise)
    with pytest.raises(RuntimeError, match="cpu"):
        denoising_loss(*arguments, timesteps, noise.cpu())
    with pytest.raises(RuntimeError, match="cpu"):
        denoising_loss(*arguments, timesteps.cpu(), noise)

    clip = FrozenClip(files.spec, "cuda")
    concepts = Concepts(clip, VOCABULARY)
    embed = painter.listen(sound(0))
    concepts.read(embed, "objects")
    monkeypatch.setitem(concepts.features, "objects", concepts.features["objects"].cpu())
    with pytest.raises(RuntimeError, match="cpu"):
        concepts.read(embed, "objects")

    conditions = Conditions(painter, clip, CAPTIONS, painter.listen(sound(1))[0])
    with pytest.raises(RuntimeError, match="cpu"):
        conditions._write(torch.ones(1, 2, 32), conditions.prompt)

    task = AlignTask(AudioEncoder(ENCODER), AlignLossConfig(), AugmentConfig()).to("cuda")
    with pytest.raises(RuntimeError, match="cpu"):
        task({name: value for name, value in align_batch(4).items() if name != "labels"})
