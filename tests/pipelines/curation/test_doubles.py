"""Doubles told from columns are those that are told clip by clip."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aai.media.duplicates import EXCLUDED_SPLIT, DuplicateConfig, HashedClip, NamedClip, find_duplicates, near_pairs
from pipelines.curation.doubles import find_doubles
from pipelines.curation.near import HASHED, PrintSource, prints_of
from pipelines.curation.spilled import SpilledTables
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.row import ManifestRow

PICTURED = ("video_hash", "picture_print")
CFG = DuplicateConfig()


def search(source: PrintSource, cfg: DuplicateConfig) -> np.ndarray:
    """In this process."""
    return near_pairs(prints_of(source.tables()), cfg)


def clips(seed: int, count: int = 400) -> tuple[TableSlices, SpilledTables, dict[str, ManifestRow]]:
    """Shards of clips by key with chains of near copies, exact copies (of other splits, too), and undecodable ones."""
    rng = np.random.default_rng(seed)
    hashes = [rng.bytes(64) for _ in range(count)]
    ids = [f"id{number:04d}" for number in rng.permutation(count)]
    for _ in range(count // 4):
        to, of = rng.integers(0, count, 2)
        bits = np.unpackbits(np.frombuffer(hashes[of], np.uint8))
        bits[rng.choice(256, rng.integers(0, 20), replace=False)] ^= 1
        hashes[to] = np.packbits(bits).tobytes()
        if rng.random() < 0.3:
            ids[to] = ids[of]
            hashes[to] = hashes[of]
    sounds = [rng.integers(1, 2**32, 40, np.uint32) for _ in range(count)]
    for _ in range(count // 20):  # a copy that begins a little later, with other hashes
        to, of = rng.integers(0, count, 2)
        if ids[to] != ids[of]:
            sounds[to] = np.concatenate([sounds[of][3:], sounds[to][:3]])
    prints = {ids[number]: (rng.bytes(216), sounds[number].tobytes()) for number in range(count)}
    unseen = {name for name in sorted(set(ids)) if rng.random() < 0.2}
    rows, shards, spilled = {}, TableSlices(), SpilledTables()
    for start in range(0, count, 50):
        keys = [f"k{number:04d}" for number in range(start, start + 50)]
        bad = rng.random(50) < 0.1
        here = ids[start : start + 50]
        columns = {"key": keys, "clip_id": here, "code": np.where(bad, "TORN", None).tolist()}
        columns["duration_s"] = [2.56] * 50
        seen = [name not in unseen for name in here]
        columns["motion"] = pa.array([1.0 if is_video else None for is_video in seen], pa.float64())
        hashed: dict[str, list[Any]] = {"key": keys}
        for name, part in (("video_hash", slice(0, 32)), ("audio_hash", slice(32, 64))):
            hashed[name] = [both[part] for both in hashes[start : start + 50]]
        hashed["picture_print"] = [prints[name][0] for name in here]
        hashed["sound_print"] = [prints[name][1] for name in here]
        for name in HASHED:
            gone = [is_bad or (name in PICTURED and not is_video) for is_bad, is_video in zip(bad, seen, strict=True)]
            values = [None if is_gone else value for value, is_gone in zip(hashed[name], gone, strict=True)]
            hashed[name] = pa.array(values, pa.binary())
        columns["code"] = pa.array(columns["code"], pa.string())
        shards.add(f"shard-{start}", pa.table(columns))
        spilled.add(f"shard-{start}", pa.table(hashed))
        for key in keys:
            split = str(rng.choice(["train", "val", "test"], p=[0.6, 0.2, 0.2]))
            rows[key] = ManifestRow(uri=f"/{key}.mp4", split=split)
    return shards, spilled, rows


def one_by_one(
    shards: TableSlices, spilled: SpilledTables, rows: dict[str, ManifestRow], against: set[str], excluded: set[str]
) -> dict[str, tuple[str, str]]:
    """All clips as objects."""
    keys, hashed = [], []
    for name, table in shards.items():
        for row, more in zip(table.to_pylist(), spilled[name].to_pylist(), strict=True):
            row |= more
            key, code = row.pop("key"), row.pop("code")
            if code is None and key not in against:
                split = EXCLUDED_SPLIT if key in excluded else rows[key].split
                row["is_video"] = row.pop("motion") is not None
                row["video_hash"] = row["video_hash"] or bytes(32)
                hashed.append(HashedClip(**row, uri=rows[key].uri, split=split))
                keys.append(key)
    return {keys[index]: found for index, found in find_duplicates(hashed, CFG).items()}


@pytest.mark.parametrize("seed", range(8))
def test_the_same_clips_are_dropped_for_the_same_ones(seed: int) -> None:
    shards, spilled, rows = clips(seed)
    rng = np.random.default_rng(seed)
    against = set(rng.choice(list(rows), 40, replace=False))
    for excluded in (set(), set(rng.choice(list(rows), 10, replace=False))):
        expected = one_by_one(shards, spilled, rows, against, excluded)
        assert len(expected) > 30
        assert len({code for code, _ in expected.values()}) >= 3
        assert find_doubles(shards, spilled, rows, against, excluded, CFG, search) == expected


def test_few_clips_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, spilled, rows = clips(0, 400)
    seen: list[int] = []

    def watched(clips: list[NamedClip], *args: object) -> dict[int, tuple[str, str]]:
        seen.append(len(clips))
        return {}

    monkeypatch.setattr("pipelines.curation.doubles.dropped", watched)
    find_doubles(shards, spilled, rows, (), (), CFG, search)
    assert 0 < seen[0] < 250


def test_nothing_to_compare() -> None:
    shards, spilled, rows = clips(0, 50)
    assert find_doubles(shards, spilled, rows, (), (), CFG.model_copy(update={"enabled": False}), search) == {}
    assert find_doubles(shards, spilled, rows, set(rows), (), CFG, search) == {}
