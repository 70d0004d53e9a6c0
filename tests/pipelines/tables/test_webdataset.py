"""Tars that the webdataset library reads."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from aai import schema, storage
from aai.media.waveform import read_sound
from tests.pipelines.tables.conftest import data


def test_export_is_read_by_the_webdataset_library(curated: Path, tmp_path: Path) -> None:
    import webdataset

    result = data("export", input=curated / "accepted", out=tmp_path, shard_mb=0.2)
    assert result["clips"] == 24
    assert len(result["shards"]) > 3
    rows = {row["clip_id"]: row for row in storage.read_table(f"{curated}/accepted").to_pylist()}
    seen = []
    for shard in result["shards"]:
        assert (tmp_path / shard["name"]).stat().st_size == shard["bytes"] <= 200_000
        samples = list(webdataset.WebDataset(str(tmp_path / shard["name"]), shardshuffle=False))
        assert len(samples) == shard["clips"]
        for sample in samples:
            row, facts = rows[sample["__key__"]], json.loads(sample["json"])
            assert shard["name"].startswith(f"{row['split']}-")
            assert (read_sound(sample["flac"]) == read_sound(row["audio"])).all()
            assert [sample[f"{i}.jpg"] for i in range(2)] == row["frames"]
            assert facts["frame_pts_s"] == row["frame_pts_s"]
            assert [facts[name] for name in ("caption", "labels")] == [row["caption"], row["labels"]]
            assert facts["signals"]["duration_s"] == row["duration_s"]
            seen.append(sample["__key__"])
        decoded = next(iter(webdataset.WebDataset(str(tmp_path / shard["name"]), shardshuffle=False).decode("pil")))
        assert np.asarray(decoded["0.jpg"]).shape == (64, 64, 3)
    assert sorted(seen) == sorted(rows)


def test_export_is_exact_again_and_keeps_twins_apart(curated: Path, tmp_path: Path) -> None:
    twins = storage.read_table(f"{curated}/accepted").slice(0, 2).to_pylist()
    twins[1] |= {"clip_id": twins[0]["clip_id"], "split": "../train", "rms_db": float("nan"), "video_hash": b"\x01"}
    twins = [*twins, {**twins[0], "clip_id": "a.b/c"}]
    table = pa.Table.from_pylist(twins, schema.CLIP_TABLE)
    licences = pa.array(["CC0", None, "CC-BY"], pa.string())
    storage.write_table(f"{tmp_path}/in/a.parquet", table.append_column("license", licences))
    result = data("export", input=tmp_path / "in", out=tmp_path / "out")
    assert [shard["name"] for shard in result["shards"]] == ["___train-000000.tar", "train-000000.tar"]
    with tarfile.open(tmp_path / "out/___train-000000.tar") as tar:
        name = f"{twins[0]['clip_id']}_2.json"
        facts = json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
        assert (facts["signals"]["rms_db"], facts["signals"]["video_hash"]) == (None, "01")
        assert facts["license"] is None
    with tarfile.open(tmp_path / "out/train-000000.tar") as tar:
        assert {name.split(".")[0] for name in tar.getnames()} == {twins[0]["clip_id"], "a_b_c"}
    before = (tmp_path / "out/train-000000.tar").read_bytes()
    (tmp_path / "out/export.json").unlink()
    assert data("export", input=tmp_path / "in", out=tmp_path / "out") == result
    assert (tmp_path / "out/train-000000.tar").read_bytes() == before
    assert not list((tmp_path / "out").glob(".*"))


def test_an_export_that_fails_leaves_no_half_tar(curated: Path, tmp_path: Path) -> None:
    storage.write_table(f"{tmp_path}/in/a.parquet", storage.read_table(f"{curated}/accepted"))
    whole = (tmp_path / "in/a.parquet").read_bytes()
    (tmp_path / "in/a.parquet").write_bytes(whole[:100] + bytes(50_000) + whole[50_100:])
    with pytest.raises((OSError, pa.ArrowInvalid)):
        data("export", input=tmp_path / "in", out=tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_export.json"]
