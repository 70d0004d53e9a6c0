"""The pass of a trained aligner over a FeatureTable: its embeddings of all sounds, so that `adapt` hears none.

One shard for each file of the table; what is there is not made again, by this run or by another of the same aligner.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from aai import storage
from aai.aligned import COLUMN, AlignedCache
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, load_aligner
from aai.features import FeatureManifest, open_table
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class EmbedShard(Shard):
    """One file of a FeatureTable."""

    features: str


class EmbedWorker:
    """Holds the aligner; embeds the sounds of one file of features."""

    def __init__(self, bundle: str, features: str, folder: str, parts: int, cpus: float, on_gpu: bool) -> None:
        opened = read_bundle(bundle)
        if not on_gpu:
            torch.set_num_threads(max(1, int(cpus)))
        self.manifest = FeatureManifest.read(features)
        self.cache, self.parts = AlignedCache.of(opened, folder, parts), parts
        self.aligner = load_aligner(opened).to("cuda" if on_gpu else "cpu")

    def __call__(self, shard: EmbedShard) -> Result:
        """Writes the file's embeddings, in float32: a step computes nothing that precision could be saved on."""
        table = open_table(shard.features, self.manifest)
        groups = []
        for clips in _read_ahead(table):
            vectors = embed_files(self.aligner, clips["audio"].to_pylist(), parts=self.parts)
            flat = pa.array(vectors.reshape(-1), pa.float32())
            embeddings = pa.FixedSizeListArray.from_arrays(flat, (1 + self.parts) * self.aligner.config.embed_dim)
            groups.append(pa.table({"clip_id": clips["clip_id"], COLUMN: embeddings}))
        self.cache.write(shard.features, table, groups)
        return Result(rows=shard.rows)


def _read_ahead(table: pq.ParquetFile) -> Iterator[pa.Table]:
    """Ids and sounds of each row group, the next one read while one is used."""
    with ThreadPoolExecutor(1) as pool:
        read = lambda group: table.read_row_group(group, columns=["clip_id", "audio"])  # noqa: E731
        following = pool.submit(read, 0)
        for group in range(table.num_row_groups):
            clips = following.result()
            if group + 1 < table.num_row_groups:
                following = pool.submit(read, group + 1)
            yield clips


def embed_table(bundle: str, features: str, folder: str, cluster: ClusterConfig, log_dir: str, parts: int = 0) -> None:
    """Makes what is missing of a bundle's embeddings of a FeatureTable, in a folder of the aligner's below `folder`."""
    manifest, cache = FeatureManifest.read(features), AlignedCache.of(read_bundle(bundle), folder, parts)
    shards = []
    for file in storage.list_files(features, ".parquet"):
        table = open_table(file, manifest)
        if table.metadata.num_rows and not cache.has(file, table):
            name = file.rsplit("/", 1)[1].removesuffix(".parquet")
            shards.append(EmbedShard(name=name, rows=table.metadata.num_rows, features=file))
    if shards:
        places = {"bundle": bundle, "features": features, "folder": folder, "parts": parts}
        args = {**places, "cpus": cluster.cpus_per_worker, "on_gpu": cluster.gpus_per_worker > 0}
        run_shards("adapt: embed sounds", shards, EmbedWorker, args, cluster, log_dir=log_dir)
