"""Files that are read block by block: each block once, no more than is asked for, and a fault is told."""

import random
from pathlib import Path

import pytest

from aai import storage
from aai.media.limits import ClipError
from pipelines.engine import ranges
from pipelines.engine.kept_blocks import KeptBlocks
from pipelines.engine.ranges import FileRanges, open_file

DATA = random.Random(0).randbytes(1050)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Files over 500 bytes are large, blocks have 100 bytes, three are kept; which ones were read."""
    monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", 500)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", 100)
    monkeypatch.setattr(ranges, "BLOCKS", 3)
    read, found = storage.read_range, []

    def counted(uri: str, start: int, end: int) -> bytes:
        found.append((start, end))
        return read(uri, start, end)

    monkeypatch.setattr(storage, "read_range", counted)
    return found


@pytest.mark.parametrize("place", ["disk", "tar", "s3"])
def test_a_large_file_is_read_by_blocks(
    place: str, tmp_path: Path, blocks: list[tuple[int, int]], request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue("s3") if place == "s3" else str(tmp_path)
    uri = storage.join(base, "a.tar")
    storage.write_bytes(uri, b"x" * 7 + DATA + b"y" if place == "tar" else DATA)
    found = open_file(storage.Member(uri, 7, len(DATA), "a.mp4").uri if place == "tar" else uri, 2000)
    assert isinstance(found, FileRanges)
    assert (len(found), blocks) == (1050, [])
    assert found.read(990, 1050) == DATA[990:]
    assert found.read(100, 200) == DATA[100:200]
    assert found.read(150, 201) == DATA[150:201]
    assert blocks == [(900, 1000), (1000, 1050), (100, 200), (200, 300)]
    found.read(1000, 1001)
    assert len(blocks) == 4, "the last blocks are kept"
    found.read(900, 901)
    assert len(blocks) == 5


def test_a_block_of_s3_is_fetched_once_by_all_who_share_a_disk(
    tmp_path: Path, blocks: list[tuple[int, int]], s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri, disk = storage.join(s3, "a"), str(tmp_path / "a")
    for place in (uri, disk):
        storage.write_bytes(place, DATA)
    fetched = []
    for place in (uri, uri, disk, disk):
        blocks.clear()
        found = open_file(place, 2000, KeptBlocks("run", 10_000))
        assert isinstance(found, FileRanges)
        assert found.read(150, 350) == DATA[150:350]
        fetched.append(len(blocks))
    assert fetched == [3, 0, 3, 3], "what lies on a disk already is not kept on a disk"
    other = bytes(reversed(DATA))
    storage.write_bytes(uri, other)
    found = open_file(uri, 2000, KeptBlocks("run", 10_000))
    assert isinstance(found, FileRanges)
    assert found.read(150, 350) == other[150:350], "a changed file is another"


def test_a_small_file_is_read_at_once(tmp_path: Path, blocks: list[tuple[int, int]]) -> None:
    (tmp_path / "a").write_bytes(DATA[:500])
    assert open_file(f"{tmp_path}/a", 2000) == DATA[:500]
    assert blocks == []


@pytest.mark.parametrize(
    ("name", "max_bytes", "code"),
    [("gone", 2000, "MISSING_FILE"), ("a", 1049, "TOO_LARGE"), ("a", 499, "TOO_LARGE")],
)
def test_what_cannot_be_had_is_a_code(name: str, max_bytes: int, code: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    error = open_file(f"{tmp_path}/{name}", max_bytes)
    assert isinstance(error, ClipError)
    assert error.code == code
    if code == "TOO_LARGE":
        assert error.message == f"file of 1050 bytes is over the limit of {max_bytes} bytes"


def test_a_file_that_goes_away_is_told_and_may_come_back(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(DATA)
    found = open_file(str(file), 2000)
    assert isinstance(found, FileRanges)
    for fault, code in ((DATA[:950], "IO_ERROR"), (None, "MISSING_FILE")):
        file.unlink()
        if fault is not None:
            file.write_bytes(fault)
        with pytest.raises(ClipError, match=f"^{code}: "):
            found.read(900, 1000)
        file.touch()
    file.write_bytes(DATA)
    assert found.read(900, 1000) == DATA[900:1000]
