"""A file that cannot be had is a code, and the code says whether asking again may help."""

from pathlib import Path

import pytest

from aai.media.limits import ClipError
from pipelines.engine.reading import read_file


def test_a_file_of_the_largest_size_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(str(tmp_path / "a"), 5) == b"12345"


@pytest.mark.parametrize(
    ("name", "max_bytes", "code", "transient"),
    [("gone", 5, "MISSING_FILE", False), ("a", 4, "TOO_LARGE", False), ("folder", 1 << 20, "IO_ERROR", True)],
)
def test_what_cannot_be_had_is_a_code(name: str, max_bytes: int, code: str, transient: bool, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    error = read_file(str(tmp_path / name), max_bytes)
    assert isinstance(error, ClipError)
    assert (error.code, error.transient) == (code, transient)
    assert error.message
    assert len(error.message) <= 300
