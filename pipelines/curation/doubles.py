"""Which clips of a curation are doubles: found in columns, and only what may be one is looked at clip by clip."""

from collections.abc import Collection, Container, Iterator, Mapping

import numpy as np
import pyarrow as pa

from aai.media.duplicates import (
    EXCLUDED_SPLIT,
    SPLIT_RANK,
    DuplicateConfig,
    HashedClip,
    Search,
    find_duplicates,
)
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.row import ManifestRow

HASHES = ("video_hash", "audio_hash")
HASH_WORDS = 4
"""Of 64 bits, in a hash."""


def find_doubles(
    measured: TableSlices,
    rows: Mapping[str, ManifestRow],
    against: Container[str],
    excluded: Collection[str],
    cfg: DuplicateConfig,
    search: Search,
    let_go: bool = False,
) -> dict[str, tuple[str, str]]:
    """{key: (code, message)}, as `find_duplicates` says it of all decoded clips that are not in `against`.

    measured: by shard; rows: by key. excluded: keys of clips that are of a split that wins. let_go: `measured` loses
    its hashes before the search, which many clips need the memory for.
    """
    if not cfg.enabled:
        return {}
    ids, ranks = _contents(measured, rows, against, excluded)
    copies = _Copies(ids, ranks)
    video, audio = (_words(measured, name, against, copies) for name in HASHES)
    if let_go:
        measured.drop_columns(HASHES)
    doubtful = copies.doubtful(search(video, audio, cfg))
    hashed, keys = [], []
    for place, key in _keys_at(measured, against, doubtful):
        split = EXCLUDED_SPLIT if key in excluded else rows[key].split
        first = copies.of[place]
        hashes = {"video_hash": video[first].tobytes(), "audio_hash": audio[first].tobytes()}
        hashed.append(HashedClip(clip_id=ids[place], uri=rows[key].uri, split=split, **hashes))
        keys.append(key)
    return {keys[index]: found for index, found in find_duplicates(hashed, cfg, search).items()}


def _good(table: pa.Table, names: Collection[str], against: Container[str]) -> pa.Table:
    """Columns of the clips of a shard that are compared."""
    table = table.select(["key", "code", *names])
    table = table.filter(table["code"].is_null())
    return table.filter(pa.array([key not in against for key in table["key"].to_pylist()], pa.bool_()))


def _contents(
    measured: TableSlices, rows: Mapping[str, ManifestRow], against: Container[str], excluded: Collection[str]
) -> tuple[ClipKeys, np.ndarray]:
    """The clip ids of all clips that are compared, and int8 [N]: the rank of each one's split."""
    ids, ranks = [ClipKeys([])], [np.empty(0, np.int8)]
    for table in measured.values():
        good = _good(table, ["clip_id"], against)
        ids.append(ClipKeys.of_column(good["clip_id"]))
        splits = [EXCLUDED_SPLIT if key in excluded else rows[key].split for key in good["key"].to_pylist()]
        ranks.append(np.array([SPLIT_RANK.get(split, len(SPLIT_RANK)) for split in splits], np.int8))
    return ClipKeys.joined(ids), np.concatenate(ranks)


class _Copies:
    """Clips of the same content: only the one that is kept first is compared with others."""

    def __init__(self, ids: ClipKeys, ranks: np.ndarray) -> None:
        order = np.argsort(ranks, kind="stable")
        _, firsts, of, self.counts = np.unique(
            ids.packed[order], return_index=True, return_inverse=True, return_counts=True
        )
        self.of = np.empty(len(order), np.int32)
        self.of[order] = of
        """int32 [N]: the number of each clip's content, of which there are U."""
        self.is_first = np.zeros(len(order), bool)
        self.is_first[order[firsts]] = True

    def doubtful(self, pairs: np.ndarray) -> np.ndarray:
        """Places, ascending, of the clips whose content is there twice or that look and sound like another.

        pairs: of contents that are alike. No other clip is dropped, and none is dropped for it.
        """
        alike = self.counts > 1
        alike[pairs.reshape(-1)] = True
        return np.flatnonzero(alike[self.of])


def _words(measured: TableSlices, name: str, against: Container[str], copies: _Copies) -> np.ndarray:
    """uint64 [U, 4]: a 256-bit hash of each content, without an object for each."""
    words, start = np.zeros((len(copies.counts), HASH_WORDS), np.uint64), 0
    for table in measured.values():
        hashes = _good(table, [name], against)[name].combine_chunks().cast(pa.binary(8 * HASH_WORDS))
        end = start + len(hashes)
        if len(hashes):
            flat = np.frombuffer(hashes.buffers()[1], np.uint64).reshape(-1, HASH_WORDS)[hashes.offset :][: len(hashes)]
            first = copies.is_first[start:end]
            words[copies.of[start:end][first]] = flat[first]
        start = end
    return words


def _keys_at(measured: TableSlices, against: Container[str], places: np.ndarray) -> Iterator[tuple[int, str]]:
    """The keys of the clips at these places, which ascend, of all that are compared."""
    start = 0
    for table in measured.values():
        keys = _good(table, [], against)["key"]
        here = places[np.searchsorted(places, start) : np.searchsorted(places, start + len(keys))]
        yield from zip(here.tolist(), keys.take(pa.array(here - start)).to_pylist(), strict=True)
        start += len(keys)
