"""The reader on a hand-made FeatureTable, small enough to check every row."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aai import storage
from aai.errors import UserError
from aai.features import FeatureManifest, _fixed, hash64, load_split
from aai.reader import FeatureReader
from tests.aai.numbered import SAMPLES, write


def test_sounds_are_cut_in_the_middle_or_padded_at_the_end() -> None:
    ramp = np.arange(10, dtype=np.int16)
    assert _fixed(ramp, 4).tolist() == [3, 4, 5, 6]
    assert _fixed(ramp, 5).tolist() == [2, 3, 4, 5, 6]
    assert _fixed(ramp[:3], 5).tolist() == [0, 1, 2, 0, 0]
    assert _fixed(ramp, 4).dtype == np.int16


def test_load_split(tmp_path: Path) -> None:
    uri = write(tmp_path)
    val = load_split(uri, "val", SAMPLES)
    assert val["clip_id"] == [f"c{n}" for n in range(30) if n % 3 == 2]
    assert val["image_features"].shape == (10, 2, 3)
    assert val["audio"].shape == (10, SAMPLES)
    assert val["labels"] == [["dog"]] * 10
    assert val["content_hash"][:2] == ["h2", "h5"]
    assert val["uri"][:2] == ["2.mp4", "5.mp4"]
    assert val["caption"] == ["word 2"] * 10
    assert val["caption_id"].tolist() == [hash64("word 2")] * 10
    assert val["clip_hash"].tolist() == [hash64(f"h{n}") for n in range(2, 30, 3)]
    assert val["audio"][0].tolist() == pytest.approx([2 / 1024] * SAMPLES)
    assert val["latents"][1].tolist() == torch.full((2, 2, 2), 5.0).tolist()
    assert len(load_split(uri, "val", SAMPLES, ("latents",), max_rows=4)["latents"]) == 4
    nothing = load_split(uri, "test", SAMPLES)
    assert nothing["audio"].shape == (0, SAMPLES)
    assert nothing["image_features"].shape == (0, 2, 3)


def test_no_more_files_are_read_than_the_rows_asked_for_take(tmp_path: Path) -> None:
    uri = write(tmp_path)  # three rows of val in the first file
    (tmp_path / "shard-00001.parquet").write_bytes(b"damaged")
    first = load_split(uri, "val", SAMPLES, ("latents",), max_rows=3)
    assert first["clip_id"] == ["c2", "c5", "c8"]
    assert first["latents"][:, 0, 0, 0].tolist() == [2, 5, 8]
    with pytest.raises(pa.ArrowInvalid):
        load_split(uri, "val", SAMPLES, ("latents",), max_rows=4)
    uri = write(tmp_path / "again", shards=4)
    (tmp_path / "again" / "shard-00003.parquet").write_bytes(b"damaged")  # 3, 3, 4 and 3 rows of val
    assert len(load_split(uri, "val", SAMPLES, ("latents",), max_rows=10)["latents"]) == 10
    with pytest.raises(pa.ArrowInvalid):
        load_split(uri, "val", SAMPLES, ("latents",), max_rows=11)


def test_empty_captions_have_no_id(tmp_path: Path) -> None:
    assert hash64("") == 0
    assert hash64("a") == int.from_bytes(hashlib.sha256(b"a").digest()[:8], "big", signed=True)
    assert hash64("a") < 0 < hash64("b")  # the whole range of an int64


def test_sound_of_another_rate_than_the_manifest_says_is_refused(tmp_path: Path) -> None:
    uri = write(tmp_path)
    manifest = FeatureManifest.read(uri).model_copy(update={"sample_rate_hz": 8_000})
    storage.write_json(f"{uri}/manifest.json", manifest.model_dump(mode="json"))
    for read in (
        lambda: load_split(uri, "val", SAMPLES),
        lambda: next(FeatureReader(uri, "train", 2, SAMPLES).batches()),
    ):
        with pytest.raises(UserError, match="features=sound at 16000 Hz: its manifest says 8000 Hz"):
            read()
    with pytest.raises(UserError, match="bundle=x: hears 16000 Hz, the features hold 8000 Hz; mend"):
        manifest.check_sample_rate("bundle", "x", 16_000, "mend")
    manifest.check_sample_rate("bundle", "x", 8_000, "mend")


def test_refusals(tmp_path: Path) -> None:
    uri = write(tmp_path / "a")
    with pytest.raises(UserError, match="holds no finished FeatureTable"):
        FeatureReader(str(tmp_path / "none"), "train", 4, SAMPLES)
    with pytest.raises(UserError, match="batch_size=22: is more than the 20 rows of split 'train'"):
        FeatureReader(uri, "train", 11, SAMPLES, 0, 2)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(UserError, match="has version 2, this program reads version 1"):
        load_split(uri, "train", SAMPLES)
    mixed = write(tmp_path / "b")
    write(tmp_path / "c", digest="other")
    (tmp_path / "c" / "shard-00001.parquet").rename(tmp_path / "b" / "shard-00001.parquet")
    for read in (lambda: FeatureReader(mixed, "train", 4, SAMPLES), lambda: load_split(mixed, "train", SAMPLES)):
        with pytest.raises(UserError, match=r"shard-00001.* other settings \(other\)"):
            read()
    bare = tmp_path / "b" / "shard-00001.parquet"
    storage.write_table(str(bare), pq.read_table(bare).replace_schema_metadata(None), 5)
    with pytest.raises(UserError, match=r"shard-00001.* other settings \(unknown\)"):
        load_split(mixed, "train", SAMPLES)


def test_which_clips_have_a_picture(tmp_path: Path) -> None:
    uri = write(tmp_path, bare_every=5)  # 0, 5, ..., of which 5 and 20 are of val
    val = load_split(uri, "val", SAMPLES)
    assert [clip for clip, seen in zip(val["clip_id"], val["has_picture"], strict=True) if not seen] == ["c5", "c20"]
    seen = load_split(uri, "val", SAMPLES, ("latents",), max_rows=4, pictures_only=True)
    assert seen["clip_id"] == ["c2", "c8", "c11", "c14"]
    assert seen["has_picture"].all()
    assert load_split(write(tmp_path / "plain"), "val", SAMPLES)["has_picture"].tolist() == [True] * 10
