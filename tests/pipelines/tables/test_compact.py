"""Many small files rewritten into fewer: the same rows in the same order."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai import schema, storage
from aai.errors import UserError
from aai.features import METADATA_KEY, SHAPES_KEY, load_split
from aai.reader import FeatureReader
from aai.version import METADATA_KEY as WRITTEN_BY
from aai.version import code_version
from tests.pipelines.tables.conftest import data


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"), [(10, [8, 8, 8]), (13, [12, 12]), (1000, [24]), (5, [5] * 4 + [4])]
)
def test_compact_keeps_rows_order_and_schema(
    curated: Path, tmp_path: Path, rows_per_file: int, sizes: list[int]
) -> None:
    result = data("compact", input=curated / "accepted", out=tmp_path / "out", rows_per_file=rows_per_file)
    files = storage.list_files(str(tmp_path / "out"), ".parquet")
    assert [pq.read_metadata(file).num_rows for file in files] == sizes
    assert (result["rows"], result["files"]) == (24, len(sizes))
    assert storage.read_table(str(tmp_path / "out")).equals(storage.read_table(f"{curated}/accepted"))
    assert pq.read_schema(files[0]).equals(schema.CLIP_TABLE)


def test_compact_goes_on_after_a_kill_and_then_does_nothing(curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = data("compact", input=curated / "accepted", out=out, rows_per_file=8)
    (out / "compact.json").unlink()
    (out / "part-00001.parquet").unlink()
    kept = (out / "part-00000.parquet").stat().st_mtime_ns
    assert data("compact", input=curated / "accepted", out=out, rows_per_file=8) == result
    assert (out / "part-00000.parquet").stat().st_mtime_ns == kept
    assert storage.read_table(str(out)).equals(storage.read_table(f"{curated}/accepted"))
    assert data("compact", input=curated / "accepted", out=out, rows_per_file=8) == result
    with pytest.raises(UserError, match="another input or size"):
        data("compact", input=curated / "accepted", out=out, rows_per_file=9)
    with pytest.raises(UserError, match="is not empty"):
        data("compact", input=curated / "accepted", out=curated / "rejected")


def test_large_tables_are_written_group_by_group(tmp_path: Path) -> None:
    numbers = pa.table({"n": range(2000)}).replace_schema_metadata({"who": "me"})
    for i in range(0, 2000, 40):
        storage.write_table(f"{tmp_path}/in/{i:05d}.parquet", numbers.slice(i, 40))
    data("compact", input=tmp_path / "in", out=tmp_path / "out", rows_per_file=1500)
    footer = pq.read_metadata(tmp_path / "out/part-00000.parquet")
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [256, 256, 256, 232]
    again = storage.read_table(f"{tmp_path}/out")
    assert again["n"].to_pylist() == list(range(2000))
    assert again.schema.metadata == {b"who": b"me", WRITTEN_BY: code_version().encode()}


def test_files_may_have_enlarged_different_numbers_of_pictures(features: Path, tmp_path: Path) -> None:
    files = storage.list_files(str(features), ".parquet")
    for number, file in enumerate(files):
        table = pq.read_table(file)
        metadata = table.schema.metadata
        shapes = json.loads(metadata[SHAPES_KEY]) | {"enlarged": {"clip": number, "latents": 0}}
        target = str(tmp_path / "in" / Path(file).name)
        storage.write_table(target, table.replace_schema_metadata({**metadata, SHAPES_KEY: json.dumps(shapes)}))
    storage.write_bytes(f"{tmp_path}/in/manifest.json", storage.read_bytes(f"{features}/manifest.json"))
    data("compact", input=tmp_path / "in", out=tmp_path / "out", rows_per_file=20)
    for file in storage.list_files(f"{tmp_path}/out", ".parquet"):
        assert "enlarged" not in json.loads(pq.read_schema(file).metadata[SHAPES_KEY])


def test_a_compacted_feature_table_trains_the_same(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data("compact", input=features, out=out, rows_per_file=20)
    before, after = (load_split(str(uri), "train", 8000) for uri in (features, out))
    assert before["clip_id"] == after["clip_id"]
    assert (before["image_features"] == after["image_features"]).all()
    assert next(FeatureReader(str(out), "train", 4, 8000).batches())["latents"].shape == (4, 8, 8, 8)
    splits: Counter[str] = Counter()
    for file in storage.list_files(str(out), ".parquet"):
        metadata = pq.read_schema(file).metadata
        assert metadata[METADATA_KEY] == pq.read_schema(features / "shard-00000.parquet").metadata[METADATA_KEY]
        assert (
            pq.read_table(file)["split"].to_pylist().count("val") == json.loads(metadata[SHAPES_KEY])["splits"]["val"]
        )
        splits.update(json.loads(metadata[SHAPES_KEY])["splits"])
    assert splits == storage.read_json(f"{out}/manifest.json")["rows"] == {"train": 18, "val": 6}


def test_tables_of_several_commits_are_one_table(tmp_path: Path) -> None:
    rows = pa.table({"n": [1, 2, 3]})
    for number, metadata in enumerate(({WRITTEN_BY: "b"}, {WRITTEN_BY: "a"}, {WRITTEN_BY: "b"}, {})):
        file = tmp_path / "in" / f"shard-{number:05d}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(rows.replace_schema_metadata(metadata), file)
    data("compact", input=tmp_path / "in", out=tmp_path / "out", rows_per_file=12)
    assert storage.written_by(str(tmp_path / "out/part-00000.parquet")) == "a; b"
    assert storage.read_table(f"{tmp_path}/out")["n"].to_pylist() == [1, 2, 3] * 4


def test_tables_of_different_settings_are_not_mixed(features: Path, curated: Path, tmp_path: Path) -> None:
    table = pq.read_table(features / "shard-00000.parquet")
    other = table.replace_schema_metadata({**table.schema.metadata, METADATA_KEY: b"another"})
    for name, part in (("a", table), ("b", other)):
        storage.write_table(f"{tmp_path}/mixed/{name}.parquet", part)
    storage.write_json(f"{tmp_path}/mixed/manifest.json", {})
    with pytest.raises(UserError, match="other settings"):
        data("compact", input=tmp_path / "mixed", out=tmp_path / "out")
    (tmp_path / "mixed/b.parquet").unlink()
    (tmp_path / "mixed/manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        data("compact", input=tmp_path / "mixed", out=tmp_path / "out")
    with pytest.raises(UserError, match="other columns"):
        data("compact", input=curated, out=tmp_path / "out")
    storage.write_bytes(f"{tmp_path}/torn/a.parquet", b"PAR1 torn")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        data("compact", input=tmp_path / "torn", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
