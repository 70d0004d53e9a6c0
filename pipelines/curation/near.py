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
from pipelines.curation.layout import NEAR
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import ClusterConfig

SPREAD_FROM = 100_000
"""Clips from which on workers search; below, starting them takes longer."""
PAIRS_PER_TASK = 1_000_000_000
"""Comparisons of one unit of work: about half a minute."""


@dataclass(frozen=True, kw_only=True)
class NearShard(Shard):
    """A share of one band of the hashes."""

    band: int
    part: int
    parts: int


class NearWorker:
    """Searches a share of one band -> _near/pairs/NAME.parquet. Holds the hashes of all clips, 64 bytes each."""

    def __init__(self, out: str, duplicates: dict[str, Any]) -> None:
        self.out, self.cfg = storage.join(out, NEAR), DuplicateConfig.parse(duplicates)

    @cached_property
    def hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """video, audio uint64 [N, 4]."""
        table = storage.read_table(storage.join(self.out, "hashes.parquet"))
        return _words_of(table["video_hash"]), _words_of(table["audio_hash"])

    def __call__(self, shard: NearShard) -> Result:
        """Compares the clips that agree in the band's bits."""
        pairs = near_pairs_of(*self.hashes, self.cfg, shard.band, shard.part, shard.parts)
        table = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]})
        storage.write_table(storage.join(self.out, "pairs", f"{shard.name}.parquet"), table)
        return Result(rows=shard.rows)


def _words_of(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, 4] of a column of 256-bit hashes, without a Python object for each."""
    parts = []
    for chunk in column.chunks:
        flat = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, 4)
        parts.append(flat[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def _as_column(hashes: np.ndarray) -> pa.Array:
    """The reverse: binary(32) [N] of uint64 [N, 4]."""
    data = pa.py_buffer(np.ascontiguousarray(hashes))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(hashes), [None, data])


def parts_of(clips: int) -> int:
    """Shares into which each band is divided."""
    share = (1 + 16) / 2**16  # of the pairs that agree in 16 random bits up to one
    return max(1, math.ceil(clips**2 / 2 * share / PAIRS_PER_TASK))


def spread_near_pairs(
    video: np.ndarray, audio: np.ndarray, cfg: DuplicateConfig, out: str, cluster: ClusterConfig
) -> np.ndarray:
    """What `near_pairs` finds; many clips are searched by the cluster's workers. out: folder or s3:// prefix."""
    clips = len(video)
    if clips < SPREAD_FROM:
        return near_pairs(video, audio, cfg)
    here, parts = storage.join(out, NEAR), parts_of(clips)
    storage.remove(here)  # of a run that was killed
    hashes = pa.table({"video_hash": _as_column(video), "audio_hash": _as_column(audio)})
    storage.write_table(storage.join(here, "hashes.parquet"), hashes)
    shards = []
    for band, part in product(range(BANDS), range(parts)):
        shards.append(NearShard(name=f"{band:02d}-{part:04d}", rows=1, band=band, part=part, parts=parts))
    args = {"out": out, "duplicates": cfg.model_dump()}
    name, logs = "curate: near duplicates", os.path.dirname(out)
    run_shards(name, shards, NearWorker, args, cluster, log_dir=logs, unit="part")
    table = storage.read_table(storage.join(here, "pairs"))
    storage.remove(here)
    return np.unique(np.stack([table["left"].to_numpy(), table["right"].to_numpy()], axis=1), axis=0)
