"""The aligner's pass over the sounds of a FeatureTable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from aai import storage
from aai.aligned import COLUMN, AlignedCache
from aai.bundle import read_bundle, write_bundle
from aai.encoders.aligner import embed_files, load_aligner
from aai.features import FeatureManifest, load_split, open_table
from aai.foundation.identity import FoundationSpec
from pipelines import featurize
from pipelines.settings import ClusterConfig
from pipelines.training import embedding
from pipelines.training.embedding import EmbedWorker, embed_table
from tests.pipelines.conftest import run_here, run_shards_here
from tests.tiny import write_bundle_of, write_clip_table


@pytest.fixture(scope="module")
def features(spec: FoundationSpec, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("embedding")
    clips = str(write_clip_table(root / "accepted", 3, 4))
    config = {"input": clips, "out": str(root / "features"), "foundation": spec.model_dump()}
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        featurize.run(featurize.FeaturizeConfig.parse(config))
    return str(root / "features")


@pytest.fixture(scope="module")
def bundle(spec: FoundationSpec, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_bundle_of(tmp_path_factory.mktemp("bundle") / "aligned", spec))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were embedded; shards run in this process."""
    names: list[str] = []

    class Noting(EmbedWorker):
        def __call__(self, shard: embedding.EmbedShard) -> embedding.Result:
            names.append(shard.name)
            return super().__call__(shard)

    monkeypatch.setattr(embedding, "run_shards", run_shards_here)
    monkeypatch.setattr(embedding, "EmbedWorker", Noting)
    return names


def opened(features: str) -> tuple[str, pq.ParquetFile]:
    file = storage.list_files(features, ".parquet")[0]
    return file, open_table(file, FeatureManifest.read(features))


def embed(bundle: str, features: str, folder: Path) -> AlignedCache:
    embed_table(bundle, features, str(folder), ClusterConfig(), str(folder))
    return AlignedCache.of(read_bundle(bundle), str(folder))


def test_every_sound_is_embedded_as_the_aligner_embeds_it(
    features: str, bundle: str, tmp_path: Path, made: list[str]
) -> None:
    cache = embed(bundle, features, tmp_path)
    assert sorted(made) == ["shard-00000", "shard-00001", "shard-00002"]
    aligner = load_aligner(read_bundle(bundle))
    for file in storage.list_files(features, ".parquet"):
        sounds = storage.read_table(file, ["audio"])["audio"].to_pylist()
        found = np.array(pq.read_table(cache.file(file))[COLUMN].to_pylist())
        np.testing.assert_allclose(found, embed_files(aligner, sounds), atol=1e-6)
    split = load_split(features, "train", 0, (COLUMN,), None, cache)
    assert split[COLUMN].shape == (len(split["clip_id"]), 32)


def test_parts_are_embedded_beside_the_whole_in_a_folder_of_their_own(
    features: str, bundle: str, tmp_path: Path, made: list[str]
) -> None:
    whole = embed(bundle, features, tmp_path)
    embed_table(bundle, features, str(tmp_path), ClusterConfig(), str(tmp_path), 3)
    cache = AlignedCache.of(read_bundle(bundle), str(tmp_path), 3)
    assert cache.folder != whole.folder
    assert len(made) == 6
    found = load_split(features, "train", 0, (COLUMN,), None, cache)[COLUMN]
    assert found.shape[1:] == (4, 32)
    np.testing.assert_allclose(found[:, 0], load_split(features, "train", 0, (COLUMN,), None, whole)[COLUMN], atol=1e-6)
    assert np.abs(found[:, 1] - found[:, 3]).max() > 1e-4


def test_what_is_there_is_not_made_again_and_what_is_missing_is(
    features: str, bundle: str, tmp_path: Path, made: list[str]
) -> None:
    cache = embed(bundle, features, tmp_path)
    made.clear()
    embed(bundle, features, tmp_path)
    assert made == []
    storage.remove(cache.file("shard-00001.parquet"))
    embed(bundle, features, tmp_path)
    assert made == ["shard-00001"]


def test_another_aligner_has_a_folder_of_its_own(
    features: str, bundle: str, spec: FoundationSpec, tmp_path: Path, made: list[str]
) -> None:
    first = embed(bundle, features, tmp_path / "cache")
    known = read_bundle(bundle)
    aligner = {name: weight + 0.1 for name, weight in known.aligner().items()}
    meta = {"data_fingerprint": "d", "metrics": {}, "parents": []}
    only = known.config.model_copy(update={"adapter": None})
    second = embed(
        str(write_bundle(tmp_path / "other", only, aligner, None, meta).folder), features, tmp_path / "cache"
    )
    assert len(made) == 6
    assert first.folder != second.folder
    shorter = known.config.model_copy(update={"encoder": {**known.config.encoder, "clip_s": 1.0}})
    assert AlignedCache.of(replace(known, config=shorter), "x").aligner not in (first.aligner, second.aligner)
    adapted = known.config.model_copy(update={"neutral_word": "noise"})
    assert AlignedCache.of(replace(known, config=adapted), "x").aligner == first.aligner
    for cache in (first, second):
        assert cache.has(*opened(features))
    assert not replace(second, folder=first.folder).has(*opened(features))
