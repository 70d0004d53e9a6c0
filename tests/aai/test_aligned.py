"""Cached embeddings: they belong to one aligner and to the very clips of a file, and come with the right rows."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aai import storage
from aai.aligned import COLUMN, AlignedCache
from aai.errors import UserError
from aai.features import FeatureManifest, load_split, open_table
from aai.reader import FeatureReader
from tests.aai.numbered import numbers, write


def fill(cache: AlignedCache, features: str) -> None:
    """A clip's embedding is its number, then its square, then 1/3, which float16 would round."""
    for file in storage.list_files(features, ".parquet"):
        table = open_table(file, FeatureManifest.read(features))
        groups = []
        for group in range(table.num_row_groups):
            ids = table.read_row_group(group, columns=["clip_id"])["clip_id"]
            values = [[float(i[1:]), float(i[1:]) ** 2, 1 / 3] for i in ids.to_pylist()]
            groups.append(pa.table({"clip_id": ids, COLUMN: pa.array(values, pa.list_(pa.float32(), 3))}))
        cache.write(file, table, groups)


@pytest.fixture
def features(tmp_path: Path) -> str:
    return write(tmp_path / "features")


@pytest.fixture
def cache(tmp_path: Path, features: str) -> AlignedCache:
    made = AlignedCache(f"{tmp_path}/aligned", "a")
    fill(made, features)
    return made


def opened(features: str) -> tuple[str, pq.ParquetFile]:
    file = storage.list_files(features, ".parquet")[0]
    return file, open_table(file, FeatureManifest.read(features))


def test_a_batch_has_the_embeddings_of_its_clips(features: str, cache: AlignedCache) -> None:
    reader = FeatureReader(features, "train", 4, 0, columns=("image_features", COLUMN), shuffle_clips=7, cache=cache)
    seen = set()
    for batch in itertools.islice(reader.batches(), 10):
        assert batch.keys() >= {"clip_id", "caption", "image_features", COLUMN, "caption_id", "clip_hash"}
        assert "latents" not in batch
        clips = numbers(batch)
        seen |= set(clips)
        assert batch[COLUMN].dtype == torch.float32
        assert batch[COLUMN].tolist() == [[n, n * n, np.float32(1 / 3)] for n in clips]
    assert len(seen) == 20


def test_a_split_has_the_embeddings_of_its_clips(features: str, cache: AlignedCache) -> None:
    found = load_split(features, "val", 0, (COLUMN,), 4, cache)
    assert found["clip_id"] == ["c2", "c5", "c8", "c11"]
    assert found[COLUMN][:, 1].tolist() == [4, 25, 64, 121]


def test_files_mirror_the_row_groups_and_can_be_read_by_anyone(features: str, cache: AlignedCache) -> None:
    for file in storage.list_files(features, ".parquet"):
        ours, theirs = pq.ParquetFile(cache.file(file)), pq.ParquetFile(file)
        assert [ours.metadata.row_group(g).num_rows for g in range(ours.num_row_groups)] == [5, 5]
        assert ours.schema_arrow.names == ["clip_id", COLUMN]
        assert ours.read(["clip_id"])["clip_id"] == theirs.read(["clip_id"])["clip_id"]


def test_what_is_there_counts_for_its_aligner_and_its_clips_alone(
    tmp_path: Path, features: str, cache: AlignedCache
) -> None:
    file, table = opened(features)
    assert cache.has(file, table)
    assert not AlignedCache(cache.folder, "b").has(file, table)
    assert not AlignedCache(f"{tmp_path}/elsewhere", "a").has(file, table)
    other = write(tmp_path / "other", digest="other settings")
    assert not cache.has(*opened(other))
    swapped = table.read().take(pa.array([1, 0, *range(2, 10)]))
    storage.write_table(file, swapped, 5)
    assert not cache.has(*opened(features))
    storage.write_table(file, table.read(), 10)
    assert not cache.has(*opened(features)), "other row groups"
    storage.write_table(file, table.read(), 5)  # written anew by whatever code: the same content
    assert cache.has(*opened(features))


def test_missing_or_foreign_embeddings_are_an_error_that_says_what_to_do(features: str, cache: AlignedCache) -> None:
    file, table = opened(features)
    ids = table.read_row_group(1, columns=["clip_id"])["clip_id"]
    assert cache.read_group(file, 1, ids).to_pylist()[0][:2] == [5, 25]
    with pytest.raises(UserError, match=r"aligned=.*: was made of other clips.*run `aai adapt` again"):
        cache.read_group(file, 0, ids)
    storage.remove(cache.file(file))
    with pytest.raises(UserError, match=r"aligned=.*: is not there.*run `aai adapt` again"):
        cache.read_group(file, 1, ids)
    with pytest.raises(ValueError, match="needs a cache"):
        load_split(features, "val", 0, (COLUMN,))


def test_parts_come_as_rows_and_have_a_cache_of_their_own(tmp_path: Path, features: str) -> None:
    cache = AlignedCache(f"{tmp_path}/parts", "a")
    for file in storage.list_files(features, ".parquet"):
        table = open_table(file, FeatureManifest.read(features))
        groups = []
        for group in range(table.num_row_groups):
            ids = table.read_row_group(group, columns=["clip_id"])["clip_id"]
            values = [[float(i[1:])] * 3 + [float(i[1:]) + 0.5] * 3 for i in ids.to_pylist()]
            groups.append(pa.table({"clip_id": ids, COLUMN: pa.array(values, pa.list_(pa.float32(), 6))}))
        cache.write(file, table, groups)
    columns = ("image_features", COLUMN)
    reader = FeatureReader(features, "train", 4, 0, columns=columns, shuffle_clips=7, cache=cache)
    batch = next(iter(reader.batches()))
    assert batch[COLUMN].shape == (4, 2, 3)
    assert batch[COLUMN][:, 0, 0].tolist() == [float(n) for n in numbers(batch)]
    assert batch[COLUMN][:, 1, 2].tolist() == [n + 0.5 for n in numbers(batch)]
    none = load_split(features, "no such split", 10, columns=(COLUMN,), cache=cache)
    assert len(none[COLUMN]) == 0
