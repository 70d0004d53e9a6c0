import io
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.media.waveform import read_sound
from aai.schema import CLIP_TABLE, REJECT_TABLE
from aai.toy.scoring import score_defects
from aai.toy.writer import write_world
from aai.version import code_version
from pipelines.__main__ import load_config
from pipelines.curate import CurateConfig, run
from pipelines.curation import measuring
from pipelines.engine.cluster import connect, shutdown
from pipelines.settings import ClusterConfig
from tests.clips import make_clip
from tests.tiny import write_sizes


@pytest.fixture(scope="module")
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


@pytest.mark.usefixtures("ray_cluster")
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
    check_tables(out)
    check_rerun(world, out, result, caplog)


def check_tables(out: Path) -> None:
    for folder, schema in (("accepted", CLIP_TABLE), ("rejected", REJECT_TABLE)):
        assert len(list((out / folder).glob("shard-*.parquet"))) == 5
        for file in (out / folder).iterdir():
            assert pq.read_schema(file).equals(schema)
    for row in storage.read_table(str(out / "accepted")).to_pylist():
        assert read_sound(row["audio"]).shape == pytest.approx((32_000,), abs=2500)
        assert len(row["frames"]) == len(row["frame_pts_s"]) == 4
        assert Image.open(io.BytesIO(row["frames"][0])).size == (64, 64)
        assert len(row["labels"]) == 10
    rejected = storage.read_table(str(out / "rejected")).to_pylist()
    assert {row["stage"] for row in rejected} == {"decode", "filter", "duplicate"}
    assert all(row["message"] and not row["transient"] for row in rejected)
    assert any(row["thumbnail"] for row in rejected if row["stage"] == "duplicate")


def check_rerun(world: Path, out: Path, result: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert curate(world / "manifest.csv", out) == result
    assert "up to date" in caplog.text
    with pytest.raises(UserError, match="decoded by other settings"):
        curate(world / "manifest.csv", out, decode={"num_frames": 2})


def write_media(folder: Path, count: int, first: int = 0) -> None:
    """Clips that are no duplicates of one another."""
    for i in range(first, first + count):
        times = np.arange(0, 2, 0.1) ** (1 + i / 10)
        clip = make_clip(list(np.round(times / times[-1] * 1.9, 3)))
        storage.write_bytes(str(folder / f"{i}.mp4"), clip)


BEFORE = Path("/tmp/aai-curated-before")
OLD_SETTINGS: dict[str, Any] = {
    "rows_per_shard": 4,
    "max_reject_ratio": 1,
    "decode": {"num_frames": 2, "frame_size_px": 32},
    "cut": {"mode": "windows", "window_s": 1, "min_s": 0.5},
}


@pytest.fixture
def tables_of_before() -> Iterator[Path]:
    """A manifest, media and tables as an earlier version of the code left them, at their own path and time."""
    shutil.rmtree(BEFORE, ignore_errors=True)
    shutil.copytree(Path(__file__).parents[1] / "data/curated_before", BEFORE)
    for second, name in enumerate(("a", "copy of a", "b", "c", "broken", "silent")):
        time_ns = 10**18 + second * 10**9
        os.utime(BEFORE / f"media/{name}.mp4", ns=(time_ns, time_ns))
    yield BEFORE
    shutil.rmtree(BEFORE)


@pytest.mark.usefixtures("shards_here")
def test_tables_of_before_are_gone_on_with(tables_of_before: Path) -> None:
    """Every digest and key is what it was: nothing is looked through, measured or written again without need."""
    out, manifest = tables_of_before / "curated", tables_of_before / "manifest.csv"
    first = storage.read_json(str(out / "curate.json"))
    before, measured = written(out), sorted((out / "_measured").iterdir())
    kept = tables(out)
    assert curate(manifest, out, **OLD_SETTINGS) == first
    (out / "curate.json").unlink()
    again = curate(manifest, out, **OLD_SETTINGS)
    assert {name: again[name] for name in first if name not in ("measured", "seconds")} == {
        name: value for name, value in first.items() if name not in ("measured", "seconds")
    }
    assert (again["measured"], written(out), again["decoders"]) == (0, before, ["1"])
    # Another filter judges the old shards anew; without it they are the old tables again.
    curate(manifest, out, **OLD_SETTINGS, filters={"min_duration_s": 1.5}, rejudge=True)
    assert len(tables(out)["accepted"]) == 0
    curate(manifest, out, **OLD_SETTINGS, rejudge=True)
    assert tables(out) == kept
    assert sorted((out / "_measured").iterdir()) == measured
    assert len(list((out / "_cut").iterdir())) == len(list((out / "_plan").iterdir())) == 1


APART: dict[str, Any] = {"rows_per_shard": 2, "duplicates": {"enabled": False}}


def tables(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of both tables, in an order of their own, without what names a place."""
    found = {name: storage.read_table(str(out / name)).to_pylist() for name in ("accepted", "rejected")}
    return {name: sorted(rows, key=lambda row: (row["uri"], row["start_s"] or 0)) for name, rows in found.items()}


def written(out: Path) -> dict[str, int]:
    """When each table of a folder was written."""
    return {f"{file.parent.name}/{file.name}": file.stat().st_mtime_ns for file in out.glob("*ed/*.parquet")}


@pytest.mark.usefixtures("shards_here")
def test_a_killed_run_goes_on_and_ends_in_the_same_tables(tmp_path: Path) -> None:
    write_media(tmp_path / "media", 6)
    storage.write_bytes(str(tmp_path / "media/broken.mp4"), b"no clip")
    whole, again = tmp_path / "whole", tmp_path / "again"
    first = curate(tmp_path / "media", whole, **APART)
    assert (first["accepted"], first["rejected"], first["measured"]) == (6, 1, 7)
    curate(tmp_path / "media", again, **APART)
    # As kills leave it: no result, one shard not measured, another not judged.
    (again / "curate.json").unlink()
    for lost in ("_measured/shard-00002", "accepted/shard-00002", "rejected/shard-00002", "accepted/shard-00001"):
        (again / f"{lost}.parquet").unlink()
    kept = written(again)
    second = curate(tmp_path / "media", again, **APART)
    assert second["measured"] == 2
    assert {**second, "seconds": 0, "measured": 7} == {**first, "seconds": 0}
    assert {name: time for name, time in written(again).items() if name in kept and name[0] != "r"} == {
        name: time for name, time in kept.items() if name[0] != "r"
    }
    for folder in ("accepted", "rejected"):
        both = [storage.read_table(str(out / folder)) for out in (whole, again)]
        assert both[0].equals(both[1])


@pytest.mark.usefixtures("shards_here")
def test_only_new_and_changed_files_are_measured(tmp_path: Path) -> None:
    media, out = tmp_path / "media", tmp_path / "out"
    write_media(media, 4)
    curate(media, out, **APART)
    before = written(out)
    write_media(media, 2, first=4)
    grown = curate(media, out, **APART)
    assert (grown["rows_in"], grown["accepted"], grown["measured"]) == (6, 6, 2)
    assert before.items() <= written(out).items()
    storage.write_bytes(str(media / "0.mp4"), b"no clip any more")
    (media / "1.mp4").unlink()
    changed = curate(media, out, **APART)
    assert (changed["rows_in"], changed["accepted"], changed["rejected"], changed["measured"]) == (5, 4, 1, 1)
    fresh = tmp_path / "fresh"
    curate(media, fresh, **APART)
    assert tables(out) == tables(fresh)


@pytest.mark.usefixtures("shards_here")
def test_known_content_is_not_decoded_again(tmp_path: Path) -> None:
    write_media(tmp_path / "media", 3)
    first = curate(tmp_path / "media", tmp_path / "out", **APART)
    before = tables(tmp_path / "out")["accepted"]
    (tmp_path / "media").rename(tmp_path / "moved")
    moved = curate(tmp_path / "moved", tmp_path / "out", **APART)
    assert (first["reused"], moved["measured"], moved["reused"]) == (0, 3, 3)
    after = tables(tmp_path / "out")["accepted"]
    assert [row["uri"] for row in after] == [row["uri"].replace("/media/", "/moved/") for row in before]
    same = ("clip_id", "audio", "frames", "motion")
    assert [[row[name] for name in same] for row in after] == [[row[name] for name in same] for row in before]


@pytest.mark.usefixtures("shards_here")
def test_captions_and_splits_come_from_the_manifest_of_today(tmp_path: Path) -> None:
    write_media(tmp_path, 2)
    manifest = tmp_path / "clips.csv"
    manifest.write_text("uri,caption,split\n0.mp4,old,train\n1.mp4,old,train\n")
    curate(manifest, tmp_path / "out", **APART)
    manifest.write_text("uri,caption,split\n0.mp4,new,test\n1.mp4,old,train\n")
    assert curate(manifest, tmp_path / "out", **APART)["measured"] == 0
    rows = tables(tmp_path / "out")["accepted"]
    assert [(row["caption"], row["split"]) for row in rows] == [("new", "test"), ("old", "train")]
    carved = curate(manifest, tmp_path / "out", val_share=0.999999, **APART)
    assert (carved["measured"], carved["chosen"]["val_share"]["why"][:22]) == (0, "1 of train's 1 rows be")
    assert [row["split"] for row in tables(tmp_path / "out")["accepted"]] == ["test", "val"]


@pytest.mark.usefixtures("shards_here")
def test_retry_measures_the_named_rejects_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media, out = tmp_path / "media", tmp_path / "out"
    write_media(media, 3)
    (media / "later.mp4").mkdir()  # reading a folder fails in a way that may pass
    storage.write_bytes(str(media / "broken.mp4"), b"no clip")
    manifest = tmp_path / "clips.csv"
    manifest.write_text("uri\n" + "\n".join(f"media/{name}.mp4" for name in ("0", "1", "later", "broken", "2")) + "\n")
    first = curate(manifest, out, **APART)
    assert first["by_code"] == {"IO_ERROR": 1, "UNREADABLE": 1}
    assert first["transient"] == 1
    kept = written(out)
    assert curate(manifest, out, **APART, retry="TRANSIENT")["measured"] == 1
    again = curate(manifest, out, **APART, retry=["IO_ERROR", "UNREADABLE"])
    assert again["measured"] == 2
    assert {name: again[name] for name in ("accepted", "rejected", "by_code")} == {
        name: first[name] for name in ("accepted", "rejected", "by_code")
    }
    untouched = {name: time for name, time in kept.items() if name.startswith("_measured")}
    assert untouched.items() <= written(out).items()
    with pytest.raises(UserError, match=r"IO_ERROR \(1\)"):
        curate(manifest, out, **APART, retry="TIMEOUT")
    with pytest.raises(UserError, match="--rejudge"):
        curate(manifest, out, **APART, retry="SILENT")


@pytest.mark.usefixtures("shards_here")
def test_flag_only_keeps_and_marks(world: Path, tmp_path: Path) -> None:
    result = curate(world / "manifest.csv", tmp_path / "out", flag_only=True)
    rows = tables(tmp_path / "out")["accepted"]
    by_flag = Counter(flag for row in rows for flag in row["flags"])
    assert by_flag == result["flagged"]
    assert {"FROZEN_VIDEO", "BLACK_VIDEO", "TOO_SHORT", "EXACT_DUPLICATE", "SILENT"} <= set(by_flag)
    assert by_flag["SILENT"] == by_flag["MOSTLY_SILENT"]  # all that speaks against a clip, not only the first
    assert {row["stage"] for row in tables(tmp_path / "out")["rejected"]} == {"decode"}


@pytest.mark.usefixtures("shards_here")
def test_new_thresholds_need_no_decoding(tmp_path: Path) -> None:
    write_media(tmp_path / "media", 3)
    curate(tmp_path / "media", tmp_path / "out", **APART)
    stricter = {**APART, "filters": {"min_duration_s": 5}, "max_reject_ratio": 1}
    with pytest.raises(UserError, match="--rejudge"):
        curate(tmp_path / "media", tmp_path / "out", **stricter)
    result = curate(tmp_path / "media", tmp_path / "out", **stricter, rejudge=True)
    assert (result["accepted"], result["by_code"], result["measured"]) == (0, {"TOO_SHORT": 3}, 0)
    assert curate(tmp_path / "media", tmp_path / "out", **stricter)["seconds"] == result["seconds"]


@pytest.mark.usefixtures("shards_here")
def test_tables_say_which_code_wrote_them_and_another_commit_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_media(tmp_path / "media", 2)
    first = curate(tmp_path / "media", tmp_path / "out", **APART)
    assert first["written_by"] == code_version()
    files = sorted((tmp_path / "out").glob("*ed/*.parquet"))
    assert {file.parent.name for file in files} >= {"accepted", "rejected"}
    assert {storage.written_by(str(file)) for file in files} == {code_version()}
    for module in ("aai.storage", "pipelines.curate"):
        monkeypatch.setattr(f"{module}.code_version", lambda: "9.9 (commit fffffff)")
    assert curate(tmp_path / "media", tmp_path / "out", **APART) == first
    (tmp_path / "out/curate.json").unlink()
    again = curate(tmp_path / "media", tmp_path / "out", **APART)
    assert (again["measured"], again["written_by"]) == (0, "9.9 (commit fffffff)")
    assert {storage.written_by(str(file)) for file in files} == {code_version()}


@pytest.mark.usefixtures("ray_cluster")
def test_a_job_that_goes_wrong_is_stopped_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "EARLY_ROWS", 4)
    for i in range(40):
        storage.write_bytes(str(tmp_path / f"media/{i}.mp4"), b"no clip")
    with pytest.raises(UserError, match="100% of 4 rows were rejected so far"):
        curate(tmp_path / "media", tmp_path / "out", **APART)
    done = len(list((tmp_path / "out/_measured").iterdir()))
    assert 2 <= done < 20
    result = curate(tmp_path / "media", tmp_path / "out", **APART, max_reject_ratio=1)
    assert result["rejected"] == 40
    assert result["measured"] <= 40 - 2 * done + 2


@pytest.mark.usefixtures("shards_here")
def test_too_many_rejections_fail_the_stage(tmp_path: Path) -> None:
    for i in range(3):
        storage.write_bytes(str(tmp_path / f"media/{i}.mp4"), b"no clip")
    with pytest.raises(UserError, match="100% of 3 rows were rejected"):
        curate(tmp_path / "media", tmp_path / "out")
    assert not (tmp_path / "out/curate.json").exists()
    assert curate(tmp_path / "media", tmp_path / "out", max_reject_ratio=1)["rejected"] == 3


@pytest.mark.usefixtures("shards_here")
def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "media/a.mp4"), make_clip())
    storage.write_bytes(str(tmp_path / "out/precious.txt"), b"x")
    with pytest.raises(UserError, match="is not empty"):
        curate(tmp_path / "media", tmp_path / "out")


@pytest.mark.usefixtures("shards_here")
def test_plan_starts_nothing(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "media/a.mp4"), b"x")
    plan = CurateConfig(manifest=str(tmp_path / "media"), out=str(tmp_path / "out")).plan()
    assert "1 rows" in plan.inputs["manifest"]
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("shards_here")
def test_pictures_are_as_large_as_the_foundation_takes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    media, out = tmp_path / "media", tmp_path / "out"
    for name, size in (("large", (640, 480)), ("small", (320, 240)), ("tiny", (160, 120))):
        storage.write_bytes(str(media / f"{name}.mp4"), make_clip(size=size))
    foundation = write_sizes(tmp_path / "foundation", latents=48).model_dump()
    with caplog.at_level(logging.INFO):
        result = curate(media, out, foundation=foundation, **APART)
    why = "foundation.clip takes 224 px, foundation.diffusion 384 px"
    assert f"decode.frame_size_px = 384 (auto: {why})" in caplog.text
    assert "1 sources are smaller than 384 px and keep their own size" in caplog.text
    assert f"384 px (auto: {why})" in (out / "card.html").read_text()
    assert (result["by_code"], result["small_sources"]) == ({"TOO_SMALL": 1}, 1)
    assert result["chosen"]["filters.min_size_px"] == {"value": 224, "why": "auto: foundation.clip takes 224 px"}
    kept = {Path(row["uri"]).stem: Image.open(io.BytesIO(row["frames"][0])).size for row in tables(out)["accepted"]}
    assert kept == {"large": (512, 384), "small": (320, 240)}
    # Digests see numbers: the same ones by hand go on with the tables, another foundation's do not.
    given = {"decode": {"frame_size_px": 384}, "filters": {"min_size_px": 224}}
    assert curate(media, out, **APART, **given) == result
    larger = write_sizes(tmp_path / "larger").model_dump()
    with pytest.raises(UserError, match="decoded by other settings"):
        curate(media, out, foundation=larger, **APART)


def test_what_is_given_is_kept_and_needs_no_foundation() -> None:
    absent = {"clip": "/nowhere", "diffusion": "/nowhere"}
    settings = {"manifest": "m", "out": "o", "foundation": absent}
    config, chosen = CurateConfig.parse({**settings, "decode": {"frame_size_px": 512}}).fitted()
    assert (config.decode.frame_size_px, config.filters.min_size_px) == (512, 48)
    assert {name: choice.why for name, choice in chosen.items()} == {
        "decode.frame_size_px": "given",
        "filters.min_size_px": "auto: decode.frame_size_px is given",
    }
    assert config.scores.foundation == config.foundation  # one foundation, unless scores name another
    named = {**settings, "scores": {"foundation": {"clip": "toy:clip"}}}
    assert CurateConfig.parse(named).scores.foundation.clip == "toy:clip"
    with pytest.raises(UserError, match=r"foundation\.clip=/nowhere"):
        CurateConfig.parse(settings).fitted()


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
        again = curate("s3://aai-test/media", "s3://aai-test/curated")
        assert again == result
    finally:
        shutdown()


def test_flags_are_settings(tmp_path: Path) -> None:
    argv = ["--manifest", "m.csv", "--out", str(tmp_path), "--max-reject-ratio", "0.2", "--retry", "TIMEOUT,IO_ERROR"]
    config, _ = load_config("curate", [*argv, "--flag-only"])
    assert (config.max_reject_ratio, config.retry) == (0.2, ("TIMEOUT", "IO_ERROR"))
    assert (config.flag_only, config.rejudge) == (True, False)
