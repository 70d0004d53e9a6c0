"""Doubles told from columns are those that are told clip by clip."""

import numpy as np
import pyarrow as pa
import pytest

from aai.media.duplicates import EXCLUDED_SPLIT, DuplicateConfig, HashedClip, find_duplicates, near_pairs
from pipelines.curation.doubles import find_doubles
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.row import ManifestRow

CFG = DuplicateConfig()


def clips(seed: int, count: int = 400) -> tuple[TableSlices, dict[str, ManifestRow]]:
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
    rows, shards = {}, TableSlices()
    for start in range(0, count, 50):
        keys = [f"k{number:04d}" for number in range(start, start + 50)]
        bad = rng.random(50) < 0.1
        columns = {"key": keys, "clip_id": ids[start : start + 50], "code": np.where(bad, "TORN", None).tolist()}
        for name, part in (("video_hash", slice(0, 32)), ("audio_hash", slice(32, 64))):
            values = [hashed[part] for hashed in hashes[start : start + 50]]
            columns[name] = [None if is_bad else value for value, is_bad in zip(values, bad, strict=True)]
        schema = pa.schema({name: pa.binary() if "hash" in name else pa.string() for name in columns})
        shards.add(f"shard-{start}", pa.table(columns, schema=schema))
        for key in keys:
            split = str(rng.choice(["train", "val", "test"], p=[0.6, 0.2, 0.2]))
            rows[key] = ManifestRow(uri=f"/{key}.mp4", split=split)
    return shards, rows


def one_by_one(
    shards: TableSlices, rows: dict[str, ManifestRow], against: set[str], excluded: set[str]
) -> dict[str, tuple[str, str]]:
    """All clips as objects."""
    keys, hashed = [], []
    for table in shards.values():
        for row in table.to_pylist():
            key, code = row.pop("key"), row.pop("code")
            if code is None and key not in against:
                split = EXCLUDED_SPLIT if key in excluded else rows[key].split
                hashed.append(HashedClip(**row, uri=rows[key].uri, split=split))
                keys.append(key)
    return {keys[index]: found for index, found in find_duplicates(hashed, CFG).items()}


@pytest.mark.parametrize("seed", range(8))
def test_the_same_clips_are_dropped_for_the_same_ones(seed: int) -> None:
    shards, rows = clips(seed)
    rng = np.random.default_rng(seed)
    against = set(rng.choice(list(rows), 40, replace=False))
    for excluded in (set(), set(rng.choice(list(rows), 10, replace=False))):
        expected = one_by_one(shards, rows, against, excluded)
        assert len(expected) > 40
        assert len({code for code, _ in expected.values()}) >= 3
        assert find_doubles(shards, rows, against, excluded, CFG, near_pairs) == expected


def test_few_clips_are_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shards, rows = clips(0, 400)
    seen: list[int] = []

    def watched(clips: list[HashedClip], *args: object) -> dict[int, tuple[str, str]]:
        seen.append(len(clips))
        return {}

    monkeypatch.setattr("pipelines.curation.doubles.find_duplicates", watched)
    find_doubles(shards, rows, (), (), CFG, near_pairs)
    assert 0 < seen[0] < 250


def test_nothing_to_compare() -> None:
    shards, rows = clips(0, 50)
    assert find_doubles(shards, rows, (), (), CFG.model_copy(update={"enabled": False}), near_pairs) == {}
    assert find_doubles(shards, rows, set(rows), (), CFG, near_pairs) == {}


def test_hashes_may_be_let_go() -> None:
    shards, rows = clips(1)
    kept = find_doubles(shards, rows, (), (), CFG, near_pairs)
    assert find_doubles(shards, rows, (), (), CFG, near_pairs, let_go=True) == kept
    assert shards["shard-50"].column_names == ["key", "clip_id", "code"]
