"""The reader on a hand-made FeatureTable, small enough to check every row."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aai import schema, storage
from aai.errors import UserError
from aai.features import METADATA_KEY, FeatureManifest, FeatureReader, _fixed, hash64, load_split
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


def test_an_epoch_is_cut_into_one_part_for_each_rank(tmp_path: Path) -> None:
    """18 of 20 rows: three ranks of three rows for two steps, in the order of a single process."""
    uri = write(tmp_path)
    for epoch in (0, 1):
        whole = FeatureReader(uri, "train", 9, SAMPLES).order(epoch)
        parts = [FeatureReader(uri, "train", 3, SAMPLES, rank, 3).order(epoch) for rank in range(3)]
        assert whole.shape == (18, 2)
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert FeatureReader(uri, "train", 20, SAMPLES).steps_per_epoch == 1
    assert FeatureReader(uri, "train", 3, SAMPLES).steps_per_epoch == 6
    assert FeatureReader(uri, "train", 3, SAMPLES).num_rows == 20


def test_rows_are_shuffled_within_what_fits_half_the_cache(tmp_path: Path) -> None:
    """The largest row group has four rows of 2 bytes for each of 400 samples and 6 + 3 + 8 features."""
    uri, group = write(tmp_path), 4 * 2 * (SAMPLES + 17)
    for cache, window in ((0, 1), (4 * group - 1, 1), (4 * group, 2), (6 * group, 3), (1 << 30, (1 << 29) // group)):
        assert FeatureReader(uri, "train", 2, SAMPLES, cache_bytes=cache)._window() == window
    tight = FeatureReader(uri, "train", 20, SAMPLES, cache_bytes=0)
    groups = tight.order(0)[:, 0].tolist()
    runs = [number for number, _ in itertools.groupby(groups)]
    assert sorted(runs) == list(range(6))  # each group once, as a whole
    assert runs != sorted(runs)
    assert tight.order(0)[:, 1].tolist() != [row for number in runs for row in range(groups.count(number))]
    wide = FeatureReader(uri, "train", 20, SAMPLES).order(0)[:, 0].tolist()
    assert len([number for number, _ in itertools.groupby(wide)]) > 6


def test_the_cache_drops_the_group_that_waited_longest(tmp_path: Path) -> None:
    uri = write(tmp_path)
    probe = FeatureReader(uri, "train", 2, SAMPLES)
    sizes = [sum(v.nbytes for v in probe._group(i).values() if isinstance(v, np.ndarray)) for i in range(6)]
    assert probe._cached_bytes == sum(sizes)
    assert list(probe._cache) == list(range(6))
    assert probe._group(3) is probe._group(3)
    reader = FeatureReader(uri, "train", 2, SAMPLES, cache_bytes=sizes[0] + max(sizes[1], sizes[2]))
    for number in (0, 1, 0, 2):
        reader._group(number)
    assert list(reader._cache) == [0, 2]
    assert reader._cached_bytes == sizes[0] + sizes[2]
    none = FeatureReader(uri, "train", 2, SAMPLES, cache_bytes=0)
    for number in (0, 1):
        none._group(number)
    assert list(none._cache) == [1]


def test_a_reader_of_few_columns_reads_no_others(tmp_path: Path) -> None:
    batch = next(FeatureReader(write(tmp_path), "train", 4, SAMPLES, columns=("latents",)).batches())
    assert batch.keys() == {"caption", "latents", "caption_id", "clip_hash"}
    assert batch["latents"].dtype == torch.float32


def test_sounds_are_cut_in_the_middle_or_padded_at_the_end() -> None:
    ramp = np.arange(10, dtype=np.float32) / 1024
    assert _fixed(ramp, 4).tolist() == [96, 128, 160, 192]
    assert _fixed(ramp, 5).tolist() == [64, 96, 128, 160, 192]
    assert _fixed(ramp[:3], 5).tolist() == [0, 32, 64, 0, 0]
    assert _fixed(np.array([-2.0, -1.0, 1.0, 2.0, 1.6 / 32768], np.float32), 5).tolist() == [
        -32768,
        -32768,
        32767,
        32767,
        2,
    ]
    assert _fixed(ramp, 4).dtype == np.int16


def test_any_step_can_be_reached_directly(tmp_path: Path) -> None:
    uri = write(tmp_path)
    whole = [numbers(b) for b in itertools.islice(FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(), 12)]
    later = FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(7)
    assert [numbers(b) for b in itertools.islice(later, 5)] == whole[7:]
    plain = FeatureReader(uri, "train", 4, SAMPLES)
    assert (plain.order(1) == FeatureReader(uri, "train", 4, SAMPLES, 0, 1, 0).order(1)).all()
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
