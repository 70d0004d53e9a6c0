"""One worker's rows, the watch that stops a bad job, and what is known from earlier runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.errors import UserError
from aai.media.limits import DecodeConfig
from aai.media.measure import kind_of, measure_bytes
from aai.media.ranged import hash_of
from pipelines import curate
from pipelines.curation import measuring
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.known_clips import write_known
from pipelines.curation.layout import KNOWN, MEASURED, shard_file
from pipelines.curation.ledger import Entry
from pipelines.curation.measuring import MeasureResult, MeasureShard, MeasureWorker
from pipelines.engine import ranges
from tests.clips import make_clip, make_moving
from tests.hostile import png


def measure(out: Path, name: str, clips: Sequence[Entry]) -> MeasureResult:
    """What a worker makes of a shard; its filters refuse what is shorter than half a second."""
    worker = MeasureWorker(str(out), DecodeConfig().model_dump(), {"min_duration_s": 0.5})
    return worker(MeasureShard(name=name, rows=len(clips), clips=list(clips)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry], MeasureResult]:
    """Two windows of a clip around a missing file, one that is no clip, and a window too short."""
    out = tmp_path_factory.mktemp("measured")
    good, bad = f"{out}/good.mp4", f"{out}/bad.mp4"
    storage.write_bytes(good, make_clip())
    storage.write_bytes(bad, b"no clip")
    clips = [
        Entry("k0", good, None, None), Entry("k1", f"{out}/gone.mp4", None, None), Entry("k2", bad, None, None),
        Entry("k3", good, 0.5, 1.5), Entry("k4", good, 1.0, 1.2),
    ]  # fmt: skip
    return out, clips, measure(out, "shard-00000", clips)


@pytest.mark.parametrize("film_cache_gb", [16, 0])
def test_a_film_on_s3_is_fetched_once_by_a_whole_run(
    tmp_path: Path, s3: str, shards_here: None, monkeypatch: pytest.MonkeyPatch, film_cache_gb: int
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data = make_moving(num_frames=100, size=(320, 240))
    monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", len(data) // 20)
    storage.write_bytes(f"{s3}/clips/film.mp4", data)
    read, sizes = storage.read_range, []

    def counted(uri: str, start: int, end: int) -> bytes:
        sizes.append(end - start)
        return read(uri, start, end)

    monkeypatch.setattr(storage, "read_range", counted)
    settings = {"manifest": f"{s3}/clips", "out": f"{s3}/out", "decode": {"frame_size_px": 32}, "rows_per_shard": 1}
    cut = {"mode": "windows", "window_s": 3, "min_s": 1}
    config = CurateConfig.parse({**settings, "cut": cut, "film_cache_gb": film_cache_gb, "max_reject_ratio": 1})
    assert curate.run(config)["rows_in"] == 2
    assert (sum(sizes) == len(data)) == (film_cache_gb > 0), f"{sum(sizes)} of {len(data)} bytes"
    assert not list(tmp_path.glob("aai-blocks-*")), "they go when the last clip is measured"


def test_every_clip_has_its_row_in_order_good_or_not(measured: tuple[Path, list[Entry], MeasureResult]) -> None:
    out, _, result = measured
    rows = storage.read_table(shard_file(str(out), MEASURED, "shard-00000")).to_pylist()
    assert [(row["key"], row["code"]) for row in rows] == [
        ("k0", None), ("k1", "MISSING_FILE"), ("k2", "UNREADABLE"), ("k3", None), ("k4", None),
    ]  # fmt: skip
    assert [row["stage"] for row in rows][1:3] == ["read", "decode"]
    assert [rows[i]["duration_s"] for i in (0, 3, 4)] == pytest.approx([2.0, 1.0, 0.2], abs=0.06)
    assert (result.rows, result.rejected, result.reused) == (5, 3, 0)


def test_the_same_content_and_window_is_taken_from_earlier_shards(
    measured: tuple[Path, list[Entry], MeasureResult], tmp_path: Path
) -> None:
    out, clips, _ = measured
    write_known(str(out), {"shard-00000"})
    known = storage.read_table(f"{out}/{KNOWN}")
    assert sorted(known["row"].to_pylist()) == [0, 3, 4]  # what could not be decoded is tried again
    copy = f"{tmp_path}/copy.mp4"
    storage.write_bytes(copy, storage.read_bytes(clips[0].uri))
    again = [Entry("a", copy, 0.5, 1.5), Entry("b", copy, 0.0, 1.5), Entry("c", copy, None, None)]
    assert measure(out, "shard-00001", again).reused == 2
    before, after = (
        storage.read_table(shard_file(str(out), MEASURED, name)).to_pylist() for name in ("shard-00000", "shard-00001")
    )
    assert [row["key"] for row in after] == ["a", "b", "c"]
    for new, old in ((after[0], before[3]), (after[2], before[0])):
        assert {**new, "key": ""} == {**old, "key": ""}
    assert after[1]["duration_s"] == pytest.approx(1.5, abs=0.06)


def counted(call: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    """The same call, which keeps how much it gave."""

    def counting(*args: Any) -> Any:
        sizes.append(len(found := call(*args)))
        return found

    return counting


@pytest.mark.parametrize("ranged", [False, True], ids=["in memory", "by range"])
def test_a_film_is_read_and_hashed_once_for_all_its_clips(
    ranged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the damage in its middle costs the clips that show it, their neighbours are as in a file of their own."""
    data = bytearray(make_moving(num_frames=160, size=(320, 240), options={"g": "20"}))
    data[len(data) // 2 : len(data) // 2 + len(data) // 12] = bytes(len(data) // 12)
    film = f"{tmp_path}/film.mp4"
    storage.write_bytes(film, bytes(data))
    spans = [(number / 2, number / 2 + 0.5) for number in range(16)]
    apart = [measure_bytes(bytes(data), *span, DecodeConfig()) for span in spans]
    bad = [number for number, row in enumerate(apart) if row["code"]]
    assert 1 <= len(bad) <= 6
    assert (bad[0] > 4, bad[-1] < 14) == (True, True), bad

    read, hashed = [], []
    if ranged:
        monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", len(data) // 2)
        monkeypatch.setattr(ranges, "BLOCK_BYTES", len(data) // 10)
    for name in ("read_bytes", "read_range"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name), read))
    monkeypatch.setattr(measuring, "hash_of", counted(hash_of, hashed))
    measure(tmp_path, "a", [Entry(str(number), film, *span) for number, span in enumerate(spans)])
    rows = storage.read_table(shard_file(str(tmp_path), MEASURED, "a")).to_pylist()
    assert [{**row, "key": None} for row in rows] == [{**row, "key": None} for row in apart]
    assert len(hashed) == 1
    assert sum(read) / len(data) < (2.2 if ranged else 1.01), "by range once to hash it, once for the clips"
    if ranged:
        read.clear()
        hashed.clear()
        shard = MeasureShard(name="b", rows=1, clips=[Entry("0", film, *spans[1])], hashes={film: "known"})
        MeasureWorker(str(tmp_path), DecodeConfig().model_dump(), {})(shard)
        assert hashed == []
        assert sum(read) / len(data) < 0.5
        assert storage.read_table(shard_file(str(tmp_path), MEASURED, "b"))["content_hash"].to_pylist() == ["known"]


def test_a_job_is_stopped_only_after_enough_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CurateConfig(manifest="m.csv", out="out", max_reject_ratio=0.5)
    assert measuring._RejectWatch(config, 1_000_000).after == 20_000  # a fiftieth of a large job
    monkeypatch.setattr(measuring, "EARLY_ROWS", 10)
    watch = measuring._RejectWatch(config, 100)
    watch(MeasureResult(rows=9, rejected=9, reused=0))
    watch(MeasureResult(rows=9, rejected=0, reused=0))  # exactly half is what may be
    with pytest.raises(UserError, match=r"max_reject_ratio=0\.5: 53% of 19 rows were rejected so far; .* under out"):
        watch(MeasureResult(rows=1, rejected=1, reused=0))


def test_a_sound_is_measured_as_its_name_and_its_picture_say(tmp_path: Path) -> None:
    sound, video, still = make_clip(has_video=False), make_clip(), png(80, 60)
    for name, data in (("a.m4a", sound), ("a.mp4", sound), ("v.m4a", video), ("s.png", still), ("t.png", still[:50])):
        storage.write_bytes(f"{tmp_path}/{name}", data)
    shown = [("a.m4a", None), ("a.m4a", "s.png"), ("a.m4a", "t.png"), ("a.m4a", "gone.png"), ("a.mp4", None)]
    shown += [("v.m4a", None), ("v.m4a", "s.png"), ("gone.m4a", "s.png")]
    clips = [
        Entry(f"k{i}", f"{tmp_path}/{name}", None, None, image and f"{tmp_path}/{image}")
        for i, (name, image) in enumerate(shown)
    ]
    out = tmp_path / "out"
    assert measure(out, "shard-00000", clips).reused == 0
    rows = storage.read_table(shard_file(str(out), MEASURED, "shard-00000")).to_pylist()
    assert [row["code"] or kind_of(row) for row in rows] == [
        "none", "still", "UNREADABLE", "MISSING_FILE", "NO_VIDEO", "frames", "still", "MISSING_FILE",
    ]  # fmt: skip
    assert rows[3]["message"] == f"its picture, {tmp_path}/gone.png: no such file"
    assert rows[7]["message"] == "no such file"
    assert rows[5] == {**measure_bytes(video, None, None, DecodeConfig()), "key": "k5"}

    write_known(str(out), {"shard-00000"})
    again = measure(out, "shard-00001", clips)
    assert (again.rows, again.reused) == (8, 4), "the good ones, and never a sound alone for a file named as a video"
    same = storage.read_table(shard_file(str(out), MEASURED, "shard-00001")).to_pylist()
    assert same == rows
