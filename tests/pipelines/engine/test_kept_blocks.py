"""Blocks on this node's disk: within their limit, never somebody else's, never another file's, gone with the run."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipelines.engine import kept_blocks
from pipelines.engine.cluster import connect, shutdown
from pipelines.engine.kept_blocks import KeptBlocks, folder_of, remove_kept
from pipelines.settings import ClusterConfig

RUN = "s3://bucket/run"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_what_one_process_keeps_another_finds() -> None:
    first, second = KeptBlocks(RUN, 100), KeptBlocks(RUN, 100)
    assert not folder_of(RUN).exists()
    assert not first.in_use
    assert first.get("a", 3) is None
    assert first.in_use
    first.put("a", b"abc")
    assert second.get("a", 3) == b"abc"
    assert second.get("a", 4) is None, "another size is another block"
    assert KeptBlocks("s3://bucket/other", 100).get("a", 3) is None
    assert folder_of(RUN).stat().st_mode & 0o777 == 0o700


def test_what_was_not_used_for_longest_makes_room() -> None:
    kept = KeptBlocks(RUN, 100)
    for age_s, name in ((40, "a"), (30, "b"), (20, "c")):
        kept.put(name, bytes(30))
        os.utime(folder_of(RUN) / name, (time.time() - age_s, time.time() - age_s))
    assert kept.get("a", 30) is not None
    kept.put("d", bytes(30))
    assert [name for name in "abcd" if kept.get(name, 30)] == ["a", "c", "d"]
    kept.put("e", bytes(100))
    assert sorted(os.listdir(folder_of(RUN))) == ["e"]


def test_what_a_dead_writer_left_goes() -> None:
    kept = KeptBlocks(RUN, 100)
    kept.put("a", bytes(10))
    old, new = folder_of(RUN) / "old.part", folder_of(RUN) / "new.part"
    for file, age_s in ((old, 7200), (new, 5)):
        file.write_bytes(bytes(10))
        os.utime(file, (time.time() - age_s, time.time() - age_s))
    kept.put("b", bytes(10))
    assert sorted(os.listdir(folder_of(RUN))) == ["a", "b", "new.part"]


@pytest.mark.parametrize("fault", ["link", "writable by all", "a file", "off"])
def test_a_folder_that_is_not_ours_alone_is_not_used(
    fault: str, temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(RUN)
    if fault == "link":
        (temporary / "theirs").mkdir()
        folder.symlink_to(temporary / "theirs")
    elif fault == "a file":
        folder.write_bytes(b"")
    elif fault == "writable by all":
        folder.mkdir()
        folder.chmod(0o777)
    kept = KeptBlocks(RUN, 0 if fault == "off" else 100)
    kept.put("a", b"abc")
    assert kept.get("a", 3) is None
    assert not kept.in_use
    assert not list(temporary.glob("*/a"))
    assert ("delete it" in caplog.text) == (fault in ("link", "writable by all"))


def test_a_full_disk_costs_nothing_but_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptBlocks(RUN, 100)
    assert kept.get("a", 3) is None
    with monkeypatch.context() as patch:
        patch.setattr(kept_blocks, "FREE_SHARE", 1.0)  # no disk has so much free
        kept.put("a", b"abc")
    assert kept.get("a", 3) is None
    folder_of(RUN).rmdir()  # somebody tidied up
    kept.put("a", b"abc")
    assert kept.get("a", 3) is None


@pytest.fixture
def cluster() -> Iterator[None]:
    """Ray with one node."""
    connect(ClusterConfig(num_workers=1))
    yield
    shutdown()


def test_a_run_removes_its_own(cluster: None) -> None:
    for run in (RUN, "other"):
        KeptBlocks(run, 100).put("a", b"abc")

    @ray.remote
    def keep(folder: str) -> None:
        os.makedirs(folder)

    elsewhere = f"/tmp/{folder_of(RUN).name}"  # the nodes' own folder for temporary files is another
    ray.get(keep.remote(elsewhere))
    remove_kept(RUN)
    assert not folder_of(RUN).exists()
    assert not os.path.exists(elsewhere)
    assert folder_of("other").exists()
