"""aai.storage: the same functions on a local folder and on a real S3 server."""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai import storage
from aai.errors import UserError
from aai.version import code_version


@pytest.fixture(params=["local", "s3"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of either kind; every test below runs on both."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.mark.parametrize("uri", ["http://169.254.169.254/x", "https://example.org/a.mp4", "gs://b/k", "ftp://h/x"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match="is not allowed"):
        storage.filesystem(uri)


def test_bytes_and_json_come_back(base: str) -> None:
    storage.write_bytes(storage.join(base, "a/b.bin"), b"\x00\xff")
    storage.write_json(storage.join(base, "a/c.json"), {"x": [1, None]})
    assert storage.read_bytes(storage.join(base, "a/b.bin")) == b"\x00\xff"
    assert storage.read_json(storage.join(base, "a/c.json")) == {"x": [1, None]}
    assert storage.exists(storage.join(base, "a/b.bin"))
    assert not storage.exists(storage.join(base, "a/none"))


def test_a_write_replaces_and_is_seen_at_once(base: str) -> None:
    uri = storage.join(base, "f")
    storage.write_bytes(uri, b"old")
    assert storage.list_files(base) == [uri]
    storage.write_bytes(uri, b"new!")
    storage.write_bytes(uri + "2", b"x")
    assert storage.read_bytes(uri) == b"new!"
    assert storage.list_files(base) == [uri, uri + "2"], "a listing must not come from a cache"


def test_a_new_file_never_replaces_one(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a/f"
    storage.write_bytes(uri, b"first", new=True)
    with pytest.raises(FileExistsError):
        storage.write_bytes(uri, b"second", new=True)
    assert storage.read_bytes(uri) == b"first"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f"]


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may become larger than 1,000 bytes: what a process hears then is what a full disk says."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("little_room")
def test_a_full_disk_is_told_with_its_folder_and_leaves_what_was_there(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a/f"
    storage.write_bytes(uri, b"before")
    with pytest.raises(UserError, match=f"disk={tmp_path}/a: is full .*make room there"):
        storage.write_bytes(uri, b"0" * 2000)
    with pytest.raises(UserError, match="is full"), storage.writing(uri) as local:
        local.write_bytes(b"0" * 2000)
    assert storage.read_bytes(uri) == b"before"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["f"]


def test_list_files_is_recursive_sorted_and_filtered(base: str) -> None:
    for name in ("b.parquet", "a/z.parquet", "a/y.json"):
        storage.write_bytes(storage.join(base, name), b"1")
    expected = [storage.join(base, name) for name in ("a/z.parquet", "b.parquet")]
    assert storage.list_files(base, ".parquet") == expected
    assert storage.list_files(storage.join(base, "absent")) == []


def test_size_limit_is_checked_before_reading(base: str) -> None:
    uri = storage.join(base, "big")
    storage.write_bytes(uri, b"x" * 100)
    assert len(storage.read_bytes(uri, max_bytes=100)) == 100
    with pytest.raises(ValueError, match="100 bytes is over the limit of 99"):
        storage.read_bytes(uri, max_bytes=99)


NAMES = ["a.mp4", "-a,1,2,b.mp4", "x.tar#1,2,#ä ♪/../b//c.mp4", "http://host/a.mp4", "two\nlines.mp4", ""]


@pytest.mark.parametrize("name", NAMES, ids=[f"name{n}" for n in range(len(NAMES))])
def test_a_member_of_a_tar_is_a_range_of_it(base: str, name: str) -> None:
    tar = storage.join(base, "sub,#1", "-x y.tar")
    storage.write_bytes(tar, b"0123456789")
    part = storage.Member(tar, 3, 4, name)
    assert storage.member(part.uri) == part
    assert storage.file_of(part.uri) == tar
    assert storage.absolute(part.uri) == part.uri
    assert storage.read_bytes(part.uri, max_bytes=4) == b"3456"
    assert storage.exists(part.uri)
    with pytest.raises(ValueError, match="4 bytes is over the limit of 3"):
        storage.read_bytes(part.uri, max_bytes=3)
    assert storage.read_bytes(storage.Member(tar, 10, 0, name).uri) == b""
    with pytest.raises(EOFError, match="the tar ends within"):
        storage.read_bytes(storage.Member(tar, 8, 4, name).uri)
    for change in (lambda: storage.write_bytes(part.uri, b"x"), lambda: storage.remove(part.uri)):
        with pytest.raises(ValueError, match="can only be read"):
            change()
    assert storage.read_bytes(tar) == b"0123456789"
    assert not storage.exists(storage.Member(storage.join(base, "none.tar"), 0, 1, name).uri)


def test_names_that_only_look_like_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for uri in ("/d/a.tar", "/d/a.tar#1,2", "/d/a#1,2,b.mp4", "/d/a.tar#-1,2,b", "a.tar.gz#1,2,b.mp4", "s3://b/#1,2,3"):
        assert storage.member(uri) is None
        assert storage.file_of(uri) == uri
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("file://x/../a.tar#1,2,../b") == f"{tmp_path}/a.tar#1,2,../b"


def test_sizes_come_with_the_listing(base: str) -> None:
    for name, data in (("f/b.x", b"12"), ("f/sub/a.x", b"1"), ("f/c.y", b"123")):
        storage.write_bytes(storage.join(base, name), data)
    folder = storage.join(base, "f")
    assert list(storage.file_sizes(folder, ".x").items()) == [(f"{folder}/b.x", 2), (f"{folder}/sub/a.x", 1)]
    assert list(storage.file_sizes(folder)) == storage.list_files(folder)
    assert storage.file_sizes(storage.join(base, "absent")) == {}


def test_a_listing_tells_sizes_times_and_one_level(base: str) -> None:
    for name in ("a/x", "a/b/y", "z"):
        storage.write_bytes(f"{base}/listed/{name}", b"12")
    found = storage.files_in(f"{base}/listed")
    assert found.keys() == {"a/x", "a/b/y", "z"}
    assert {facts.size_bytes for facts in found.values()} == {2}
    assert all(abs(facts.modified_s - time.time()) < 60 for facts in found.values())
    assert storage.files_in(f"{base}/listed", depth=1).keys() == {"z"}
    assert storage.names_in(f"{base}/listed") == ["a", "z"]
    assert (storage.files_in(f"{base}/absent"), storage.names_in(f"{base}/absent")) == ({}, [])


def test_tables_come_back_in_file_order(base: str) -> None:
    for name, values in (("shard-00001.parquet", [3]), ("shard-00000.parquet", [1, 2])):
        storage.write_table(storage.join(base, name), pa.table({"x": values, "y": ["s"] * len(values)}))
    assert storage.read_table(base).column("x").to_pylist() == [1, 2, 3]
    assert storage.read_table(storage.join(base, "shard-00001.parquet"), ["x"]).column_names == ["x"]
    with pytest.raises(UserError, match="run the stage"):
        storage.read_table(storage.join(base, "absent"))


def test_a_table_says_which_code_wrote_it(base: str, tmp_path: Path) -> None:
    uri = storage.join(base, "a.parquet")
    storage.write_table(uri, pa.table({"x": [1]}).replace_schema_metadata({"mine": "kept"}))
    assert storage.written_by(uri) == code_version()
    assert storage.read_table(uri).schema.metadata[b"mine"] == b"kept"
    pq.write_table(pa.table({"x": [2]}), tmp_path / "old.parquet")  # as the code before wrote it
    assert storage.written_by(str(tmp_path / "old.parquet")) == "unknown"


def test_remove_takes_a_folder_and_may_find_nothing(base: str) -> None:
    storage.write_bytes(storage.join(base, "d/e/f"), b"1")
    storage.write_bytes(storage.join(base, "kept"), b"1")
    storage.remove(storage.join(base, "d"))
    storage.remove(storage.join(base, "d"))
    assert storage.list_files(base) == [storage.join(base, "kept")]


def test_a_folder_goes_up_and_comes_down(base: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "one.txt").write_text("1")
    (source / "sub" / "-two.txt").write_text("2")
    target = storage.join(base, "up")
    storage.upload_folder(source, target)
    down = Path(storage.local_folder(target))
    assert (down / "one.txt").read_text() == "1"
    assert (down / "sub" / "-two.txt").read_text() == "2"


@pytest.mark.parametrize("name", ["-dash.bin", "with space.bin", "odd://name.bin", "ünïcode.bin"])
def test_odd_local_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    uri = "file://" + str(tmp_path / name)
    storage.write_bytes(uri, b"1")
    assert storage.read_bytes(uri) == b"1"
    assert os.path.isabs(storage.absolute("x"))
    assert storage.absolute("s3://b/k") == "s3://b/k"


def test_writing_is_in_one_step_or_not_at_all(tmp_path: Path) -> None:
    target = f"{tmp_path}/new/a.bin"
    with storage.writing(target) as local:
        local.write_bytes(b"whole")
        assert not storage.exists(target)
    assert storage.read_bytes(target) == b"whole"

    def fail() -> None:
        with storage.writing(target) as local:
            local.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert storage.read_bytes(target) == b"whole"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.bin"]


@pytest.mark.slow
def test_writing_to_s3(s3: str) -> None:
    with storage.writing(f"{s3}/a.bin") as local:
        local.write_bytes(b"whole")
        assert not storage.exists(f"{s3}/a.bin")
    assert storage.read_bytes(f"{s3}/a.bin") == b"whole"


@pytest.mark.slow
def test_a_config_file_may_name_the_s3_server(s3: str, s3_server: dict[str, str], tmp_path: Path) -> None:
    storage.write_bytes(f"{s3}/a.bin", b"found")
    settings = {"s3": {"endpoint_url": s3_server["AWS_ENDPOINT_URL"]}}
    (tmp_path / "s3.json").write_text(json.dumps(settings))
    environment = {**os.environ, "FSSPEC_CONFIG_DIR": str(tmp_path)}
    del environment["AWS_ENDPOINT_URL"]
    code = f"from aai import storage; print(storage.read_bytes('{s3}/a.bin').decode())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == "found"


@pytest.mark.slow
def test_copies_of_s3_folders_do_not_pile_up(s3: str, tmp_path: Path) -> None:
    storage.write_bytes(f"{s3}/b/a.bin", b"found")
    code = f"from aai import storage; print(storage.local_folder('{s3}/b'))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert Path(done.stdout.strip()).parent == tmp_path
    assert list(tmp_path.iterdir()) == []
