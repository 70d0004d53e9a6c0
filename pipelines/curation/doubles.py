"""Which clips of a curation are doubles: found in columns, and only what may be one is looked at clip by clip."""

from collections.abc import Collection, Container, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aai.media.duplicates import (
    EXCLUDED_SPLIT,
    SPLIT_RANK,
    DuplicateConfig,
    HashedClip,
    Search,
    find_duplicates,
)
from pipelines.manifests.row import ManifestRow

_COLUMNS = ("key", "clip_id", "video_hash", "audio_hash")
HASH_WORDS = 4
"""Of 64 bits, in a hash."""


def find_doubles(
    measured: Mapping[str, pa.Table],
    rows: Mapping[str, ManifestRow],
    against: Container[str],
    excluded: Collection[str],
    cfg: DuplicateConfig,
    search: Search,
) -> dict[str, tuple[str, str]]:
    """{key: (code, message)}, as `find_duplicates` says it of all decoded clips that are not in `against`.

    measured: by shard; rows: by key. excluded: keys of clips that are of a split that wins.
    """
    if not cfg.enabled:
        return {}
    clips = pa.concat_tables(_good(table, against) for table in measured.values())
    splits = _splits(clips["key"], rows, excluded)
    doubtful = clips.take(pa.array(_doubtful(clips, splits, cfg, search)))
    hashed, keys = [], []
    for key, clip_id, video, audio in zip(*(doubtful[name].to_pylist() for name in _COLUMNS), strict=True):
        split = EXCLUDED_SPLIT if key in excluded else rows[key].split
        uri = rows[key].uri
        hashed.append(HashedClip(clip_id=clip_id, uri=uri, split=split, video_hash=video, audio_hash=audio))
        keys.append(key)
    return {keys[index]: found for index, found in find_duplicates(hashed, cfg, search).items()}


def _good(table: pa.Table, against: Container[str]) -> pa.Table:
    table = table.select([*_COLUMNS, "code"]).filter(table["code"].is_null()).drop_columns("code")
    return table.filter(pa.array([key not in against for key in table["key"].to_pylist()], pa.bool_()))


def _splits(keys: pa.ChunkedArray, rows: Mapping[str, ManifestRow], excluded: Collection[str]) -> np.ndarray:
    """int8 [N]: the rank of each clip's split."""
    ranks = np.empty(len(keys), np.int8)
    for place, key in enumerate(keys):
        split = EXCLUDED_SPLIT if (text := key.as_py()) in excluded else rows[text].split
        ranks[place] = SPLIT_RANK.get(split, len(SPLIT_RANK))
    return ranks


def _doubtful(clips: pa.Table, splits: np.ndarray, cfg: DuplicateConfig, search: Search) -> np.ndarray:
    """Places, ascending, of the clips whose content is there twice or that look and sound like another.

    No other clip is dropped, and none is dropped for it.
    """
    if not len(clips):
        return np.empty(0, np.int64)
    of_content = pc.dictionary_encode(clips["clip_id"].combine_chunks()).indices.to_numpy()
    order = np.argsort(splits, kind="stable")  # copies are told by the one that is kept first
    _, firsts, counts = np.unique(of_content[order], return_index=True, return_counts=True)
    firsts = order[firsts]
    alike = counts > 1
    video, audio = (_words(clips[name].take(pa.array(firsts))) for name in ("video_hash", "audio_hash"))
    pairs = search(video, audio, cfg)
    alike[pairs.reshape(-1)] = True
    return np.flatnonzero(alike[of_content])


def _words(hashes: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N, 4] of a column of 256-bit hashes, without an object for each."""
    parts = [np.empty((0, HASH_WORDS), np.uint64)]
    for chunk in hashes.cast(pa.binary(8 * HASH_WORDS)).chunks:
        flat = np.frombuffer(chunk.buffers()[1], np.uint64).reshape(-1, HASH_WORDS)
        parts.append(flat[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(parts)
