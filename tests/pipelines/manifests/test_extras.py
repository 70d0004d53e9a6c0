"""Columns that curate does not know: which travel, as what, and what is refused."""

import io
import json
import tarfile
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai.errors import UserError
from pipelines.manifests.extras import MAX_CHARS, MAX_COLUMNS, NUMBER, TEXT, carried, columns, kinds_of
from pipelines.manifests.table import read_manifest


def of_csv(tmp_path: Path, text: str, further: tuple[str, ...] | None = None) -> list[dict[str, Any]]:
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    return [dict(row.extra) for row in read_manifest(str(tmp_path / "m.csv"), further=further)]


def test_a_column_is_numbers_or_text_as_a_whole(tmp_path: Path) -> None:
    rows = of_csv(
        tmp_path,
        "uri,license,score,id,digits,big,,mixed\n"
        "a.mp4,CC-BY-4.0,0.5,17,007,12345678901234567890,x,1.0\n"
        "b.mp4,,-1e-3,,8,1,,n/a\n",
    )
    assert rows == [
        {"license": "CC-BY-4.0", "score": 0.5, "id": 17.0, "digits": "007", "big": "12345678901234567890",
         "mixed": "1.0"},
        {"score": -0.001, "digits": "8", "big": "1", "mixed": "n/a"},
    ]  # fmt: skip
    kinds = {"big": TEXT, "digits": TEXT, "id": NUMBER, "license": TEXT, "mixed": TEXT, "score": NUMBER}
    assert columns(rows) == kinds


def test_parquet_gives_its_own_types_and_bulky_columns_are_not_read(tmp_path: Path) -> None:
    table = {"uri": ["a.mp4", "b.mp4"], "labels": [["dog"], []], "score": [1, None], "id": [2**60, 1],
             "day": [date(2026, 11, 29)] * 2, "free": [True, False], "nan": [float("nan"), 2.0],
             "picture": [b"jpeg", b""], "embedding": [[1.0], [2.0]]}  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    first, second = read_manifest(str(tmp_path / "m.parquet"), further=None)
    assert first.extra == {"score": 1.0, "id": str(2**60), "day": "2026-11-29", "free": "True"}
    assert second.extra == {"id": "1", "day": "2026-11-29", "free": "False", "nan": 2.0}
    assert first.labels == ("dog",)
    assert [row.extra for row in read_manifest(str(tmp_path / "m.parquet"))] == [{}, {}]


def test_a_column_of_the_tables_own_name_is_renamed(tmp_path: Path) -> None:
    assert of_csv(tmp_path, "uri,width,clip_id\na.mp4,640,x1\n") == [
        {"manifest_width": 640.0, "manifest_clip_id": "x1"}
    ]


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    text = "uri,license,score\na.mp4,CC0,1\n"
    assert of_csv(tmp_path, text, ("license",)) == [{"license": "CC0"}]
    assert of_csv(tmp_path, text, ()) == [{}]
    with pytest.raises(UserError, match=r"manifest_columns=licence: .* \(found: license, score\)"):
        of_csv(tmp_path, text, ("licence",))


def test_keys_of_a_tars_json_travel_too(tmp_path: Path) -> None:
    note = json.dumps({"caption": "a bell", "license": "CC0", "similarity": 0.3, "exif": {"a": 1}}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.mp4"))
        info = tarfile.TarInfo("0.json")
        info.size = len(note)
        tar.addfile(info, io.BytesIO(note))
    (row,) = read_manifest(str(tmp_path / "a.tar"), further=None)
    assert (row.caption, row.extra) == ("a bell", {"license": "CC0", "similarity": 0.3})
    with pytest.raises(UserError, match="manifest_columns=exif: holds neither numbers nor text"):
        read_manifest(str(tmp_path / "a.tar"), further=("exif",))


def test_what_travels_is_bounded() -> None:
    many = {f"c{i}": i for i in range(MAX_COLUMNS + 1)}
    with pytest.raises(UserError, match=f"has {MAX_COLUMNS + 1} further columns.*manifest_columns"):
        kinds_of("m.csv", [many], None)
    kinds = kinds_of("m.csv", [many], list(many)[1:])
    assert len(carried("m.csv", 1, many, kinds)) == len(kinds) == MAX_COLUMNS
    carried("m.csv", 1, {"note": "x" * MAX_CHARS}, {"note": TEXT})
    with pytest.raises(UserError, match=f"m.csv: row 2: note has {MAX_CHARS + 1} characters"):
        carried("m.csv", 2, {"note": "x" * (MAX_CHARS + 1)}, {"note": TEXT})


def test_rows_without_further_columns_are_what_they_were(tmp_path: Path) -> None:
    """Digests of tables of before rest on this."""
    (tmp_path / "m.csv").write_text("uri,license\na.mp4,CC0\n")
    plain, full = (read_manifest(str(tmp_path / "m.csv"), further=further)[0] for further in ((), None))
    assert "extra" not in plain.content()
    assert full.content() == plain.content() | {"extra": {"license": "CC0"}}
