"""Stamps of files on disk and under s3://: what changed has another one."""

import os
from pathlib import Path

import pytest

from aai import storage
from pipelines.curation.stamps import MISSING, Stamps, stamps_of


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of either kind."""
    return str(tmp_path) if request.param == "local" else str(request.getfixturevalue("s3"))


def test_stamps_tell_changed_files(base: str) -> None:
    one, two, tar, none = (storage.join(base, name) for name in ("a/one.mp4", "b/two.mp4", "b/t.tar", "c/none.mp4"))
    for uri in (one, two, tar):
        storage.write_bytes(uri, b"1")
    inside = storage.Member(tar, 0, 1, "x/y.mp4").uri
    before = stamps_of([one, two, tar, inside, none])
    assert before[inside] == before[tar] != MISSING
    assert before[none] == MISSING
    storage.write_bytes(tar, b"12")
    after = stamps_of([one, two, tar, inside])
    assert {uri for uri in after if after[uri] != before[uri]} == {tar, inside}


def test_on_disk_it_is_size_and_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    os.utime(tmp_path / "a", ns=(5, 7))
    assert Stamps().of([f"{tmp_path}/a", f"{tmp_path}/b"]) == ["3:7", MISSING]


def test_a_folder_of_s3_is_listed_once_and_page_by_page(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More files than a page of the listing has; etag and size are what s3fs itself says."""
    folder = storage.join(s3, "many")
    fs, path = storage.filesystem(folder)
    fs.pipe({f"{path}/{number:04d}.mp4": b"x" * (number % 7 + 1) for number in range(1003)})
    stamps, files = Stamps(), [f"{folder}/{number:04d}.mp4" for number in (1002, 0, 999, 1001)]
    told = {f"s3://{entry['name']}": f"{entry['ETag']}:{entry['size']}" for entry in fs.ls(path, detail=True)}
    assert stamps.of(files) == [told[file] for file in files]
    monkeypatch.setattr("pipelines.curation.stamps._pages", lambda folder: pytest.fail("listed again"))
    assert stamps.of([f"{folder}/0003.mp4", f"{folder}/none.mp4"]) == [told[f"{folder}/0003.mp4"], MISSING]
