"""The search for near duplicates, spread over workers."""

from pathlib import Path

import numpy as np
import pytest

from aai import storage
from aai.media.duplicates import BANDS, DuplicateConfig, near_pairs, near_pairs_of
from pipelines.curation import near
from pipelines.curation.layout import NEAR
from pipelines.engine.cluster import shutdown
from pipelines.settings import ClusterConfig

CFG = DuplicateConfig()


def hashes(clips: int, copies: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random hashes uint64 [N, 4]; the last ones are copies of the first ones with some bits flipped."""
    rng = np.random.default_rng(seed)
    video, audio = rng.integers(0, 2**64, (2, clips, 4), dtype=np.uint64)
    for i in range(copies):
        for of, bits in ((video, i % 25), (audio, i % 65)):
            of[clips - 1 - i] = of[i]
            for bit in rng.choice(256, bits, replace=False):
                of[clips - 1 - i, bit // 64] ^= np.uint64(1 << int(bit % 64))
    return video, audio


def test_shares_of_the_work_add_up() -> None:
    video, audio = hashes(3000, 200)
    expected = near_pairs(video, audio, CFG)
    assert expected.tolist() == sorted([i, 2999 - i] for i in range(200))
    for parts in (1, 3, 7):
        shares = [near_pairs_of(video, audio, CFG, band, part, parts) for band in range(BANDS) for part in range(parts)]
        assert np.array_equal(np.unique(np.concatenate(shares), axis=0), expected)
        alone = [len(near_pairs_of(video, audio, CFG, 0, part, parts)) for part in range(parts)]
        assert sum(alone) == len(near_pairs_of(video, audio, CFG, 0)), "no pair is looked at twice"


def test_work_per_task_is_bounded() -> None:
    assert near.parts_of(near.SPREAD_FROM) == 1
    small, large = near.parts_of(10_000_000), near.parts_of(100_000_000)
    assert 90 < large / small < 110, "pairs grow with the square"


@pytest.mark.usefixtures("shards_here")
def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "SPREAD_FROM", 100)
    monkeypatch.setattr(near, "PAIRS_PER_TASK", 800)
    video, audio = hashes(1000, 60)
    storage.write_bytes(storage.join(str(tmp_path), NEAR, "pairs", "old.parquet"), b"left over by a killed run")
    found = near.spread_near_pairs(video, audio, CFG, str(tmp_path), ClusterConfig(num_workers=2))
    assert np.array_equal(found, near_pairs(video, audio, CFG))
    assert len(found) == 60
    assert not storage.list_files(storage.join(str(tmp_path), NEAR))


@pytest.mark.accept
def test_rays_workers_find_what_one_process_finds_among_many(tmp_path: Path) -> None:
    video, audio = hashes(near.SPREAD_FROM + 20_000, 500)
    try:
        found = near.spread_near_pairs(video, audio, CFG, str(tmp_path), ClusterConfig(num_workers=2))
    finally:
        shutdown()
    assert len(found) == 500
    assert np.array_equal(found, near_pairs(video, audio, CFG))
