"""Near duplicates among more clips than one process should compare: the search is spread over the cluster."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from aai.media.duplicates import BANDS, DuplicateConfig, near_pairs, near_pairs_of
from aai.media.edited import PICTURE_PRINT_BYTES, Prints, edited_pairs_of
from pipelines.curation.layout import NEAR
from pipelines.engine.shards import Result, Shard, run_shards
from pipelines.settings import ClusterConfig

SPREAD_FROM = 20_000
"""Clips from which on workers search: the driver would need ten times as much memory for it as for all else."""
PAIRS_PER_TASK = 1_000_000_000
"""Comparisons of one unit of work: about half a minute."""
WORDS_PER_TASK = 4_000_000
"""Words of sounds of one unit of work."""
PART_ROWS = 16_384
"""Clips of one file of prints, and about how many the driver holds at once."""
HASHED = ("video_hash", "audio_hash", "picture_print", "sound_print")
"""Measured columns that duplicates are told by."""
PRINT_TABLE = pa.schema(
    [
        pa.field("number", pa.int64()),
        pa.field("video_hash", pa.binary(32)),
        pa.field("audio_hash", pa.binary(32)),
        pa.field("picture_print", pa.binary(PICTURE_PRINT_BYTES)),
        pa.field("words", pa.large_list(pa.uint32())),
        pa.field("duration_s", pa.float64()),
        pa.field("group", pa.int64()),
        pa.field("is_video", pa.bool_()),
    ]
)


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
        return prints_of([storage.read_table(storage.join(self.out, "prints"))])

    def __call__(self, shard: NearShard) -> Result:
        """Compares the clips that agree in the band's bits, or in a word."""
        if shard.band is None:
            pairs = edited_pairs_of(self.prints, self.cfg.edited, shard.part, shard.parts)
        else:
            pairs = near_pairs_of(self.prints, self.cfg, shard.band, shard.part, shard.parts)
        table = pa.table({"left": pairs[:, 0], "right": pairs[:, 1]})
        storage.write_table(storage.join(self.out, "pairs", f"{shard.name}.parquet"), table)
        return Result(rows=shard.rows)


@dataclass(frozen=True)
class PrintSource:
    """The prints of N clips, of which not all need to be in memory at once."""

    clips: int
    tables: Callable[[], Iterator[pa.Table]]
    """Of PRINT_TABLE, in any order; `number` counts the clips."""


def print_table(numbers: np.ndarray, hashed: pa.Table, duration_s: pa.ChunkedArray, groups: np.ndarray) -> pa.Table:
    """PRINT_TABLE of clips whose measured columns HASHED are known; what was not measured is 0, and has no words."""
    columns = [pa.array(numbers, pa.int64())]
    for field in PRINT_TABLE:
        if pa.types.is_fixed_size_binary(field.type):
            columns.append(pc.fill_null(hashed[field.name], bytes(field.type.byte_width)).cast(field.type))
    is_video = hashed["video_hash"].is_valid()
    columns += [_words(hashed["sound_print"]), duration_s, pa.array(groups, pa.int64()), is_video]
    return pa.table(columns, schema=PRINT_TABLE)


def _words(column: pa.ChunkedArray) -> pa.Array:
    """Lists of uint32 of a column of bytes, without a Python object for each."""
    texts = pc.fill_null(column, b"").combine_chunks()
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return pa.LargeListArray.from_arrays((offsets - offsets[0]) // 4, data.view(np.uint32))


def prints_of(tables: Iterable[pa.Table]) -> Prints:
    """What the tables of a PrintSource hold, by number; without a Python object for each clip."""
    table = pa.concat_tables([PRINT_TABLE.empty_table(), *tables])
    table = table.take(np.argsort(table["number"].to_numpy()))
    words = table["words"].combine_chunks()
    return Prints(
        video=_packed(table["video_hash"]),
        audio=_packed(table["audio_hash"]),
        pictures=_packed(table["picture_print"]),
        words=words.flatten().to_numpy(),
        starts=words.offsets.to_numpy(),
        duration_s=table["duration_s"].to_numpy(),
        group=table["group"].to_numpy(),
        is_video=table["is_video"].to_numpy(),
    )


def _packed(column: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, W] of a column of fixed binary."""
    parts = [np.empty((0, column.type.byte_width // 8), np.uint64)]
    for chunk in column.chunks:
        flat = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, chunk.type.byte_width // 8)
        parts.append(flat[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)


def parts_of(clips: int) -> int:
    """Shares into which each band is divided."""
    share = (1 + 16) / 2**16  # of the pairs that agree in 16 random bits up to one
    return max(1, math.ceil(clips**2 / 2 * share / PAIRS_PER_TASK))


def spread_near_pairs(prints: PrintSource, cfg: DuplicateConfig, out: str, cluster: ClusterConfig) -> np.ndarray:
    """What `near_pairs` finds; many clips are searched by the cluster's workers. out: folder or s3:// prefix."""
    if prints.clips < SPREAD_FROM:
        return near_pairs(prints_of(prints.tables()), cfg)
    here = storage.join(out, NEAR)
    storage.remove(here)  # of a run that was killed
    words, compares_sounds = 0, cfg.edited.enabled
    for number, table in enumerate(_joined(prints.tables())):
        words += pc.sum(pc.list_value_length(table["words"])).as_py()
        compares_sounds |= not pc.all(table["is_video"]).as_py()
        storage.write_table(storage.join(here, "prints", f"part-{number:05d}.parquet"), table)
    args = {"out": out, "duplicates": cfg.model_dump()}
    name, logs = "curate: near duplicates", os.path.dirname(out)
    shards = _shards(prints.clips, words if compares_sounds else 0)
    run_shards(name, shards, NearWorker, args, cluster, log_dir=logs, unit="part")
    table = storage.read_table(storage.join(here, "pairs"))
    storage.remove(here)
    return np.unique(np.stack([table["left"].to_numpy(), table["right"].to_numpy()], axis=1), axis=0)


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of about PART_ROWS, none of them empty."""
    held: list[pa.Table] = []
    for table in filter(len, tables):
        held.append(table)
        if sum(map(len, held)) >= PART_ROWS:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _shards(clips: int, words: int) -> list[NearShard]:
    parts, shards = parts_of(clips), []
    for band, part in product(range(BANDS), range(parts)):
        shards.append(NearShard(name=f"{band:02d}-{part:04d}", rows=1, band=band, part=part, parts=parts))
    parts = math.ceil(words / WORDS_PER_TASK)
    for part in range(parts):
        shards.append(NearShard(name=f"sound-{part:04d}", rows=1, band=None, part=part, parts=parts))
    return shards
