"""Which clips of a curation are doubles: found in columns, and only what may be one is looked at clip by clip."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aai.media.duplicates import EXCLUDED_SPLIT, DuplicateConfig, NamedClip, dropped, rank_of
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.near import PrintSource, print_table
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.row import ManifestRow

log = logging.getLogger(__name__)

Tables = Mapping[str, pa.Table]
"""By shard."""
Search = Callable[[PrintSource, DuplicateConfig], np.ndarray]
"""Index pairs int64 [P, 2] of clips that are alike."""


def find_doubles(
    measured: TableSlices,
    prints: Tables,
    rows: Mapping[str, ManifestRow],
    against: Container[str],
    excluded: Collection[str],
    cfg: DuplicateConfig,
    search: Search,
) -> dict[str, tuple[str, str]]:
    """{key: (code, message)}, as `find_duplicates` says it of all decoded clips that are not in `against`.

    measured: by shard; prints: HASHED by shard; rows: by key. excluded: keys of clips that are of a split that wins.
    """
    if not cfg.enabled:
        return {}
    clips = _compared(measured, rows, against, excluded)
    copies = _Copies(clips.ids, clips.ranks)
    groups = clips.groups[copies.firsts]
    source = PrintSource(len(groups), lambda: _tables(measured, prints, against, copies, groups))
    pairs = search(source, cfg)
    places = copies.doubtful(pairs)
    keys = [key for _, key in _keys_at(measured, against, places)]
    named = []
    for place, key in zip(places.tolist(), keys, strict=True):
        split = EXCLUDED_SPLIT if key in excluded else rows[key].split
        is_video = bool(clips.ranks[place] % 2 == 0)
        named.append(NamedClip(clip_id=clips.ids[place], uri=rows[key].uri, split=split, is_video=is_video))
    near = _near(pairs, copies, places, named)
    return {keys[index]: found for index, found in dropped(named, near).items()}


def _good(table: pa.Table, names: Collection[str], against: Container[str]) -> pa.Table:
    """Columns of the clips of a shard that are compared."""
    table = table.select(["key", "code", *names])
    table = table.filter(table["code"].is_null())
    return table.filter(pa.array([key not in against for key in table["key"].to_pylist()], pa.bool_()))


@dataclass(frozen=True)
class _Compared:
    """The N clips that are compared, in the order of their tables."""

    ids: ClipKeys
    ranks: np.ndarray
    """int8 [N], see `rank_of`."""
    groups: np.ndarray
    """int64 [N], equal for clips of one file and split."""


def _compared(
    measured: TableSlices, rows: Mapping[str, ManifestRow], against: Container[str], excluded: Collection[str]
) -> _Compared:
    ids, ranks, groups = [ClipKeys([])], [np.empty(0, np.int8)], [np.empty(0, np.int64)]
    for table in measured.values():
        good = _good(table, ["clip_id", "motion"], against)
        ids.append(ClipKeys.of_column(good["clip_id"]))
        of_split, of_file = [], []
        for key, is_video in zip(good["key"].to_pylist(), good["motion"].is_valid().to_pylist(), strict=True):
            row = rows[key]
            split = EXCLUDED_SPLIT if key in excluded else row.split
            of_split.append(rank_of(split, is_video))
            of_file.append(_number(f"{split} {row.uri}"))
        ranks.append(np.array(of_split, np.int8))
        groups.append(np.array(of_file, np.int64))
    return _Compared(ClipKeys.joined(ids), np.concatenate(ranks), np.concatenate(groups))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


class _Copies:
    """Clips of the same content: only the one that is kept first is compared with others.

    Contents are numbered in the order in which they are kept: where many share a word of their sounds, the first is
    compared with all of them.
    """

    def __init__(self, ids: ClipKeys, ranks: np.ndarray) -> None:
        order = np.argsort(ranks, kind="stable")
        _, firsts, of, counts = np.unique(ids.packed[order], return_index=True, return_inverse=True, return_counts=True)
        firsts = order[firsts]
        by_rank = np.argsort(ranks[firsts], kind="stable")  # which leaves those of one rank in the order of their ids
        self.firsts, self.counts = firsts[by_rank], counts[by_rank]
        """int64 [U]: where each content stands first, and how often."""
        number = np.empty(len(by_rank), np.int32)
        number[by_rank] = np.arange(len(by_rank))
        self.of = np.empty(len(order), np.int32)
        self.of[order] = number[of]
        """int32 [N]: the number of each clip's content, of which there are U."""

    def doubtful(self, pairs: np.ndarray) -> np.ndarray:
        """Places, ascending, of the clips whose content is there twice or that look and sound like another.

        pairs: of contents that are alike. No other clip is dropped, and none is dropped for it.
        """
        alike = self.counts > 1
        alike[pairs.reshape(-1)] = True
        return np.flatnonzero(alike[self.of])


def _tables(
    measured: TableSlices, prints: Tables, against: Container[str], copies: _Copies, groups: np.ndarray
) -> Iterator[pa.Table]:
    """The prints of each content, of `near.PRINT_TABLE`; a part of them at a time."""
    start, unprinted = 0, 0
    for name, table in measured.items():
        good = _good(table, ["duration_s"], against)
        here = slice(start, start := start + len(good))
        first = np.flatnonzero(copies.firsts[copies.of[here]] == np.arange(here.start, here.stop))
        numbers = copies.of[here][first]
        good = good.take(pa.array(first))
        of_shard = prints[name]
        of_shard = of_shard.take(pc.index_in(good["key"], of_shard["key"].combine_chunks()).combine_chunks())
        unprinted += of_shard["sound_print"].null_count
        yield print_table(numbers, of_shard, good["duration_s"], groups[numbers])
    if unprinted:
        log.warning(
            "curate: %d of %d clips were measured by a version that made no prints: edited copies of them are not "
            "looked for; curate into another out to measure them anew",
            unprinted,
            len(groups),
        )


def _keys_at(measured: TableSlices, against: Container[str], places: np.ndarray) -> Iterator[tuple[int, str]]:
    """The keys of the clips at these places, which ascend, of all that are compared."""
    start = 0
    for table in measured.values():
        keys = _good(table, [], against)["key"]
        here = places[np.searchsorted(places, start) : np.searchsorted(places, start + len(keys))]
        yield from zip(here.tolist(), keys.take(pa.array(here - start)).to_pylist(), strict=True)
        start += len(keys)


def _near(pairs: np.ndarray, copies: _Copies, places: np.ndarray, named: list[NamedClip]) -> dict[str, list[int]]:
    """{clip_id: the clips, by their place among `named`, that are like it}."""
    index = {place: number for number, place in enumerate(places.tolist())}
    near: dict[str, list[int]] = defaultdict(list)
    for left, right in pairs.tolist():
        one, other = (index[int(copies.firsts[number])] for number in (left, right))
        near[named[one].clip_id].append(other)
        near[named[other].clip_id].append(one)
    return near
