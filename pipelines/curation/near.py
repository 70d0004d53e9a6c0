"""Near duplicates among more clips than one process should compare: the search is spread over the cluster."""

import math
import os
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa

from aai import storage
from aai.media.duplicates import BANDS, DuplicateConfig, near_pairs, near_pairs_of
from aai.media.edited import Prints, edited_pairs_of
from pipelines.curation.layout import NEAR
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import ClusterConfig

SPREAD_FROM = 100_000
"""Clips from which on workers search; below, starting them takes longer."""
PAIRS_PER_TASK = 1_000_000_000
"""Comparisons of one unit of work: about half a minute."""
WORDS_PER_TASK = 4_000_000
"""Words of sounds of one unit of work."""


@dataclass(frozen=True, kw_only=True)
class NearShard(Shard):
    """A share of the search in one band of the hashes, or in the words of the sounds (band: None)."""

    band: int | None
    part: int
    parts: int


class NearWorker:
    """Searches a share -> _near/pairs/NAME.parquet. Holds the prints of all clips: 0.8 kB for one of 10 s."""

    def __init__(self, out: str, duplicates: dict[str, Any]) -> None:
        self.out, self.cfg = storage.join(out, NEAR), DuplicateConfig.parse(duplicates)

    @cached_property
    def prints(self) -> Prints:
        """Of all clips."""
        return _from_table(storage.read_table(storage.join(self.out, "prints.parquet")))

    def __call__(self, shard: NearShard) -> Result:
        """Compares the clips that agree in the band's bits, or in a word."""
        if shard.band is None:
            pairs = edited_pairs_of(self.prints, self.cfg.edited, shard.part, shard.parts)
        else:
            pairs = near_pairs_of(self.prints, self.cfg, shard.band, shard.part, shard.parts)
        table = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]})
        storage.write_table(storage.join(self.out, "pairs", f"{shard.name}.parquet"), table)
        return Result(rows=shard.rows)


def _as_table(prints: Prints) -> pa.Table:
    """A row for each clip."""
    columns = {
        "video_hash": _fixed(prints.video),
        "audio_hash": _fixed(prints.audio),
        "picture_print": _fixed(prints.pictures),
        "words": pa.LargeListArray.from_arrays(prints.starts, prints.words),
        "duration_s": prints.duration_s,
        "group": prints.group,
    }
    return pa.table(columns)


def _from_table(table: pa.Table) -> Prints:
    """The reverse, without a Python object for each clip."""
    words = table["words"].combine_chunks()
    return Prints(
        video=_words_of(table["video_hash"]),
        audio=_words_of(table["audio_hash"]),
        pictures=_words_of(table["picture_print"]),
        words=words.flatten().to_numpy(),
        starts=words.offsets.to_numpy(),
        duration_s=table["duration_s"].to_numpy(),
        group=table["group"].to_numpy(),
    )


def _words_of(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, W] of a column of fixed binary."""
    parts = []
    for chunk in column.chunks:
        flat = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, chunk.type.byte_width // 8)
        parts.append(flat[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _fixed(hashes: np.ndarray) -> pa.Array:
    """The reverse: binary(8 * W) [N] of uint64 [N, W]."""
    kind, data = pa.binary(8 * hashes.shape[1]), pa.py_buffer(np.ascontiguousarray(hashes))
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(hashes), [None, data])


def parts_of(clips: int) -> int:
    """Shares into which each band is divided."""
    share = (1 + 16) / 2**16  # of the pairs that agree in 16 random bits up to one
    return max(1, math.ceil(clips**2 / 2 * share / PAIRS_PER_TASK))


def spread_near_pairs(prints: Prints, cfg: DuplicateConfig, out: str, cluster: ClusterConfig) -> np.ndarray:
    """What `near_pairs` finds; many clips are searched by the cluster's workers. out: folder or s3:// prefix."""
    clips = len(prints.video)
    if clips < SPREAD_FROM:
        return near_pairs(prints, cfg)
    here = storage.join(out, NEAR)
    storage.remove(here)  # of a run that was killed
    storage.write_table(storage.join(here, "prints.parquet"), _as_table(prints))
    args = {"out": out, "duplicates": cfg.model_dump()}
    name, logs = "curate: near duplicates", os.path.dirname(out)
    run_shards(name, _shards(prints, cfg), NearWorker, args, cluster, log_dir=logs, unit="part")
    table = storage.read_table(storage.join(here, "pairs"))
    storage.remove(here)
    return np.unique(np.stack([table["left"].to_numpy(), table["right"].to_numpy()], axis=1), axis=0)


def _shards(prints: Prints, cfg: DuplicateConfig) -> list[NearShard]:
    parts, shards = parts_of(len(prints.video)), []
    for band, part in product(range(BANDS), range(parts)):
        shards.append(NearShard(name=f"{band:02d}-{part:04d}", rows=1, band=band, part=part, parts=parts))
    parts = math.ceil(len(prints.words) / WORDS_PER_TASK) if cfg.edited.enabled else 0
    for part in range(parts):
        shards.append(NearShard(name=f"sound-{part:04d}", rows=1, band=None, part=part, parts=parts))
    return shards
