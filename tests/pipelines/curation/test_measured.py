"""What the driver reads of the measured tables, and how often."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from pipelines.curation import measured, table_slices
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.layout import MEASURED, shard_file
from pipelines.curation.ledger import Entry, Ledger
from pipelines.curation.measured import HASHED, MEASURED_TABLE, MeasuredTables

SHARDS = [f"shard-{number:05d}" for number in range(6)]


def write(out: str, name: str, keys: list[str], missing: tuple[str, ...] = ()) -> None:
    rows = [{"key": key, "clip_id": f"id-{key}", "video_hash": key.encode(), "audio": b"flac"} for key in keys]
    table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE).drop_columns(list(missing))
    storage.write_table(shard_file(out, MEASURED, name), table)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A plan of six shards of four clips. The third is not measured, the fifth holds clips of another plan."""
    monkeypatch.setattr(table_slices, "GROUP_ROWS", 6)
    ledger = Ledger(str(tmp_path))
    ledger.add([Entry(f"k{number:02d}", "/a.mp4", None, None) for number in range(24)], 4)
    for number, name in enumerate(SHARDS):
        if number != 2:
            wrong = "x" if number == 4 else "k"
            write(str(tmp_path), name, [f"{wrong}{4 * number + i:02d}" for i in range(4)])
    return str(tmp_path)


def test_each_table_is_read_once_and_only_wanted_clips_are_told(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    kept = measured.read_columns

    def counted(files: dict[str, int], columns: list[str]) -> Any:
        read.extend(files)
        return kept(files, columns)

    monkeypatch.setattr(measured, "read_columns", counted)
    tables, ledger = MeasuredTables(out, compares=True), Ledger(out)
    assert tables.of_the_plan(ledger) == {SHARDS[number] for number in (0, 1, 3, 5)}
    write(out, SHARDS[2], [f"k{number:02d}" for number in range(8, 12)])
    write(out, SHARDS[4], [f"k{number:02d}" for number in range(16, 20)])
    wanted = ledger.valid(ClipKeys([f"k{number:02d}" for number in range(1, 24, 2)]))
    found = {name: table["key"].to_pylist() for name, table in tables.wanted(wanted)}
    assert found == {name: [f"k{4 * number + i:02d}" for i in (1, 3)] for number, name in enumerate(SHARDS)}
    assert sorted(read) == sorted([shard_file(out, MEASURED, name) for name in (*SHARDS, SHARDS[4])])
    assert [table["video_hash"][0] for table in tables.prints.values()] == [
        pa.scalar(f"k{4 * SHARDS.index(name):02d}".encode()) for name in tables.prints
    ]


def test_large_columns_stay_where_they_are(out: str) -> None:
    for compares in (False, True):
        tables = MeasuredTables(out, compares)
        for _, table in tables.wanted({SHARDS[0]: ClipKeys(["k00"])}):
            assert not {"audio", "frames", "frame_pts_s", "content_hash", *HASHED} & set(table.column_names)
        assert list(tables.prints) == ([SHARDS[0]] if compares else [])


def test_columns_that_an_earlier_version_did_not_write_are_null(out: str) -> None:
    write(out, SHARDS[0], ["k00"], ("decoder", "picture_print", "sound_print"))
    tables = MeasuredTables(out, compares=True)
    ((_, table),) = tables.wanted({SHARDS[0]: ClipKeys(["k00"])})
    assert table["decoder"].to_pylist() == [None]
    assert tables.prints[SHARDS[0]].select(["picture_print", "sound_print"]).to_pylist() == [
        {"picture_print": None, "sound_print": None}
    ]
