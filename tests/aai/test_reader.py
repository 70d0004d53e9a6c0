"""The reader on a hand-made FeatureTable, and replayed at the size of VGGSound."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from aai import schema, storage
from aai.aligned import COLUMN, AlignedCache
from aai.errors import UserError
from aai.features import METADATA_KEY, FeatureManifest, hash64
from aai.media.waveform import encode_wav
from aai.reader import FeatureReader, joined, ranks_of, read_ahead
from pipelines.adapt import AdaptRecipe
from pipelines.align import AlignRecipe
from tests.aai.numbered import SAMPLES, numbers, row, write


def test_a_batch_holds_what_the_table_holds(tmp_path: Path) -> None:
    reader = FeatureReader(write(tmp_path), "train", 4, SAMPLES)
    batch = next(reader.batches())
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "audio": (4, SAMPLES),
        "image_features": (4, 2, 3),
        "text_features": (4, 1, 3),
        "latents": (4, 2, 2, 2),
        "caption_id": (4,),
        "clip_hash": (4,),
        "has_picture": (4,),
    }
    for i, number in enumerate(numbers(batch)):
        assert batch["clip_id"][i] == f"c{number}"
        assert batch["caption"][i] == f"word {number % 3}"
        assert batch["caption_id"][i] == hash64(f"word {number % 3}")
        assert batch["clip_hash"][i] == hash64(f"h{number}")
        assert (batch["latents"][i] == number).all()
        filled = SAMPLES // 2 if number % 2 else SAMPLES
        assert batch["audio"][i, :filled].tolist() == pytest.approx([number / 1024] * filled, abs=1e-4)
        assert (batch["audio"][i, filled:] == 0).all()


def test_ranks_share_an_epoch_without_overlap_and_in_equal_steps(tmp_path: Path) -> None:
    uri = write(tmp_path)
    readers = [FeatureReader(uri, "train", 3, SAMPLES, rank, 3) for rank in range(3)]
    assert [r.steps_per_epoch for r in readers] == [2, 2, 2]
    seen = [n for r in readers for batch in itertools.islice(r.batches(), 2) for n in numbers(batch)]
    assert len(seen) == len(set(seen)) == 18
    assert all(n % 3 != 2 for n in seen)


def test_epochs_differ_and_cover_everything(tmp_path: Path) -> None:
    reader = FeatureReader(write(tmp_path), "train", 2, SAMPLES)
    run = [numbers(batch) for batch in itertools.islice(reader.batches(), 20)]
    first, second = list(itertools.chain(*run[:10])), list(itertools.chain(*run[10:]))
    assert sorted(first) == sorted(second) == [n for n in range(30) if n % 3 != 2]
    assert first != second
    assert first != sorted(first)


def test_a_reader_of_few_columns_reads_no_others(tmp_path: Path) -> None:
    batch = next(FeatureReader(write(tmp_path), "train", 4, SAMPLES, columns=("latents",)).batches())
    assert batch.keys() == {"clip_id", "caption", "latents", "caption_id", "clip_hash", "has_picture"}
    assert batch["latents"].dtype == torch.float32


def test_any_step_can_be_reached_directly(tmp_path: Path) -> None:
    uri = write(tmp_path)
    whole = [numbers(b) for b in itertools.islice(FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(), 12)]
    later = FeatureReader(uri, "train", 4, SAMPLES, seed=5).batches(7)
    assert [numbers(b) for b in itertools.islice(later, 5)] == whole[7:]
    plain = FeatureReader(uri, "train", 4, SAMPLES)
    assert (np.concatenate(plain.order(1)) == np.concatenate(FeatureReader(uri, "train", 4, SAMPLES).order(1))).all()
    other = FeatureReader(uri, "train", 4, SAMPLES, seed=6).batches()
    assert [numbers(b) for b in itertools.islice(other, 12)] != whole


TRAIN = [n for n in range(30) if n % 3 != 2]


def test_each_rank_takes_consecutive_rows_of_one_order_of_row_groups(tmp_path: Path) -> None:
    uri = write(tmp_path)
    runs = []
    for epoch in (0, 1):
        orders = [FeatureReader(uri, "train", 3, SAMPLES, rank, 3).order(epoch) for rank in range(3)]
        parts = [np.concatenate(windows) for windows in orders]
        assert [part.shape for part in parts] == [(6, 2)] * 3
        assert len({tuple(row) for part in parts for row in part.tolist()}) == 18
        # Sorted within each rank, groups stand in one order: only the group at a border is two ranks'.
        groups = [set(part[:, 0].tolist()) for part in parts]
        assert len(groups[0] & groups[1]) <= 1
        assert not groups[0] & groups[2]
        runs.append([list(dict.fromkeys(part[:, 0].tolist())) for part in parts])
    assert runs[0] != runs[1]
    for size, steps in ((20, 1), (3, 6)):
        reader = FeatureReader(uri, "train", size, SAMPLES)
        assert (reader.steps_per_epoch, reader.num_rows) == (steps, 20)


def test_a_window_is_shuffled_anew_in_each_epoch_and_on_each_rank(tmp_path: Path) -> None:
    uri = write(tmp_path, shards=1, rows=5)  # a single row group
    reader = FeatureReader(uri, "train", 4, SAMPLES)
    assert len({tuple(reader.order(epoch)[0][:, 1].tolist()) for epoch in range(8)}) > 3
    ranks = [FeatureReader(write(tmp_path / "b"), "train", 10, SAMPLES, rank, 2) for rank in range(2)]
    runs = [np.argsort(reader.order(0)[0][:, 0] * 10 + reader.order(0)[0][:, 1]).tolist() for reader in ranks]
    assert runs[0] != runs[1]


@pytest.mark.parametrize(("shuffle_clips", "windows"), [(1, 6), (4, 3), (7, 3), (8, 2), (20, 1), (10_000, 1)])
def test_rows_are_shuffled_within_windows_of_whole_row_groups(tmp_path: Path, shuffle_clips: int, windows: int) -> None:
    """Row groups have 3 or 4 rows of the split."""
    reader = FeatureReader(write(tmp_path), "train", 20, SAMPLES, shuffle_clips=shuffle_clips)
    found = reader.order(0)
    assert abs(len(found) - windows) <= 1
    groups = [set(window[:, 0].tolist()) for window in found]
    assert sum(len(group) for group in groups) == len(set().union(*groups)) == 6
    assert all(len(window) >= shuffle_clips for window in found[:-1])
    for window in found:
        if len(window) > 4:
            assert window.tolist() != sorted(window.tolist())


def test_every_window_has_the_rows_of_the_whole_epoch_once(tmp_path: Path) -> None:
    uri = write(tmp_path)
    for shuffle_clips in (1, 5, 100):
        reader = FeatureReader(uri, "train", 2, SAMPLES, shuffle_clips=shuffle_clips)
        seen = [n for batch in itertools.islice(reader.batches(), 10) for n in numbers(batch)]
        assert sorted(seen) == TRAIN


def test_threads_change_nothing(tmp_path: Path) -> None:
    uri = write(tmp_path)
    runs = []
    for threads in (1, 5):
        reader = FeatureReader(uri, "train", 3, SAMPLES, shuffle_clips=5, threads=threads)
        runs.append([numbers(batch) for batch in itertools.islice(reader.batches(), 15)])
    assert runs[0] == runs[1]


def test_several_ranks_of_one_reader_are_those_of_several(tmp_path: Path) -> None:
    uri = write(tmp_path)
    alone = [FeatureReader(uri, "train", 2, SAMPLES, rank, 3, seed=5) for rank in range(3)]
    shared = [alone[0].of_rank(rank) for rank in range(3)]
    steps = [itertools.islice(zip(*(r.batches(1) for r in readers), strict=True), 5) for readers in (alone, shared)]
    for ours, theirs in zip(*steps, strict=True):
        assert [numbers(batch) for batch in ours] == [numbers(batch) for batch in theirs]
    whole = joined([reader.batches(1) for reader in alone[:2]])
    parts = zip(alone[0].batches(1), alone[1].batches(1), strict=True)
    for batch, (first, second) in zip(itertools.islice(whole, 5), parts, strict=False):
        a, b = numbers(first), numbers(second)
        assert numbers(batch) == [a[0], b[0], a[1], b[1]]
        assert batch["clip_id"] == [f"c{n}" for n in numbers(batch)]
        assert batch["audio"].shape == (4, SAMPLES)


def test_ranks_are_shared_out_evenly() -> None:
    for ranks in range(1, 9):
        for workers in range(1, ranks + 1):
            shares = [list(ranks_of(worker, workers, ranks)) for worker in range(workers)]
            assert list(itertools.chain(*shares)) == list(range(ranks))
            sizes = {len(share) for share in shares}
            assert max(sizes) - min(sizes) <= 1
            assert min(sizes) > 0


class Counting(FeatureReader):
    """Counts how often each row is decoded."""

    def _read(self, number: int, first: int, last: int) -> dict[str, Any]:
        with LOCK:
            READ.update((number, position) for position in range(first, last))
        return super()._read(number, first, last)


LOCK, READ = threading.Lock(), Counter[tuple[int, int]]()


@pytest.mark.parametrize("shuffle_clips", [1, 6, 100])
def test_no_row_is_decoded_twice_in_an_epoch(tmp_path: Path, shuffle_clips: int) -> None:
    uri = write(tmp_path)
    for rank in range(3):
        READ.clear()
        reader = Counting(uri, "train", 3, SAMPLES, rank, 3, shuffle_clips=shuffle_clips)
        batches = reader.batches()
        for _ in range(reader.steps_per_epoch):
            next(batches)
        batches.close()
        this = {tuple(row) for window in reader.order(0) for row in window.tolist()}
        begun = {tuple(row) for row in reader.order(1)[0].tolist()}  # the next epoch's first window
        assert Counter(this) + Counter(begun) == READ


def test_a_step_is_reached_without_reading_what_lies_before(tmp_path: Path) -> None:
    reader = Counting(write(tmp_path), "train", 4, SAMPLES, shuffle_clips=4)
    READ.clear()
    batch = next(reader.batches(4))
    assert len(numbers(batch)) == 4
    assert sum(READ.values()) <= 12  # the last window, and the next epoch's first


# ---------------------------------------------------------------- read ahead


def test_batches_are_made_ahead_and_in_order() -> None:
    made: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for number in range(100):
            made.append(number)
            yield {"n": number}

    ahead = read_ahead(batches(), ready=3)
    assert next(ahead) == {"n": 0}
    time.sleep(0.3)
    assert 3 <= len(made) <= 6
    assert [batch["n"] for batch in ahead] == list(range(1, 100))


def test_an_error_of_the_reader_reaches_the_training() -> None:
    def batches() -> Iterator[dict[str, Any]]:
        yield {"n": 0}
        raise OSError("the disk is gone")

    ahead = read_ahead(batches())
    assert next(ahead) == {"n": 0}
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def wait_for_the_end_of_its_thread() -> None:
    deadline_s = time.monotonic() + 60
    while any(thread.name == "read-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_its_thread_ends_with_the_training() -> None:
    ahead = read_ahead({"n": number} for number in itertools.count())
    next(ahead)
    ahead.close()
    wait_for_the_end_of_its_thread()


LEAVES = """
import itertools, torch
from aai.reader import read_ahead

def batches():
    for number in itertools.count():
        yield {"n": torch.stack([torch.stack([torch.rand(64)]) for _ in range(99)])}

ahead = read_ahead(batches(), ready=2)
next(ahead)
if %s:
    del ahead
raise SystemExit(3)
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_process_that_leaves_while_batches_are_made_is_not_aborted(closed: bool) -> None:
    """As the ranks of `aai bench align` were, now and then."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", LEAVES % closed], capture_output=True, timeout=120, check=False)
        assert done.returncode == 3, done.stderr.decode()


# ---------------------------------------------------------------- at the size of VGGSound

RUNS = Path(__file__).resolve().parents[2] / "runs" / "accept-reader"
ROWS_PER_FILE, FILES, CLIP_S, RATE_HZ = 1024, 180, 10, 16_000


def write_vggsound(folder: Path) -> str:
    """180 files of 1,024 clips with 10 s of noise, features of ViT-L/14 and embeddings, all links to two of each."""
    rng = np.random.default_rng(0)
    shapes = {"image_features": 4 * 768, "text_features": 768, "latents": 4 * 64 * 64}
    out = schema.feature_table(4, 768, 1, 768, 4 * 64 * 64).with_metadata({METADATA_KEY: b"d"})
    for name in ("a", "b"):
        clip = {**row(1, "train"), "duration_s": float(CLIP_S)}
        plain = [field for field in out if field.name not in shapes]
        columns = {field.name: pa.array([clip.get(field.name)] * ROWS_PER_FILE, field.type) for field in plain}
        sounds = rng.integers(-3000, 3000, (ROWS_PER_FILE, CLIP_S * RATE_HZ)).astype(np.int16)
        columns["audio"] = pa.array([encode_wav(sound, RATE_HZ) for sound in sounds], pa.binary())
        for key, size in shapes.items():
            flat = pa.array(rng.standard_normal(ROWS_PER_FILE * size).astype(np.float16))
            columns[key] = pa.FixedSizeListArray.from_arrays(flat, size)
        table = pa.table([columns[key] for key in out.names], schema=out)
        storage.write_table(str(folder / "made" / f"{name}.parquet"), table, compressed=False)
        flat = pa.array(rng.standard_normal(ROWS_PER_FILE * 768).astype(np.float32))
        embeddings = {"clip_id": table["clip_id"], COLUMN: pa.FixedSizeListArray.from_arrays(flat, 768)}
        storage.write_table(str(folder / "embedded" / f"{name}.parquet"), pa.table(embeddings), compressed=False)
    for made, place in (("made", "features"), ("embedded", "aligned")):
        (folder / place).mkdir()
        for number in range(FILES):
            source = folder / made / f"{'ab'[number % 2]}.parquet"
            os.link(source, folder / place / f"shard-{number:05d}.parquet")
    about = {"settings_digest": "d", "num_frames": 4, "image_dim": 768, "text_dim": 768, "latent_shape": (4, 64, 64)}
    manifest = FeatureManifest.read(write(folder / "small")).model_copy(update=about)
    storage.write_json(str(folder / "features" / "manifest.json"), manifest.model_dump(mode="json"))
    return str(folder / "features")


@pytest.mark.accept
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("stage", "columns", "clips", "step_s"),
    [("align", AlignRecipe.columns, 128, 0.5), ("adapt", AdaptRecipe.columns, 16, 0.25)],
)
def test_k3_one_of_eight_ranks_is_fed(
    stage: str, columns: tuple[str, ...], clips: int, step_s: float, tmp_path: Path
) -> None:
    """184,320 clips of 10 s; one rank with six threads, its steps as long as a GPU's."""
    features, cache = write_vggsound(tmp_path), AlignedCache(str(tmp_path / "aligned"), "a")
    reader = Counting(features, "train", clips, CLIP_S * RATE_HZ, 3, 8, columns=columns, threads=6, cache=cache)
    assert reader.num_rows == 184_320
    READ.clear()
    free = read_ahead(reader.batches())
    next(free)  # the first window is there
    begin_s, steps = time.monotonic(), 4 * 2048 // clips
    for _ in range(steps):
        next(free)
    clips_per_s = steps * clips / (time.monotonic() - begin_s)
    free.close()
    wait_for_the_end_of_its_thread()
    READ.clear()
    fed, waits_s, steps = read_ahead(reader.batches()), [], min(reader.steps_per_epoch, 240)
    next(fed)
    for _ in range(steps):
        time.sleep(step_s)
        asked_s = time.monotonic()
        next(fed)
        waits_s.append(time.monotonic() - asked_s)
    fed.close()
    share = sum(waits_s) / (sum(waits_s) + steps * step_s)
    found = {
        "clips_per_s": round(clips_per_s),
        "asked_per_s": round(clips / step_s),
        "steps": steps,
        "wait_share": round(share, 4),
        "longest_stall_s": round(max(waits_s), 3),
        "rows_decoded_twice": sum(count > 1 for count in READ.values()),
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{stage}.json").write_text(json.dumps(found, indent=1))
    print(stage, found)
    assert found["wait_share"] <= 0.05, found
    assert found["rows_decoded_twice"] == 0, found


def test_clips_without_a_picture_are_marked_or_left_out(tmp_path: Path) -> None:
    uri = write(tmp_path, bare_every=5)
    bare = [n for n in TRAIN if n % 5 == 0]
    for batch in itertools.islice(FeatureReader(uri, "train", 4, SAMPLES).batches(), 10):
        assert batch["has_picture"].tolist() == [n not in bare for n in numbers(batch)]
    reader = FeatureReader(uri, "train", 4, SAMPLES, pictures_only=True)
    assert (reader.num_rows, reader.steps_per_epoch) == (16, 4)
    epoch = [n for batch in itertools.islice(reader.batches(), 4) for n in numbers(batch)]
    assert sorted(epoch) == [n for n in TRAIN if n not in bare]
    with pytest.raises(UserError, match=r"batch_size=17: is more than the 16 rows of split 'train' with a picture"):
        FeatureReader(uri, "train", 17, SAMPLES, pictures_only=True)
