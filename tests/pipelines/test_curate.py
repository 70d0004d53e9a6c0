import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.media.audio import decode_flac
from aai.schema import CLIP_TABLE, REJECT_TABLE
from aai.toy.scoring import score_defects
from aai.toy.world import write_world
from pipelines.cluster import connect, shutdown
from pipelines.curate import CurateConfig, measure_clip, run
from pipelines.settings import ClusterConfig
from tests.clips import make_clip


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    connect(ClusterConfig(num_workers=2))
    yield
    shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 clips: every kind of defect and oddity occurs."""
    folder = tmp_path_factory.mktemp("world")
    write_world(str(folder), 100, seed=3, num_workers=1, progress=False)
    return folder


def curate(folder: Path | str, out: Path | str, **settings: Any) -> dict[str, Any]:
    return run(CurateConfig.parse({"manifest": str(folder), "out": str(out), "rows_per_shard": 24, **settings}))


def test_world_is_curated_by_the_planted_truth(world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "curated"
    with caplog.at_level(logging.INFO):
        result = curate(world / "manifest.csv", out)
    assert result["rows_in"] == 100 == result["accepted"] + result["rejected"]
    assert sum(result["by_code"].values()) == result["rejected"]
    score = score_defects(str(world / "defects.json"), str(out))
    assert score["recall"] == 1, score
    assert score["precision"] == 1, score
    assert all(kind["found"] == kind["planted"] for kind in score["kinds"].values()), score
    assert f"100 rows in = {result['accepted']} accepted + {result['rejected']} rejected (" in caplog.text
    assert storage.read_json(str(out / "curate.json")) == result
    assert not (out / "_measured").exists()
    check_tables(out)
    check_rerun(world, out, result, caplog)


def check_tables(out: Path) -> None:
    for folder, schema in (("accepted", CLIP_TABLE), ("rejected", REJECT_TABLE)):
        assert len(list((out / folder).glob("shard-*.parquet"))) == 5
        for file in (out / folder).iterdir():
            assert pq.read_schema(file).equals(schema)
    for row in storage.read_table(str(out / "accepted")).to_pylist():
        assert decode_flac(row["audio"]).shape == pytest.approx((32_000,), abs=2500)
        assert len(row["frames"]) == len(row["frame_pts_s"]) == 4
        assert Image.open(io.BytesIO(row["frames"][0])).size == (64, 64)
        assert len(row["labels"]) == 4
    rejected = storage.read_table(str(out / "rejected")).to_pylist()
    assert {row["stage"] for row in rejected} == {"decode", "filter", "duplicate"}
    assert all(row["message"] and not row["transient"] for row in rejected)
    assert any(row["thumbnail"] for row in rejected if row["stage"] == "duplicate")


def check_rerun(world: Path, out: Path, result: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert curate(world / "manifest.csv", out) == result
    assert "up to date" in caplog.text
    with pytest.raises(UserError, match="other settings"):
        curate(world / "manifest.csv", out, decode={"num_frames": 2})


def test_a_killed_run_goes_on_and_ends_in_the_same_tables(tmp_path: Path) -> None:
    for i in range(6):
        times = np.arange(0, 2, 0.1) ** (1 + i / 10)
        storage.write_bytes(str(tmp_path / f"media/{i}.mp4"), make_clip(list(np.round(times / times[-1] * 1.9, 3))))
    storage.write_bytes(str(tmp_path / "media/broken.mp4"), b"no clip")
    whole, again = tmp_path / "whole", tmp_path / "again"
    options: dict[str, Any] = {"rows_per_shard": 2, "duplicates": {"enabled": False}}
    first = curate(tmp_path / "media", whole, **options)
    assert (first["accepted"], first["rejected"]) == (6, 1)
    curate(tmp_path / "media", again, **options)
    # As a kill in the middle of the split leaves it: no result, some tables still missing.
    (again / "curate.json").unlink()
    (again / "accepted/shard-00001.parquet").unlink()
    (again / "rejected/shard-00001.parquet").unlink()
    kept = (again / "accepted/shard-00000.parquet").stat().st_mtime_ns
    second = curate(tmp_path / "media", again, **options)
    assert {**second, "seconds": 0} == {**first, "seconds": 0}
    assert (again / "accepted/shard-00000.parquet").stat().st_mtime_ns == kept
    for folder in ("accepted", "rejected"):
        tables = [storage.read_table(str(out / folder)) for out in (whole, again)]
        assert tables[0].equals(tables[1])


def test_what_cannot_be_read_is_a_row_with_a_reason(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "uri": str(tmp_path / "none.mp4"),
        "start_s": None,
        "end_s": None,
        "caption": "",
        "labels": [],
        "split": "t",
    }
    cfg = CurateConfig(manifest="m", out="o").decode
    missing = measure_clip(row, cfg)
    assert (missing["stage"], missing["code"], missing["transient"]) == ("read", "MISSING_FILE", False)
    folder = measure_clip(row | {"uri": str(tmp_path)}, cfg)
    assert (folder["stage"], folder["code"], folder["transient"]) == ("read", "IO_ERROR", True)


def test_too_many_rejections_fail_the_stage(tmp_path: Path) -> None:
    for i in range(3):
        storage.write_bytes(str(tmp_path / f"media/{i}.mp4"), b"no clip")
    with pytest.raises(UserError, match="100% of the rows were rejected"):
        curate(tmp_path / "media", tmp_path / "out")
    assert not (tmp_path / "out/curate.json").exists()
    assert curate(tmp_path / "media", tmp_path / "out", max_reject_ratio=1)["rejected"] == 3


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "media/a.mp4"), make_clip())
    storage.write_bytes(str(tmp_path / "out/precious.txt"), b"x")
    with pytest.raises(UserError, match="is not empty"):
        curate(tmp_path / "media", tmp_path / "out")


def test_plan_starts_nothing(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "media/a.mp4"), b"x")
    plan = CurateConfig(manifest=str(tmp_path / "media"), out=str(tmp_path / "out")).plan()
    assert "1 rows" in plan.inputs["manifest"]
    assert not (tmp_path / "out").exists()


def test_s3(tmp_path: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    storage.write_bytes("s3://aai-test/media/a.mp4", make_clip())
    storage.write_bytes("s3://aai-test/media/b.mp4", b"no clip")
    shutdown()  # Ray's processes take the keys from the environment they start in
    try:
        result = curate("s3://aai-test/media", "s3://aai-test/curated")
        assert (result["accepted"], result["rejected"]) == (1, 1)
        assert storage.read_table("s3://aai-test/curated/accepted")["uri"].to_pylist() == ["s3://aai-test/media/a.mp4"]
        assert storage.list_files("s3://aai-test/curated/_measured") == []
    finally:
        shutdown()
