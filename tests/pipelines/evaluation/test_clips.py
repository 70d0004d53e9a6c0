"""Which clips are evaluated, in which shards, on tables of a few rows."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from aai.errors import UserError
from pipelines.evaluation.clips import TRAIN_SAMPLES, ClipPlace, EvaluatedClips, find_clips, index, listen_shards

NAMES = [f"c{number:02d}" for number in range(16)]


def row(name: str, split: str = "test") -> dict[str, Any]:
    return {"clip_id": name, "content_hash": f"h{name}", "split": split, "caption": f"of {name}", "labels": [name]}


@pytest.fixture
def tables(tmp_path: Path) -> tuple[str, str]:
    """Twelve clips of test and four of train in two files, one of val in a third; pictures in another order."""
    rows = [row(name, "train" if name >= "c12" else "test") for name in NAMES]
    mixed = [rows[i] for i in (5, 12, 0, 11, 3, 13, 9, 1, 14, 2, 4, 15, 6, 7, 8, 10)]
    for at, part in enumerate((mixed[:7], mixed[7:])):
        storage.write_table(f"{tmp_path}/features/{at}.parquet", pa.Table.from_pylist(part))
    pictures = [{"clip_id": name} for name in reversed(NAMES)]
    storage.write_table(f"{tmp_path}/features/2.parquet", pa.Table.from_pylist([row("c20", "val")]))
    storage.write_table(f"{tmp_path}/clips/0.parquet", pa.Table.from_pylist(pictures[:10]))
    storage.write_table(f"{tmp_path}/clips/1.parquet", pa.Table.from_pylist(pictures[10:]))
    return f"{tmp_path}/features", f"{tmp_path}/clips"


def test_an_index_tells_where_each_row_lies(tables: tuple[str, str], tmp_path: Path) -> None:
    found = index(tables[0], ["clip_id"]).to_pylist()
    assert len(found) == 17
    for place in found:
        here = storage.read_table(place["file"], ["clip_id"])["clip_id"].to_pylist()
        assert here[place["at"]] == place["clip_id"]
    with pytest.raises(UserError, match="holds no Parquet files"):
        index(str(tmp_path / "nothing"), ["clip_id"])


def test_the_first_clips_by_id_and_their_pictures(tables: tuple[str, str]) -> None:
    found = find_clips(*tables, "test", 11)
    assert found.test["clip_id"].to_pylist() == NAMES[:11]
    assert found.train["clip_id"].to_pylist() == NAMES[12:]
    assert found.labels == [[name] for name in NAMES[:11]]
    for place in found.test.to_pylist():
        for file, at in (("file", "at"), ("clips_file", "clips_at")):
            here = storage.read_table(place[file], ["clip_id"])["clip_id"].to_pylist()
            assert here[place[at]] == place["clip_id"]
    assert len(find_clips(*tables, "test", 100).test) == 12
    assert len(find_clips(*tables, "test", 10).test) == 10


def test_clips_without_a_picture_are_left_out(tables: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    features, clips = tables
    for file in storage.list_files(features, ".parquet"):
        table = storage.read_table(file)
        kinds = ["none" if clip in ("c03", "c13") else "still" for clip in table["clip_id"].to_pylist()]
        storage.write_table(file, table.append_column("picture", pa.array(kinds)))
    with caplog.at_level(logging.INFO):
        found = find_clips(features, clips, "test", 10)
    assert found.test["clip_id"].to_pylist() == [name for name in NAMES[:11] if name != "c03"]
    assert found.train["clip_id"].to_pylist() == NAMES[12:], "of these the sounds count"
    assert "evaluate: 1 of 12 clips of test have no picture and are left out" in caplog.text
    with pytest.raises(UserError, match=r"split=test: has 9 clips with a picture, besides 1 without, in "):
        find_clips(features, clips, "test", 9)


def test_too_few_clips_or_other_pictures_are_refused(tables: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"split=test: has 9 clips .*at least 10 are needed; .*there: test, train, val"):
        find_clips(*tables, "test", 9)
    storage.write_table(f"{tmp_path}/other/0.parquet", pa.Table.from_pylist([{"clip_id": name} for name in NAMES[1:]]))
    with pytest.raises(UserError, match="does not hold the clips"):
        find_clips(tables[0], f"{tmp_path}/other", "test", 100)


def test_overlap_counts_ids_and_contents() -> None:
    test = pa.table({"clip_id": ["a", "b", "c"], "content_hash": ["1", "2", "3"]})
    for train, count in (([("x", "9")], 0), ([("a", "9")], 1), ([("a", "1"), ("c", "9")], 3), ([("9", "3")], 1)):
        known = pa.table({"clip_id": [pair[0] for pair in train], "content_hash": [pair[1] for pair in train]})
        assert EvaluatedClips(test, known).overlap() == count
        assert EvaluatedClips(test.slice(0, 0), known).overlap() == 0


def test_shards_of_listening_are_of_one_file_each(tables: tuple[str, str]) -> None:
    clips = find_clips(*tables, "test", 11)
    shards = listen_shards(clips, 3, ["one", "two"], painted={0, 7})
    assert [shard.name for shard in shards] == [
        *(f"test-{i:05d}" for i in range(5)),
        *(f"train-{i:05d}" for i in (0, 1)),
    ]
    assert [shard.rows for shard in shards] == [len(shard.clips) for shard in shards] == [3, 1, 3, 3, 1, 2, 2]
    assert (shards[0].texts, shards[0].alone) == (["one", "two"], 64)
    assert all((shard.texts, shard.alone) == ([], 0) for shard in shards[1:])
    seen = {"test": {}, "train": {}}
    for shard in shards:
        assert [place.at for place in shard.clips] == sorted(place.at for place in shard.clips)
        names = storage.read_table(shard.features, ["clip_id"])["clip_id"].to_pylist()
        for place in shard.clips:
            seen[shard.name.split("-")[0]][place.row] = (names[place.at], place)
    assert {row: name for row, (name, _) in seen["test"].items()} == dict(enumerate(NAMES[:11]))
    assert {row: name for row, (name, _) in seen["train"].items()} == dict(enumerate(NAMES[12:]))
    assert [row for row in range(11) if seen["test"][row][1].painted] == [0, 7]
    for name, place in seen["test"].values():
        assert storage.read_table(str(place.clips_file), ["clip_id"])["clip_id"].to_pylist()[place.clips_at] == name
    assert all((p.clips_file, p.clips_at, p.painted) == (None, -1, False) for _, p in seen["train"].values())


def test_only_some_training_clips_are_heard(tables: tuple[str, str]) -> None:
    clips = find_clips(*tables, "test", 11)
    many = pa.table({"file": ["f"] * 300, "at": list(range(300))})
    shards = listen_shards(replace(clips, train=many), 1000, [], set())
    assert TRAIN_SAMPLES == 256
    assert [place.row for place in shards[-1].clips] == list(range(256))
    assert ClipPlace(0, 5) == ClipPlace(row=0, at=5, clips_file=None, clips_at=-1, painted=False)
