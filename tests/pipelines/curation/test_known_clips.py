"""Clips of earlier runs are found by their content, without all of them in memory."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from pipelines.curation import known_clips
from pipelines.curation.known_clips import KnownClips, write_known
from pipelines.curation.layout import KNOWN, MEASURED, shard_file
from pipelines.curation.measured import MEASURED_TABLE


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Three measured shards: a clip that could not be decoded, one without id, and one that is there twice."""
    base = str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))
    for shard in range(3):
        rows: list[dict[str, Any]] = []
        for i in range(10):
            rows.append({"key": f"k{shard}-{i}", "clip_id": f"c{(7 * i) % 10}{shard}", "motion": 10.0 * shard + i})
        rows[4]["code"] = "UNREADABLE"
        rows[5]["clip_id"] = None
        rows[6]["clip_id"] = "twice"
        table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE)
        storage.write_table(shard_file(base, MEASURED, f"shard-0000{shard}"), table, row_group_size=4)
    return base


def test_each_is_found_and_no_other(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KnownClips(out).find("c00") is None  # nothing is written yet
    monkeypatch.setattr(known_clips, "GROUP_ROWS", 3)
    write_known(out, {"shard-00000", "shard-00002"})
    known = KnownClips(out)
    found = {clip: known.find(clip) for clip in ("c00", "c32", "c02", "twice", "c01", "c80", "c8", "a", "z")}
    told = {clip: (row["key"], row["motion"]) for clip, row in found.items() if row}
    assert told == {"c00": ("k0-0", 0.0), "c32": ("k2-9", 29.0), "c02": ("k2-0", 20.0), "twice": ("k2-6", 26.0)}
    assert storage.read_table(storage.join(out, KNOWN)).num_rows == 15  # 8 + 8 good ones, one of them twice


def test_a_table_of_before_is_not_in_order_and_tells_nothing(out: str) -> None:
    table = pa.table({"clip_id": ["c32", "c00"], "shard": ["shard-00002", "shard-00000"], "row": [9, 0]})
    storage.write_table(storage.join(out, KNOWN), table, row_group_size=1)
    assert KnownClips(out).find("c32") is None  # it is decoded again


def test_nothing_is_known_of_no_shards(out: str) -> None:
    write_known(out, set())
    assert KnownClips(out).find("c00") is None
