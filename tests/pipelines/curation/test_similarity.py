from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from pipelines.curation.layout import SCORED, shard_file
from pipelines.curation.similarity import Null, sample_embeddings, similarity_table, vectors


def test_false_pairs_set_the_threshold() -> None:
    rng = np.random.default_rng(1)
    null = Null(rng.uniform(-1, 0.5, 10_000), rng.uniform(0.4, 1, 1000), false_accept_rate=0.1)
    assert null.threshold == pytest.approx(0.35, abs=0.02)
    assert null.against(None) is None
    assert null.against(0.9) is None
    message = null.against(0.2)
    assert message is not None
    assert message.startswith("av_similarity 0.200 is below 0.3")
    assert "20% of shuffled pairs" in message
    figures = null.describe()
    assert sum(figures["null"]) == 10_000
    assert sum(figures["matched"]) == 1000
    assert figures["share_below"] == 0


def write_scored(out: str, shard: str, keys: list[str], similarity: float | None = 0.5) -> None:
    """The clips' embeddings are their numbers."""
    told = np.full((len(keys), 3), [[int(key[1:])] for key in keys] or 0, np.float32)
    columns = {
        "key": pa.array(keys, pa.string()),
        "caption_similarity": pa.nulls(len(keys), pa.float64()),
        "av_similarity": pa.array([similarity] * len(keys), pa.float64()),
        "audio_embed": vectors(told),
        "image_embed": vectors(-told),
    }
    storage.write_table(shard_file(out, SCORED, shard), pa.table(columns, schema=similarity_table(3)))


def test_shards_of_which_no_clip_counts_are_passed_over(tmp_path: Path) -> None:
    """All of them could not be decoded, show nothing, or have something against them."""
    out = str(tmp_path)
    write_scored(out, "failed", [])
    write_scored(out, "sounds", ["k1", "k2"], similarity=None)
    write_scored(out, "left out", ["k3"])
    write_scored(out, "good", ["k4", "k3", "k5"])
    keys, audio, image = sample_embeddings(out, ["failed", "sounds", "left out", "good"], {"k3"})
    assert keys == ["k4", "k5"]
    assert audio.tolist() == (-image).tolist() == [[4.0] * 3, [5.0] * 3]
    for shards in (["failed", "sounds", "left out"], []):
        keys, audio, image = sample_embeddings(out, shards, {"k3"})
        assert (keys, len(audio), len(image)) == ([], 0, 0)
    assert Null.measure(out, ["failed"], {}, (), 0.1) is None
