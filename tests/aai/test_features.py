"""The reader on a hand-made FeatureTable, small enough to check every row."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from aai import schema, storage
from aai.errors import UserError
from aai.features import METADATA_KEY, FeatureManifest, FeatureReader, hash64, load_split
from aai.media.waveform import encode_flac

SAMPLES = 400


def row(number: int, split: str) -> dict[str, Any]:
    """Every feature of a row is its number, so that a row is known by its features."""
    audio = np.full(SAMPLES // 2 if number % 2 else SAMPLES, number / 1024, np.float32)
    return {
        "clip_id": f"c{number}",
        "content_hash": f"h{number}",
        "uri": f"{number}.mp4",
        "caption": f"word {number % 3}",
        "labels": ["dog"],
        "split": split,
        "duration_s": 1.0,
        "audio": encode_flac(audio, 16_000),
        "image_features": [float(number)] * 6,
        "text_features": [float(number)] * 3,
        "latents": [float(number)] * 8,
    }


def write(folder: Path, shards: int = 3, rows: int = 10, digest: str = "d") -> str:
    """Splits alternate train, train, val; two row groups a file."""
    number = itertools.count()
    out = schema.feature_table(2, 3, 1, 3, 8).with_metadata({METADATA_KEY: digest.encode()})
    for shard in range(shards):
        data = [row(n := next(number), "val" if n % 3 == 2 else "train") for _ in range(rows)]
        storage.write_table(f"{folder}/shard-{shard:05d}.parquet", pa.Table.from_pylist(data, schema=out), 5)
    manifest = {
        "settings_digest": digest,
        "foundation": {},
        "processor": "P",
        "dtype": "float32",
        "sample_rate_hz": 16_000,
        "prompts": ["{caption}"],
        "num_frames": 2,
        "image_dim": 3,
        "num_texts": 1,
        "text_dim": 3,
        "latent_shape": [2, 2, 2],
        "latent_frame": 1,
        "rows": {},
        "input_fingerprint": "i",
        "fingerprint": "f",
        "seconds": 1.0,
    }
    storage.write_json(f"{folder}/manifest.json", FeatureManifest.parse(manifest).model_dump(mode="json"))
    return str(folder)


def numbers(batch: dict[str, Any]) -> list[int]:
    return batch["image_features"][:, 0, 0].int().tolist()


def test_a_batch_holds_what_the_table_holds(tmp_path: Path) -> None:
    reader = FeatureReader(write(tmp_path), "train", 4, SAMPLES)
    batch = next(reader.batches())
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "audio": (4, SAMPLES),
        "image_features": (4, 2, 3),
        "text_features": (4, 1, 3),
        "latents": (4, 2, 2, 2),
        "caption_id": (4,),
        "clip_hash": (4,),
    }
    for i, number in enumerate(numbers(batch)):
        assert batch["caption"][i] == f"word {number % 3}"
        assert batch["caption_id"][i] == hash64(f"word {number % 3}")
        assert batch["clip_hash"][i] == hash64(f"h{number}")
        assert (batch["latents"][i] == number).all()
        filled = SAMPLES // 2 if number % 2 else SAMPLES
        assert batch["audio"][i, :filled].tolist() == pytest.approx([number / 1024] * filled, abs=1e-4)
        assert (batch["audio"][i, filled:] == 0).all()


def test_ranks_share_an_epoch_without_overlap_and_in_equal_steps(tmp_path: Path) -> None:
    uri = write(tmp_path)
    readers = [FeatureReader(uri, "train", 3, SAMPLES, rank, 3) for rank in range(3)]
    assert [r.steps_per_epoch for r in readers] == [2, 2, 2]
    seen = [n for r in readers for batch in itertools.islice(r.batches(), 2) for n in numbers(batch)]
    assert len(seen) == len(set(seen)) == 18
    assert all(n % 3 != 2 for n in seen)


def test_epochs_differ_and_cover_everything(tmp_path: Path) -> None:
    reader = FeatureReader(write(tmp_path), "train", 2, SAMPLES)
    run = [numbers(batch) for batch in itertools.islice(reader.batches(), 20)]
    first, second = list(itertools.chain(*run[:10])), list(itertools.chain(*run[10:]))
    assert sorted(first) == sorted(second) == [n for n in range(30) if n % 3 != 2]
    assert first != second
    assert first != sorted(first)


def test_any_step_can_be_reached_directly(tmp_path: Path) -> None:
    uri = write(tmp_path)
    whole = [numbers(b) for b in itertools.islice(FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(), 12)]
    later = FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(7)
    assert [numbers(b) for b in itertools.islice(later, 5)] == whole[7:]
    other = FeatureReader(uri, "train", 4, SAMPLES, seed=6).batches()
    assert [numbers(b) for b in itertools.islice(other, 12)] != whole


def test_a_small_cache_gives_the_same_rows(tmp_path: Path) -> None:
    uri = write(tmp_path)
    tight = FeatureReader(uri, "train", 2, SAMPLES, cache_bytes=4_000)
    seen = sorted(n for batch in itertools.islice(tight.batches(), 10) for n in numbers(batch))
    assert seen == [n for n in range(30) if n % 3 != 2]
    assert len(tight._cache) < len(tight.groups)


def test_load_split(tmp_path: Path) -> None:
    uri = write(tmp_path)
    val = load_split(uri, "val", SAMPLES)
    assert val["clip_id"] == [f"c{n}" for n in range(30) if n % 3 == 2]
    assert val["image_features"].shape == (10, 2, 3)
    assert val["audio"].shape == (10, SAMPLES)
    assert val["labels"] == [["dog"]] * 10
    assert len(load_split(uri, "val", SAMPLES, ("latents",), max_rows=4)["latents"]) == 4
    assert len(load_split(uri, "test", SAMPLES)["audio"]) == 0


def test_empty_captions_have_no_id(tmp_path: Path) -> None:
    assert hash64("") == 0
    assert hash64("a") != hash64("b")
    assert -(2**63) <= hash64("a") < 2**63


def test_refusals(tmp_path: Path) -> None:
    uri = write(tmp_path / "a")
    with pytest.raises(UserError, match="holds no finished FeatureTable"):
        FeatureReader(str(tmp_path / "none"), "train", 4, SAMPLES)
    with pytest.raises(UserError, match="more than the 20 rows of split 'train'"):
        FeatureReader(uri, "train", 11, SAMPLES, 0, 2)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(UserError, match="has version 2"):
        load_split(uri, "train", SAMPLES)
    mixed = write(tmp_path / "b")
    write(tmp_path / "c", digest="other")
    (tmp_path / "c" / "shard-00001.parquet").rename(tmp_path / "b" / "shard-00001.parquet")
    for read in (lambda: FeatureReader(mixed, "train", 4, SAMPLES), lambda: load_split(mixed, "train", SAMPLES)):
        with pytest.raises(UserError, match=r"shard-00001.* other settings \(other\)"):
            read()
