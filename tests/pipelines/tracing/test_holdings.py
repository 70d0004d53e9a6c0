"""Which tables hold a clip."""

from pathlib import Path

import pytest

from aai import storage
from pipelines.registry.origins import TrainingRun
from pipelines.tracing.holdings import changed, rows_of, search, silent
from tests.pipelines.tracing.archive import write_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path / "1", 0, "f1")
    write_table(tmp_path / "2", 30, "f2")
    return tmp_path


def found(folder: Path, *wanted: str) -> dict[str, dict[str, int]]:
    features = [f"{folder}/{number}/features" for number in (1, 2)]
    aligned = [f"{features[0]}-aligned", f"{folder}/none"]
    holdings = search([*features, features[0] + "/"], aligned, frozenset(wanted))
    return {f"{holding.kind} {holding.uri.removeprefix(str(folder))}": holding.by_split() for holding in holdings}


def test_a_clip_is_found_wherever_it_lies_by_id_content_or_uri(folder: Path) -> None:
    everywhere = {
        "features /1/features": {"train": 1},
        "accepted /1/curated/accepted": {"train": 1},
        "measured /1/curated/_measured": {"": 1},
        "embeddings /1/features-aligned": {"": 1},
    }
    for name in ("c4", "h4", "4.mp4"):
        assert found(folder, name) == everywhere
    assert found(folder, "c2", "c5", "5.mp4")["features /1/features"] == {"val": 2}


def test_a_copy_in_another_place_is_found_by_its_content(folder: Path) -> None:
    table = storage.read_table(f"{folder}/2/features/shard-00000.parquet")
    rows = [{**row, "content_hash": "h4"} if row["clip_id"] == "c31" else row for row in table.to_pylist()]
    storage.write_table(f"{folder}/2/features/shard-00000.parquet", table.from_pylist(rows, schema=table.schema))
    told = found(folder, "4.mp4")
    assert told["features /2/features"] == {"train": 1}
    assert told["measured /2/curated/_measured"] == {"": 1}  # by the id of the copy
    assert found(folder, "31.mp4")["features /1/features"] == {"train": 1}


def test_features_of_clips_that_lie_elsewhere(folder: Path) -> None:
    (folder / "1" / "curated" / "accepted").rename(folder / "1" / "compact")
    manifest = storage.read_json(f"{folder}/1/features/manifest.json")
    storage.write_json(f"{folder}/1/features/manifest.json", {**manifest, "input": f"{folder}/1/compact"})
    assert found(folder, "c4")["clips /1/compact"] == {"train": 1}
    assert silent([f"{folder}/1/features", f"{folder}/none"]) == []
    storage.write_json(f"{folder}/1/features/manifest.json", {**manifest, "input": ""})
    assert "does not tell which curation" in silent([f"{folder}/1/features"])[0]


def test_each_table_is_told_apart(folder: Path) -> None:
    everywhere = list(found(folder, "c4"))
    assert list(found(folder, "c35")) == [name.replace("/1/", "/2/") for name in everywhere[:3]]


def test_what_was_refused_is_found_too(folder: Path) -> None:
    assert found(folder, "0-torn.mp4") == {"rejected /1/curated/rejected": {"train": 1}}


def test_what_nobody_has_is_found_nowhere(folder: Path) -> None:
    assert found(folder, "c60", "4", "dog") == {}


def test_a_curation_may_be_named_itself(folder: Path) -> None:
    holdings = search([f"{folder}/2/curated"], [], frozenset(["c30"]))
    assert [holding.kind for holding in holdings] == ["accepted", "measured"]
    assert holdings[0].hashes == {"h30"}
    assert "c30" in holdings[0].asked


def test_a_table_is_read_by_its_ids_alone(folder: Path) -> None:
    table = rows_of(f"{folder}/1/features")
    assert table.column_names == ["clip_id", "content_hash", "uri", "split"]
    assert len(table) == 30
    assert len(rows_of(f"{folder}/none")) == 0


def test_a_table_that_is_gone_or_another_is_told(folder: Path) -> None:
    training = TrainingRun("r", "e", "align", "FINISHED", 0, f"{folder}/1/features", "f1", "b", ())
    assert changed(training) == ""
    manifest = storage.read_json(f"{folder}/1/features/manifest.json")
    storage.write_json(f"{folder}/1/features/manifest.json", {**manifest, "fingerprint": "other"})
    assert "holds other clips" in changed(training)
    storage.remove(f"{folder}/1/features")
    assert "is gone" in changed(training)
