"""`aai data`: what it refuses, and its three actions on S3."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from aai import storage
from pipelines.__main__ import main
from tests.pipelines.tables.conftest import data, write_curated


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 accepted clips and two rejects."""
    return write_curated(tmp_path_factory.mktemp("data") / "curated")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["show"], "id=(missing)"),
        (["show", "nosuch"], "no such clip"),
        (["show", "clip-1"], "fits 8 clips (clip-1-0 1-0.mp4, clip-1-1"),
        (["show", "x", "--table", "/nowhere"], "holds no tables"),
        (["compact", "--input", "/nowhere", "--out", "/tmp/x"], "holds no Parquet files"),
        (["compact", "--input", "/nowhere"], "out=(missing)"),
        (["compact", "--input", "a", "--out", "a/b"], "lies in the input"),
        (["export", "clip-1", "--input", "a", "--out", "b"], "takes no ID"),
        (["export", "--input", "{curated}/rejected", "--out", "/tmp/x"], "is no ClipTable"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], expected: str, curated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("{curated}", str(curated)) for word in argv]
    assert main(["data", "--set", f"table={curated}", *given]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_s3(curated: Path, s3: str) -> None:
    storage.upload_folder(curated, f"{s3}/curated")
    found = data("show", id="clip-2-5", table=f"{s3}/curated", features=None, out=f"{s3}/clips")
    assert Image.open(io.BytesIO(storage.read_bytes(found["sheet"]))).format == "PNG"
    data("compact", input=f"{s3}/curated/accepted", out=f"{s3}/compact", rows_per_file=12)
    assert storage.read_table(f"{s3}/compact").equals(storage.read_table(f"{curated}/accepted"))
    result = data("export", input=f"{s3}/compact", out=f"{s3}/tars")
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(f"{s3}/tars/{result['shards'][0]['name']}"))) as tar:
        assert len(tar.getnames()) == 4 * result["shards"][0]["clips"]
