"""One clip told in full: its rows, its features, its sheet."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai import storage
from aai.version import code_version
from pipelines.__main__ import main
from tests.pipelines.tables.conftest import data


def test_show_tells_everything_and_draws_a_sheet(
    curated: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "show", "clip-1-3", "--table", str(curated), "--features", str(features), "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    row = storage.read_table(f"{curated}/accepted/shard-00001.parquet").slice(3, 1).to_pylist()[0]
    for text in ("accepted: ", "shard-00001.parquet row 3", row["caption"], row["uri"], "split                  val"):
        assert text in out
    assert "image_features         2 x 32, norms 1" in out.replace("0.9999", "1").replace("1.0001", "1")
    assert "latents                8 x 8 x 8" in out
    assert out.count(f"written by             {code_version()}") == 2  # the clip's table, and its features
    sheet = tmp_path / "clip-1-3.png"
    assert f"contact sheet: {sheet}" in out
    picture = Image.open(sheet)
    assert picture.width > 800
    assert len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 50


@pytest.mark.parametrize("wanted", ["clip-0-0", "clips/0-0.mp4", "double.mp4"])
def test_a_rejected_double_is_shown_with_its_kept_clip(curated: Path, tmp_path: Path, wanted: str) -> None:
    found = data("show", id=wanted, table=curated, features=None, out=tmp_path)
    verdicts = ["code" in row for row in found["rows"]]
    assert verdicts == {"clip-0-0": [False, True], "clips/0-0.mp4": [False], "double.mp4": [True]}[wanted]


def test_what_has_neither_id_nor_picture_nor_plain_name_is_shown(curated: Path, tmp_path: Path) -> None:
    found = data("show", id="lost$", table=curated, features=tmp_path / "none", out=tmp_path)
    assert found["rows"][0]["code"] == "MISSING_FILE"
    assert found["features"] is None
    assert Path(found["sheet"]).is_file()


def test_show_of_a_table_of_before(curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    rows = storage.read_table(f"{curated}/accepted/shard-00000.parquet").replace_schema_metadata(None)
    pq.write_table(rows, tmp_path / "old" / "a.parquet")
    data("show", id="clip-0-1", table=tmp_path / "old", features=None, out=tmp_path)
    assert "written by             unknown" in capsys.readouterr().out


def test_further_columns_are_shown(curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    rows = storage.read_table(f"{curated}/accepted/shard-00000.parquet").slice(0, 1)
    pq.write_table(rows.append_column("license", [["CC0"]]), tmp_path / "in/a.parquet")
    data("show", id="clip-0-0", table=tmp_path / "in", features=None, out=tmp_path)
    assert "license                CC0" in capsys.readouterr().out
