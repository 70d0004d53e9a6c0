"""What models said of the clips: the table of similarities, and how alike sound and pictures are by chance."""

import logging
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from aai import correspondence, storage
from aai.correspondence import sample
from aai.digest import stored_digest
from aai.schema import SIMILARITIES
from pipelines.curation.layout import SCORED, shard_file
from pipelines.engine.columns import read_columns
from pipelines.engine.shards import Shard
from pipelines.manifests.row import ManifestRow

log = logging.getLogger(__name__)

DIGEST = b"aai.scores"
"""Where a scored file carries the digest of what it was made of."""
EMBEDDINGS = ("audio_embed", "image_embed")


@dataclass(frozen=True, slots=True)
class CaptionedClip:
    """What scoring needs to know of a clip beside what was measured."""

    key: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class ScoreShard(Shard):
    """Clips to score."""

    clips: list[CaptionedClip]
    digest: str
    """Of the models and the clips."""


def shard_digest(config_digest: str, clips: Sequence[CaptionedClip]) -> str:
    """Of a shard's scores: the models, and its clips with their captions."""
    return stored_digest([config_digest, [asdict(clip) for clip in clips]])


def similarity_table(dim: int, names: Sequence[str] = ()) -> pa.Schema:
    """key, the similarities, the signals `names`, and, where a CLIP looked, the unit embeddings float16 [dim]."""
    signals = [pa.field(name, pa.float64()) for name in names]
    vector = pa.list_(pa.float16(), dim)
    embeddings = [pa.field(name, vector) for name in EMBEDDINGS] if dim else []
    return pa.schema([pa.field("key", pa.string()), *SIMILARITIES, *signals, *embeddings])


def vectors(values: np.ndarray) -> pa.Array:
    """float [N, D] as fixed_size_list<float16>[D]."""
    flat = pa.array(values.astype(np.float16).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def scored_files(out: str, shards: Collection[str]) -> dict[str, int]:
    """The tables of these shards with their sizes, in the order of the shards."""
    sizes = storage.file_sizes(storage.join(out, SCORED), ".parquet")
    return {file: sizes[file] for file in (shard_file(out, SCORED, shard) for shard in shards)}


def sample_embeddings(
    out: str, shards: Collection[str], against: Container[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys and unit embeddings audio [n, D], image [n, D] of an even sample of clips, flat in memory.

    against: keys of clips that are not among them.
    """
    keys: list[str] = []
    vectors: list[np.ndarray] = []
    for table in read_columns(scored_files(out, shards), ["key", "av_similarity", *EMBEDDINGS]):
        table = table.filter(table["av_similarity"].is_valid())  # a clip without a picture has none
        table = table.filter(pa.array([key not in against for key in table["key"].to_pylist()], pa.bool_()))
        if not len(table):
            continue
        both = [table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False) for name in EMBEDDINGS]
        pairs = np.stack([flat.reshape(len(table), -1) for flat in both], axis=1)  # [n, 2, D]
        keys, vectors = [*keys, *table["key"].to_pylist()], [*vectors, *pairs]
        kept = sample(keys)
        keys, vectors = [keys[i] for i in kept], [vectors[i] for i in kept]
    stacked = np.array(vectors, np.float32) if vectors else np.empty((0, 2, 0), np.float32)
    return keys, stacked[:, 0], stacked[:, 1]


class Null:
    """What the similarity of sound and pictures is by chance, and the threshold that follows."""

    def __init__(self, null: np.ndarray, matched: np.ndarray, false_accept_rate: float) -> None:
        self.false_accept_rate = false_accept_rate
        self.threshold = correspondence.threshold(null, false_accept_rate)
        self.null, self.matched = np.sort(null), matched

    @classmethod
    def measure(
        cls, out: str, shards: Collection[str], rows: Mapping[str, ManifestRow], against: Container[str], rate: float
    ) -> "Null | None":
        """From the scored clips that are not in `against` (keys); None, with a warning, when they are too few to tell
        what chance is."""
        keys, audio, image = sample_embeddings(out, shards, against)
        if len(keys) < correspondence.MIN_CLIPS:
            log.warning("curate: correspondence is not judged: %d clips tell nothing of chance", len(keys))
            return None
        labels = [(rows[key].labels or ("",))[0] for key in keys]
        null = correspondence.shuffled_null(audio, image, labels)
        return cls(null, (audio * image).sum(1), rate)

    def against(self, av_similarity: float | None) -> str | None:
        """What to say against a clip with this similarity, if anything."""
        if av_similarity is None or av_similarity >= self.threshold:
            return None
        share = (len(self.null) - np.searchsorted(self.null, av_similarity)) / len(self.null)
        return (
            f"av_similarity {av_similarity:.3f} is below {self.threshold:.3f}: "
            f"{share:.0%} of shuffled pairs are as alike, false_accept_rate {self.false_accept_rate:g}"
        )

    def describe(self, bins: int = 60) -> dict[str, Any]:
        """For curate.json and the data card: rates, and histograms of shuffled and true pairs."""
        edges = np.linspace(-1, 1, bins + 1)
        return {
            "false_accept_rate": self.false_accept_rate,
            "threshold": round(self.threshold, 6),
            "share_below": round(float((self.matched < self.threshold).mean()), 6),
            "pairs": {"null": len(self.null), "matched": len(self.matched)},
            "edges": [round(float(edge), 4) for edge in edges],
            "null": np.histogram(self.null, edges)[0].tolist(),
            "matched": np.histogram(self.matched, edges)[0].tolist(),
        }
