"""What listening writes, on a dozen clips."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.disturbances import DISTURBANCES
from aai.encoders.aligner import embed_files, load_aligner
from aai.encoders.audio import fit_length
from aai.foundation.clip import FrozenClip
from aai.media.waveform import read_sound
from aai.toy.grammar import OBJECTS
from aai.toy.judge import ToyJudge
from pipelines.evaluation.clips import ListenShard, find_clips, listen_shards
from pipelines.evaluation.listening import ListenWorker, mean_vectors, rms_db
from tests.pipelines.evaluation.conftest import SCENES, clip, frame, sound, write_tables


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.parquet"
    return storage.read_table(str(file)).to_pylist()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[ListenShard]:
    """One shard of nine clips of test and one of three of train; clips 2 and 6 (rows 2 and 5) are painted."""
    root = tmp_path_factory.mktemp("tables")
    features, clips = write_tables(root, [list(range(12))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.clips.MIN_CLIPS", 9)
        found = find_clips(features, clips, "test", 100)
    return listen_shards(found, 100, ["a photo of a dog", "a clock"], painted={2, 5})


@pytest.fixture(scope="module")
def heard(shards: list[ListenShard], bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tables of both shards; every fourth true frame was graded."""
    out = tmp_path_factory.mktemp("heard")
    worker = ListenWorker(bundle, str(out), {}, "cpu", 4, disturbed_every=4)
    assert [worker(shard).rows for shard in shards] == [9, 3]
    return out


def test_one_held_out_clip_in_so_many_is_heard_disturbed(heard: Path, shards: list[ListenShard], bundle: str) -> None:
    assert [path.name for path in (heard / "disturbed").iterdir()] == ["test-00000.parquet"]
    found = rows(heard / "disturbed", "test-00000")
    asked = [(kind, level, row) for kind, levels in DISTURBANCES.items() for level in levels for row in (0, 4, 8)]
    assert [(row["kind"], row["level"], row["row"]) for row in found] == asked
    aligner = load_aligner(read_bundle(bundle))
    softer = [row for row in found if (row["kind"], row["level"]) == ("gain_db", -20)]
    for row in softer:
        wave = torch.from_numpy(read_sound(clip([i for i in range(12) if i % 4 != 3][row["row"]])["audio"]))
        with torch.no_grad():
            expected = aligner(0.1 * fit_length(wave, aligner.config.clip_samples)[None])[0]
        np.testing.assert_allclose(row["audio"], expected, atol=1e-5)


def test_every_clip_is_heard(heard: Path, bundle: str) -> None:
    numbers = [i for i in range(12) if i % 4 != 3]
    clips = [clip(number) for number in numbers]
    found = rows(heard / "heard", "test-00000")
    assert [row["row"] for row in found] == list(range(9))
    assert [row["caption"] for row in found] == [held["caption"] for held in clips]
    audio = embed_files(load_aligner(read_bundle(bundle)), [held["audio"] for held in clips])
    np.testing.assert_allclose([row["audio"] for row in found], audio, atol=1e-5)
    for row, number, held in zip(found, numbers, clips, strict=True):
        image = np.array(held["image_features"]).reshape(2, 32).mean(0)
        np.testing.assert_allclose(row["image"], image / np.linalg.norm(image), atol=1e-5)
        text = np.array(held["text_features"])
        np.testing.assert_allclose(row["text"], text / np.linalg.norm(text), atol=1e-5)
        assert row["rms_db"] == pytest.approx(20 * np.log10(0.01 * (1 + number)), abs=0.3)
        assert 0 <= row["alone_max_abs"] < 1e-5
    train = rows(heard / "heard", "train-00000")
    assert [(row["row"], row["caption"]) for row in train] == [
        (i, clip(n)["caption"]) for i, n in enumerate((3, 7, 11))
    ]
    assert [row["alone_max_abs"] for row in train] == [None] * 3


def test_some_clips_are_heard_alone(shards: list[ListenShard], bundle: str, tmp_path: Path) -> None:
    worker = ListenWorker(bundle, str(tmp_path), {"model": "none"}, "cpu", 0)
    whole = worker.aligner.parts
    # An encoder that would look at its batch: alone it says something else.
    worker.aligner.parts = lambda waves, count: whole(waves, count) + 0.25 * (len(waves) == 1)
    worker(ListenShard(name="test-00000", rows=9, features=shards[0].features, clips=shards[0].clips, alone=2))
    gaps = [row["alone_max_abs"] for row in rows(tmp_path / "heard", "test-00000")]
    assert gaps[:2] == pytest.approx([0.25] * 2, abs=1e-5)
    assert gaps[2:] == [None] * 7
    assert not (tmp_path / "frames").exists()
    assert not (tmp_path / "texts").exists()


def test_inputs_are_the_painted_clips_with_their_middle_picture(heard: Path) -> None:
    found = rows(heard / "inputs", "test-00000")
    assert [(row["row"], row["clip_id"]) for row in found] == [(2, "c02"), (5, "c06")]
    for row, number in zip(found, (2, 6), strict=True):
        held = clip(number)
        assert {name: row[name] for name in ("caption", "labels", "audio")} == {
            name: held[name] for name in ("caption", "labels", "audio")
        }
        assert row["frame"] == frame(number, 0.5)
    assert not (heard / "inputs" / "train-00000.parquet").exists()


def test_an_even_sample_of_true_frames_is_graded(heard: Path, bundle: str) -> None:
    """Nine clips of three frames: the 1st, 5th, ... of the 27."""
    numbers = [i for i in range(12) if i % 4 != 3]
    found = rows(heard / "frames", "test-00000")
    places = [(i // 3, i % 3) for i in range(0, 27, 4)]
    assert [(row["row"], row["frame"]) for row in found] == places
    data = [frame(numbers[row], 0.5 * at) for row, at in places]
    pictures = [Image.open(io.BytesIO(png)).convert("RGB") for png in data]
    assert [row["object"] for row in found] == [seen["object"] for seen in ToyJudge.load().read(pictures)]
    assert np.mean([row["object"] == SCENES[numbers[row["row"]]].obj for row in found]) > 0.8
    frozen = FrozenClip(read_bundle(bundle).config.foundation)
    classes = frozen.texts([f"a photo of a {name}" for name in OBJECTS])
    assert [row["clip_class"] for row in found] == (frozen.images(pictures) @ classes.T).argmax(-1).tolist()
    assert not (heard / "frames" / "train-00000.parquet").exists()


def test_texts_are_embedded_once(heard: Path, bundle: str) -> None:
    found = rows(heard / "texts", "test-00000")
    assert [row["text"] for row in found] == ["a photo of a dog", "a clock"]
    expected = FrozenClip(read_bundle(bundle).config.foundation).texts(["a photo of a dog", "a clock"])
    np.testing.assert_allclose([row["feature"] for row in found], expected, atol=1e-5)
    assert not (heard / "texts" / "train-00000.parquet").exists()


def test_a_shard_may_be_a_single_clip(shards: list[ListenShard], bundle: str, tmp_path: Path) -> None:
    worker = ListenWorker(bundle, str(tmp_path), {"model": "none"}, "cpu", 0)
    for shard in shards:
        worker(ListenShard(name=shard.name, rows=1, features=shard.features, clips=shard.clips[:1]))
        assert [row["row"] for row in rows(tmp_path / "heard", shard.name)] == [0]


def test_loudness_and_means_by_hand() -> None:
    assert rms_db(np.full(100, 0.1)) == pytest.approx(-20, abs=1e-3)
    assert rms_db(np.array([1.0, -1.0])) == pytest.approx(0, abs=1e-3)
    assert rms_db(np.zeros(10)) == pytest.approx(-100)
    assert rms_db(sound(9)) == pytest.approx(-20, abs=0.3)
    table = pa.table({"f": [[3.0, 0.0, 0.0, 3.0], [1.0, 0.0, 3.0, 0.0]]})
    half = 0.5**0.5
    np.testing.assert_allclose(mean_vectors(table, "f", 2), [[half, half], [1, 0]], atol=1e-6)
