"""Cutting: spans in numbers, and whole runs over files on disk and on S3."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.errors import UserError
from aai.media.limits import ClipError, DecodeConfig
from aai.media.ranged import hash_of
from aai.media.shots import Probe, probe_from_json, probe_to_json
from pipelines.curation.curate_config import CutConfig
from pipelines.curation.cut import CutWorker, _clips, cut_rows, spans
from pipelines.curation.layout import CUT
from pipelines.engine import ranges
from pipelines.engine.cluster import connect, shutdown
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import read_manifest
from pipelines.settings import ClusterConfig
from tests.aai.media.test_shots import make_shots
from tests.clips import index_first, make_clip, make_moving
from tests.pipelines.manifests.test_tar import make_tar

CLUSTER = ClusterConfig(num_workers=2)
DECODE = DecodeConfig()


@pytest.fixture(scope="module")
def ray_cluster(s3_server: dict[str, str]) -> Iterator[None]:
    """Workers have the environment that Ray was started with."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.items():
            patch.setenv(name, value)
        connect(CLUSTER)
    yield
    shutdown()


def probe(duration_s: float, is_whole: bool = True, shots: list[tuple[float, float]] | None = None) -> Probe:
    return Probe(duration_s, is_whole, tuple(shots) if shots else None)


@pytest.mark.parametrize(
    ("duration_s", "settings", "expected"),
    [
        (25, {}, [(0, 10), (10, 20), (20, 25)]),
        (20, {}, [(0, 10), (10, 20)]),
        (21.9999, {}, [(0, 10), (10, 20)]),
        (22.0004, {}, [(0, 10), (10, 20), (20, 22)]),
        (10, {}, []),
        (3, {}, []),
        (11, {}, [(0, 10)]),
        (20, {"stride_s": 5}, [(0, 10), (5, 15), (10, 20)]),
        (22, {"stride_s": 5}, [(0, 10), (5, 15), (10, 20), (15, 22)]),
        (25, {"stride_s": 15}, [(0, 10), (15, 25)]),
        (0.9, {"window_s": 0.3, "min_s": 0}, [(0, 0.3), (0.3, 0.6), (0.6, 0.9)]),
    ],
)
def test_windows(duration_s: float, settings: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    assert spans(probe(duration_s), CutConfig(mode="windows", **settings)) == expected


def test_windows_cover_everything() -> None:
    for stride_s in (None, 1.1, 3.3):
        cfg = CutConfig(mode="windows", window_s=3.3, stride_s=stride_s, min_s=0)
        for tenths in range(34, 200):
            found = spans(probe(tenths / 10), cfg)
            assert (found[0][0], found[-1][1]) == (0, tenths / 10)
            assert all(after[0] <= before[1] for before, after in pairwise(found))
            assert all(0 < end - start <= 3.3 + 1e-6 for start, end in found)


def test_spans_of_shots() -> None:
    cfg = CutConfig(mode="shots", max_s=8)
    found = [(0.0, 1.5), (1.5, 6.0), (6.0, 26.0)]
    assert spans(probe(26, shots=found), cfg) == [(1.5, 6.0), (6.0, 12.667), (12.667, 19.333), (19.333, 26.0)]
    assert spans(probe(7, shots=[(0.0, 7.0)]), cfg) == []
    assert spans(probe(2, shots=[(0.0, 1.0), (1.0, 2.0)]), cfg) == [], "nothing but rests: the file stays whole"


def test_what_breaks_off_has_a_clip_for_the_rest() -> None:
    cfg = CutConfig(mode="windows")
    assert spans(probe(25, False), cfg) == [(0, 10), (10, 20), (20, 25), (25, None)]
    assert spans(probe(5, False), cfg) == [(0, 5), (5, None)]
    assert spans(ClipError("UNREADABLE", ""), cfg) == []


def test_settings_that_leave_no_clip_are_refused() -> None:
    with pytest.raises(UserError, match="min_s is longer"):
        CutConfig.parse({"mode": "windows", "window_s": 1})


def make_files(base: str) -> None:
    """Whole files, broken ones, and a tar with one of each."""
    good = make_shots([4, 3, 5], size=(96, 64))
    files = {"a.mp4": good, "short.mp4": make_clip(duration_s=1), "no.mp4": b"no media", "empty.mp4": b""}
    for name, data in files.items():
        storage.write_bytes(storage.join(base, name), data)
    storage.write_bytes(storage.join(base, "t.tar"), make_tar({"-in, side.mp4": good, "-in, side.txt": b"words"}))


def clips_of(rows: list[ManifestRow], name: str) -> list[tuple[float | None, float | None]]:
    return [(row.start_s, row.end_s) for row in rows if row.uri.endswith(name)]


@pytest.mark.parametrize("where", ["local", "s3"])
@pytest.mark.usefixtures("ray_cluster")
def test_whole_files_become_clips(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    base = str(tmp_path / "in") if where == "local" else storage.join(request.getfixturevalue("s3"), "in")
    out = base + "-out"
    make_files(base)
    rows = read_manifest(base)
    rows.append(replace(rows[0], start_s=1.0, end_s=2.0))
    assert cut_rows(rows, CutConfig(), DECODE, out, CLUSTER) == rows
    assert storage.list_files(out) == []

    found = cut_rows(rows, CutConfig(mode="windows", window_s=5), DECODE, out, CLUSTER)
    assert clips_of(found, "/a.mp4") == [(0, 5), (5, 10), (10, 12), (1, 2)], "a row with a window keeps it"
    assert clips_of(found, "-in, side.mp4") == [(0, 5), (5, 10), (10, 12)]
    assert {row.caption for row in found if "side" in row.uri} == {"words"}
    for name in ("short.mp4", "no.mp4", "empty.mp4"):
        assert clips_of(found, name) == [(None, None)]

    found = cut_rows(rows, CutConfig(mode="shots", min_s=1), DECODE, out, CLUSTER)
    for name in ("/a.mp4", "-in, side.mp4"):
        edges = [edge for clip in clips_of(found, name)[:3] for edge in clip]
        assert edges == pytest.approx([0, 4, 4, 7, 7, 12], abs=0.02)


@pytest.mark.usefixtures("ray_cluster")
def test_only_new_changed_and_passingly_failed_files_are_looked_through(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    base, out, cfg = str(tmp_path / "in"), str(tmp_path / "out"), CutConfig(mode="windows", window_s=1, min_s=0.5)
    for name in ("b", "d"):
        storage.write_bytes(f"{base}/{name}.mp4", make_clip(duration_s=2))

    def look() -> tuple[list[str], int]:
        rows, before = read_manifest(base), set(storage.list_files(out))
        found = cut_rows(rows, cfg, DECODE, out, CLUSTER)
        assert found == cut_rows(rows, cfg, DECODE, out, CLUSTER)
        new = [storage.read_json(file) for file in set(storage.list_files(out)) - before]
        return [row.uri[-5] for row in found], sum(len(shard) for shard in new)

    assert look() == (list("bbdd"), 2)
    assert look() == (list("bbdd"), 0)
    storage.write_bytes(f"{base}/a.mp4", make_clip(duration_s=3))
    assert look() == (list("aaabbdd"), 1), "a new file, though it comes first"
    storage.write_bytes(f"{base}/b.mp4", index_first(make_clip(duration_s=4)))
    assert look() == (list("aaabbbbdd"), 1)
    cfg = CutConfig(mode="windows", window_s=2, min_s=0.5)
    assert look() == (list("aabbd"), 0), "another window needs no new look"
    for file in storage.list_files(f"{out}/{CUT}"):
        kept = {key: {"code": "IO_ERROR", "message": "", "transient": True} for key in storage.read_json(file)}
        storage.write_json(file, kept)
    assert look()[0] == list("aabbd"), "what may have been a passing fault is tried again"
    assert "0 of 3 files cannot be cut" in caplog.text


def test_failures_are_told_not_raised(tmp_path: Path) -> None:
    (tmp_path / "big.mp4").write_bytes(make_clip(duration_s=3))
    (tmp_path / "dir.mp4").mkdir()
    worker = CutWorker(str(tmp_path), {"mode": "shots", "max_file_s": 2}, {"max_bytes": 2**20})
    for name, code in (("big.mp4", "TOO_LONG"), ("none.mp4", "MISSING_FILE"), ("dir.mp4", "IO_ERROR")):
        found = worker.probe(str(tmp_path / name))
        assert isinstance(found, ClipError)
        assert found.code == code
    small = CutWorker(str(tmp_path), {"mode": "windows"}, {"max_bytes": 100})
    found = small.probe(str(tmp_path / "big.mp4"))
    assert isinstance(found, ClipError)
    assert "limit of 100" in found.message


def test_a_long_file_is_hashed_while_it_is_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_moving(num_frames=160, size=(320, 240))
    (tmp_path / "long.mp4").write_bytes(data)
    uri, out, cfg = str(tmp_path / "long.mp4"), str(tmp_path / "out"), CutConfig(mode="windows", window_s=3, min_s=1)
    worker = CutWorker(out, cfg.model_dump(), {})
    assert worker.probe(uri) == Probe(8.0, True), "a small one is hashed when it is measured"
    read, sizes = storage.read_range, []

    def counted(uri: str, start: int, end: int) -> bytes:
        sizes.append(end - start)
        return read(uri, start, end)

    monkeypatch.setattr(storage, "read_range", counted)
    monkeypatch.setattr(ranges, "IN_MEMORY_BYTES", 1000)
    monkeypatch.setattr(ranges, "BLOCK_BYTES", len(data) // 20)
    found = Probe(8.0, True, content_hash=hash_of(data))
    assert worker.probe(uri) == found
    assert sum(sizes) <= 1.3 * len(data)
    assert probe_from_json(probe_to_json(found)) == found
    row = ManifestRow(uri=uri, split="train")
    clips = _clips(row, found, cfg)
    assert [(clip.start_s, clip.end_s, clip.content_hash) for clip in clips] == [
        (start_s, start_s + length_s, hash_of(data)) for start_s, length_s in ((0, 3), (3, 3), (6, 2))
    ]
    assert _clips(row, ClipError("TOO_LONG", ""), cfg) == [row]


def test_shots_without_their_finder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package cv2"):
        CutWorker(str(tmp_path), {"mode": "shots"}, {})
