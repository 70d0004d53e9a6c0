"""One worker's rows, the watch that stops a bad job, and what is known from earlier runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from aai import storage
from aai.errors import UserError
from aai.media.limits import DecodeConfig
from pipelines.curation import measuring
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.known_clips import write_known
from pipelines.curation.layout import KNOWN, MEASURED, shard_file
from pipelines.curation.ledger import Entry
from pipelines.curation.measuring import MeasureResult, MeasureShard, MeasureWorker
from tests.clips import make_clip


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


def test_a_job_is_stopped_only_after_enough_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CurateConfig(manifest="m.csv", out="out", max_reject_ratio=0.5)
    assert measuring._RejectWatch(config, 1_000_000).after == 20_000  # a fiftieth of a large job
    monkeypatch.setattr(measuring, "EARLY_ROWS", 10)
    watch = measuring._RejectWatch(config, 100)
    watch(MeasureResult(rows=9, rejected=9, reused=0))
    watch(MeasureResult(rows=9, rejected=0, reused=0))  # exactly half is what may be
    with pytest.raises(UserError, match=r"max_reject_ratio=0\.5: 53% of 19 rows were rejected so far; .* under out"):
        watch(MeasureResult(rows=1, rejected=1, reused=0))
