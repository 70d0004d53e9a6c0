"""Fingerprints of files and folders."""

import shutil
from pathlib import Path

import pytest

from aai import storage
from pipelines.chain.fingerprints import MISSING, code_fingerprint, fingerprint, flat


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A folder like a table's."""
    folder = tmp_path / "table"
    (folder / "accepted").mkdir(parents=True)
    (folder / "accepted" / "0.parquet").write_bytes(b"rows")
    (folder / "manifest.json").write_text('{"rows": 4}')
    return folder


def test_a_folder_is_the_same_elsewhere(table: Path, tmp_path: Path) -> None:
    shutil.copytree(table, tmp_path / "moved")
    assert fingerprint(str(table)) == fingerprint(f"{tmp_path}/moved/") != MISSING


@pytest.mark.parametrize("name", ["accepted/1.parquet", "accepted/0.parquet", "manifest.json"])
def test_what_is_added_or_changed_counts(table: Path, name: str) -> None:
    before = fingerprint(str(table))
    (table / name).write_text('{"rows": 5}')
    assert fingerprint(str(table)) != before


def test_bookkeeping_does_not_count(table: Path, tmp_path: Path) -> None:
    before = fingerprint(str(table))
    (table / "_lock").write_text("x")
    (table / "_measured").mkdir()
    (table / "_measured" / "0.parquet").write_text("x")
    (tmp_path / "session").mkdir()
    (tmp_path / "session" / "raylet.out").write_text("x")
    (table / "ray-logs").symlink_to(tmp_path / "session")
    assert fingerprint(str(table)) == before


def test_a_file_counts_by_its_content(table: Path) -> None:
    file = table / "accepted" / "0.parquet"
    before = fingerprint(str(file))
    file.write_bytes(b"swor")
    assert fingerprint(str(file)) != before
    assert fingerprint(f"{table}/nowhere") == MISSING


def test_under_s3_as_on_disk(table: Path, s3: str) -> None:
    storage.upload_folder(table, f"{s3}/prints")
    assert fingerprint(f"{s3}/prints") == fingerprint(str(table))
    assert fingerprint(f"{s3}/prints/manifest.json") == fingerprint(str(table / "manifest.json"))
    assert fingerprint(f"{s3}/nowhere") == MISSING


def test_the_code_has_a_fingerprint() -> None:
    assert code_fingerprint() == code_fingerprint()
    assert len(code_fingerprint()) == 24


def test_settings_by_dotted_name() -> None:
    found = flat({"a": {"b": 1, "c": {}}, "d": [1, {"e": None}]})
    assert found == {"a.b": "1", "a.c": "{}", "d": '[1, {"e": null}]'}
