"""The search for near duplicates, spread over workers."""

import resource
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aai import storage
from aai.media.duplicates import BANDS, DuplicateConfig, near_pairs, near_pairs_of
from aai.media.edited import Prints
from pipelines.curation import near
from pipelines.curation.layout import NEAR
from pipelines.engine.cluster import shutdown
from pipelines.settings import ClusterConfig

CFG = DuplicateConfig()


def prints(clips: int, copies: int, cut: int = 0, words: int = 20, seed: int = 0) -> Prints:
    """Random prints; the last clips are copies of the first ones with some bits flipped. `cut` clips in the middle have
    the sound and the pictures of the one after them, but for a beginning, and another hash."""
    rng = np.random.default_rng(seed)
    video, audio = rng.integers(0, 2**64, (2, clips, 4), dtype=np.uint64)
    for i in range(copies):
        for of, bits in ((video, i % 25), (audio, i % 65)):
            of[clips - 1 - i] = of[i]
            for bit in rng.choice(256, bits, replace=False):
                of[clips - 1 - i, bit // 64] ^= np.uint64(1 << int(bit % 64))
    pictures = rng.integers(0, 2**64, (clips, 27), dtype=np.uint64)
    sounds = rng.integers(1, 2**32, (clips, words), dtype=np.uint32)
    for i in range(clips // 2, clips // 2 + 2 * cut, 2):
        sounds[i, :-5], pictures[i] = sounds[i + 1, 5:], pictures[i + 1]
    return Prints(
        video=video,
        audio=audio,
        pictures=pictures,
        words=sounds.reshape(-1),
        starts=np.arange(clips + 1) * words,
        duration_s=np.full(clips, words * 0.064),
        group=np.arange(clips),
        is_video=np.ones(clips, bool),
    )


def source(data: Prints, at_once: int = 300) -> near.PrintSource:
    """The prints as measured columns, in tables whose clips are not in order; the first clip has none of today's."""
    order = np.random.default_rng(0).permutation(len(data.video))

    def tables() -> Iterator[pa.Table]:
        for start in range(0, len(order), at_once):
            here = order[start : start + at_once]
            sounds = [data.words[data.starts[i] : data.starts[i + 1]].tobytes() for i in here]
            columns = [[row.tobytes() for row in values[here]] for values in (data.video, data.audio, data.pictures)]
            hashed = pa.table([pa.array(column, pa.binary()) for column in (*columns, sounds)], list(near.HASHED))
            duration_s = pa.chunked_array([data.duration_s[here]])
            # What a worker wrote, and a reader filtered, begins anywhere in its buffers.
            padded = pa.concat_tables([hashed.slice(0, 1), hashed]).combine_chunks().slice(1)
            yield near.print_table(here, padded, duration_s, data.group[here])

    return near.PrintSource(len(order), tables)


def test_prints_come_back_by_number_out_of_measured_columns() -> None:
    data = prints(700, 10)
    for at_once in (1, 300, 700):
        found = near.prints_of(source(data, at_once).tables())
        for field in fields(Prints):
            assert np.array_equal(getattr(found, field.name), getattr(data, field.name)), field.name
    nothing = pa.table({name: pa.array([bytes(32), None], pa.binary()) for name in near.HASHED})
    nothing = nothing.set_column(2, "picture_print", pa.nulls(2, pa.binary()))
    nothing = nothing.set_column(3, "sound_print", pa.nulls(2, pa.binary()))
    found = near.prints_of([near.print_table(np.arange(2), nothing, pa.chunked_array([[1.0, 2.0]]), np.arange(2))])
    assert (found.starts.tolist(), found.pictures.any()) == ([0, 0, 0], False)
    assert len(near.prints_of([]).video) == 0


def test_shares_of_the_work_add_up() -> None:
    data = prints(3000, 200)
    expected = near_pairs(data, CFG)
    assert expected.tolist() == sorted([i, 2999 - i] for i in range(200))
    for parts in (1, 3, 7):
        shares = [near_pairs_of(data, CFG, band, part, parts) for band in range(BANDS) for part in range(parts)]
        assert np.array_equal(np.unique(np.concatenate(shares), axis=0), expected)
        alone = [len(near_pairs_of(data, CFG, 0, part, parts)) for part in range(parts)]
        assert sum(alone) == len(near_pairs_of(data, CFG, 0)), "no pair is looked at twice"


def test_work_per_task_is_bounded() -> None:
    assert near.parts_of(near.SPREAD_FROM) == 1
    small, large = near.parts_of(10_000_000), near.parts_of(100_000_000)
    assert 90 < large / small < 110, "pairs grow with the square"


@pytest.mark.usefixtures("shards_here")
def test_workers_find_what_one_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "SPREAD_FROM", 100)
    monkeypatch.setattr(near, "PAIRS_PER_TASK", 800)
    monkeypatch.setattr(near, "WORDS_PER_TASK", 3000)
    monkeypatch.setattr(near, "PART_ROWS", 500)
    data = prints(1000, 60, cut=30)
    storage.write_bytes(storage.join(str(tmp_path), NEAR, "pairs", "old.parquet"), b"left over by a killed run")
    found = near.spread_near_pairs(source(data), CFG, str(tmp_path), ClusterConfig(num_workers=2))
    assert np.array_equal(found, near_pairs(data, CFG))
    assert len(found) == 60 + 30
    assert not storage.list_files(storage.join(str(tmp_path), NEAR))


@pytest.mark.usefixtures("shards_here")
def test_shards_without_a_clip_to_compare_may_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "SPREAD_FROM", 100)
    monkeypatch.setattr(near, "PART_ROWS", 300)
    data = prints(600, 10)
    full = source(data)

    def tables() -> Iterator[pa.Table]:
        empty = near.PRINT_TABLE.empty_table()
        yield from (empty, *full.tables(), empty)

    found = near.spread_near_pairs(near.PrintSource(600, tables), CFG, str(tmp_path), ClusterConfig(num_workers=2))
    assert np.array_equal(found, near_pairs(data, CFG))
    assert len(found) == 10


@pytest.mark.accept
def test_rays_workers_find_what_one_process_finds_among_many(tmp_path: Path) -> None:
    """200,000 clips of 10 s: what the search costs stands in the output."""
    data = prints(200_000, 500, cut=500, words=150)
    began = time.monotonic()
    expected = near_pairs(data, CFG)
    alone_s, began = time.monotonic() - began, time.monotonic()
    try:
        found = near.spread_near_pairs(source(data), CFG, str(tmp_path), ClusterConfig(num_workers=2))
    finally:
        shutdown()
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"one process {alone_s:.0f} s, two workers {time.monotonic() - began:.0f} s, {peak_gb:.1f} GB")
    assert len(found) == 500 + 500
    assert np.array_equal(found, expected)
