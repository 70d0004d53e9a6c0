"""`aai data`: one clip told in full, tables rewritten row for row, tars that the webdataset library reads."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai import schema, storage
from aai.errors import UserError
from aai.features import METADATA_KEY, SHAPES_KEY, FeatureReader, load_split
from aai.media.waveform import decode_flac
from aai.version import METADATA_KEY as WRITTEN_BY
from aai.version import code_version
from pipelines.__main__ import main
from pipelines.data import DataConfig, run
from pipelines.featurize import FeaturizeConfig, FeaturizeWorker, list_shards
from pipelines.featurize import _manifest as feature_manifest
from tests.tiny import write_clip, write_clip_table, write_diffusion

ROWS, FILES = 8, 3


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Curated tables: 24 accepted clips of 2 pictures; rejects: a double of the first clip, and an unreadable file."""
    out = tmp_path_factory.mktemp("data") / "curated"
    write_clip_table(out / "accepted", FILES, ROWS)
    first = storage.read_table(f"{out}/accepted").slice(0, 1).to_pylist()[0]
    double = {**first, "uri": "clips/double.mp4", "stage": "duplicate", "code": "EXACT_DUPLICATE", "transient": False}
    double |= {"message": f"same clip as {first['uri']} ({first['clip_id']}) of split train", "rms_db": -20.0}
    double["thumbnail"] = first["frames"][0]
    lost = {"uri": "clips/lost$x^2\n.mp4", "caption": "", "labels": [], "split": "train", "stage": "read"}
    lost |= {"code": "MISSING_FILE", "message": "no such file", "transient": False}
    rejects = pa.Table.from_pylist([double, lost], schema.REJECT_TABLE)
    storage.write_table(f"{out}/rejected/shard-00000.parquet", rejects)
    return out


@pytest.fixture(scope="module")
def features(curated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FeatureTable of the accepted clips, by random models, without Ray."""
    root = tmp_path_factory.mktemp("features")
    clip = write_clip(root / "clip")
    foundation = {"clip": str(clip), "diffusion": str(write_diffusion(root / "diffusion", clip))}
    settings = {"input": str(curated / "accepted"), "out": str(root / "features"), "foundation": foundation}
    config = FeaturizeConfig.parse(settings)
    shards = list_shards(config)
    worker = FeaturizeWorker(config.model_dump(mode="json"), config.content_digest())
    for shard in shards:
        worker(shard)
    manifest = feature_manifest(config, shards, config.content_digest(), "input", 1.0)
    storage.write_json(f"{config.out}/manifest.json", manifest.model_dump(mode="json"))
    return Path(config.out)


def data(action: str, **settings: Any) -> dict[str, Any]:
    return run(DataConfig.parse({"action": action, **{k: v and str(v) for k, v in settings.items()}}))


# ---------------------------------------------------------------- show


def test_show_tells_everything_and_draws_a_sheet(
    curated: Path, features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "show", "clip-1-3", "--table", str(curated), "--features", str(features), "--out", str(tmp_path)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    row = storage.read_table(f"{curated}/accepted/shard-00001.parquet").slice(3, 1).to_pylist()[0]
    for text in ("accepted: ", "shard-00001.parquet row 3", row["caption"], row["uri"], "split                  val"):
        assert text in out
    assert "image_features         2 x 32, norms 1" in out.replace("0.9999", "1").replace("1.0001", "1")
    assert "latents                8 x 8 x 8" in out
    assert out.count(f"written by             {code_version()}") == 2  # the clip's table, and its features
    sheet = tmp_path / "clip-1-3.png"
    assert f"contact sheet: {sheet}" in out
    picture = Image.open(sheet)
    assert picture.width > 800
    assert len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 50


@pytest.mark.parametrize("wanted", ["clip-0-0", "clips/0-0.mp4", "double.mp4"])
def test_a_rejected_double_is_shown_with_its_kept_clip(curated: Path, tmp_path: Path, wanted: str) -> None:
    found = data("show", id=wanted, table=curated, features=None, out=tmp_path)
    verdicts = ["code" in row for row in found["rows"]]
    assert verdicts == {"clip-0-0": [False, True], "clips/0-0.mp4": [False], "double.mp4": [True]}[wanted]


def test_what_has_neither_id_nor_picture_nor_plain_name_is_shown(curated: Path, tmp_path: Path) -> None:
    found = data("show", id="lost$", table=curated, features=tmp_path / "none", out=tmp_path)
    assert found["rows"][0]["code"] == "MISSING_FILE"
    assert found["features"] is None
    assert Path(found["sheet"]).is_file()


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


# ---------------------------------------------------------------- compact


@pytest.mark.parametrize(
    ("rows_per_file", "sizes"), [(10, [8, 8, 8]), (13, [12, 12]), (1000, [24]), (5, [5] * 4 + [4])]
)
def test_compact_keeps_rows_order_and_schema(
    curated: Path, tmp_path: Path, rows_per_file: int, sizes: list[int]
) -> None:
    result = data("compact", input=curated / "accepted", out=tmp_path / "out", rows_per_file=rows_per_file)
    files = storage.list_files(str(tmp_path / "out"), ".parquet")
    assert [pq.read_metadata(file).num_rows for file in files] == sizes
    assert (result["rows"], result["files"]) == (24, len(sizes))
    assert storage.read_table(str(tmp_path / "out")).equals(storage.read_table(f"{curated}/accepted"))
    assert pq.read_schema(files[0]).equals(schema.CLIP_TABLE)


def test_compact_goes_on_after_a_kill_and_then_does_nothing(curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = data("compact", input=curated / "accepted", out=out, rows_per_file=8)
    (out / "compact.json").unlink()
    (out / "part-00001.parquet").unlink()
    kept = (out / "part-00000.parquet").stat().st_mtime_ns
    assert data("compact", input=curated / "accepted", out=out, rows_per_file=8) == result
    assert (out / "part-00000.parquet").stat().st_mtime_ns == kept
    assert storage.read_table(str(out)).equals(storage.read_table(f"{curated}/accepted"))
    assert data("compact", input=curated / "accepted", out=out, rows_per_file=8) == result
    with pytest.raises(UserError, match="another input or size"):
        data("compact", input=curated / "accepted", out=out, rows_per_file=9)
    with pytest.raises(UserError, match="is not empty"):
        data("compact", input=curated / "accepted", out=curated / "rejected")


def test_large_tables_are_written_group_by_group(tmp_path: Path) -> None:
    numbers = pa.table({"n": range(2000)}).replace_schema_metadata({"who": "me"})
    for i in range(0, 2000, 40):
        storage.write_table(f"{tmp_path}/in/{i:05d}.parquet", numbers.slice(i, 40))
    data("compact", input=tmp_path / "in", out=tmp_path / "out", rows_per_file=1500)
    footer = pq.read_metadata(tmp_path / "out/part-00000.parquet")
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [256, 256, 256, 232]
    again = storage.read_table(f"{tmp_path}/out")
    assert again["n"].to_pylist() == list(range(2000))
    assert again.schema.metadata == {b"who": b"me", WRITTEN_BY: code_version().encode()}


def test_a_compacted_feature_table_trains_the_same(features: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    data("compact", input=features, out=out, rows_per_file=20)
    before, after = (load_split(str(uri), "train", 8000) for uri in (features, out))
    assert before["clip_id"] == after["clip_id"]
    assert (before["image_features"] == after["image_features"]).all()
    assert next(FeatureReader(str(out), "train", 4, 8000).batches())["latents"].shape == (4, 8, 8, 8)
    splits: Counter[str] = Counter()
    for file in storage.list_files(str(out), ".parquet"):
        metadata = pq.read_schema(file).metadata
        assert metadata[METADATA_KEY] == pq.read_schema(features / "shard-00000.parquet").metadata[METADATA_KEY]
        assert (
            pq.read_table(file)["split"].to_pylist().count("val") == json.loads(metadata[SHAPES_KEY])["splits"]["val"]
        )
        splits.update(json.loads(metadata[SHAPES_KEY])["splits"])
    assert splits == storage.read_json(f"{out}/manifest.json")["rows"] == {"train": 18, "val": 6}


def test_tables_of_several_commits_are_one_table(tmp_path: Path) -> None:
    rows = pa.table({"n": [1, 2, 3]})
    for number, metadata in enumerate(({WRITTEN_BY: "b"}, {WRITTEN_BY: "a"}, {WRITTEN_BY: "b"}, {})):
        file = tmp_path / "in" / f"shard-{number:05d}.parquet"
        file.parent.mkdir(exist_ok=True)
        pq.write_table(rows.replace_schema_metadata(metadata), file)
    data("compact", input=tmp_path / "in", out=tmp_path / "out", rows_per_file=12)
    assert storage.written_by(str(tmp_path / "out/part-00000.parquet")) == "a; b"
    assert storage.read_table(f"{tmp_path}/out")["n"].to_pylist() == [1, 2, 3] * 4


def test_show_of_a_table_of_before(curated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "old").mkdir()
    rows = storage.read_table(f"{curated}/accepted/shard-00000.parquet").replace_schema_metadata(None)
    pq.write_table(rows, tmp_path / "old" / "a.parquet")
    data("show", id="clip-0-1", table=tmp_path / "old", features=None, out=tmp_path)
    assert "written by             unknown" in capsys.readouterr().out


def test_tables_of_different_settings_are_not_mixed(features: Path, curated: Path, tmp_path: Path) -> None:
    table = pq.read_table(features / "shard-00000.parquet")
    other = table.replace_schema_metadata({**table.schema.metadata, METADATA_KEY: b"another"})
    for name, part in (("a", table), ("b", other)):
        storage.write_table(f"{tmp_path}/mixed/{name}.parquet", part)
    storage.write_json(f"{tmp_path}/mixed/manifest.json", {})
    with pytest.raises(UserError, match="other settings"):
        data("compact", input=tmp_path / "mixed", out=tmp_path / "out")
    (tmp_path / "mixed/b.parquet").unlink()
    (tmp_path / "mixed/manifest.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        data("compact", input=tmp_path / "mixed", out=tmp_path / "out")
    with pytest.raises(UserError, match="other columns"):
        data("compact", input=curated, out=tmp_path / "out")
    storage.write_bytes(f"{tmp_path}/torn/a.parquet", b"PAR1 torn")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        data("compact", input=tmp_path / "torn", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- export


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
            assert (decode_flac(sample["flac"]) == decode_flac(row["audio"])).all()
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
    storage.write_table(f"{tmp_path}/in/a.parquet", pa.Table.from_pylist(twins, schema.CLIP_TABLE))
    result = data("export", input=tmp_path / "in", out=tmp_path / "out")
    assert [shard["name"] for shard in result["shards"]] == ["___train-000000.tar", "train-000000.tar"]
    with tarfile.open(tmp_path / "out/___train-000000.tar") as tar:
        name = f"{twins[0]['clip_id']}_2.json"
        signals = json.loads(tar.extractfile(name).read())["signals"]  # type: ignore[union-attr]
        assert (signals["rms_db"], signals["video_hash"]) == (None, "01")
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


def test_s3(curated: Path, s3: str) -> None:
    storage.upload_folder(curated, f"{s3}/curated")
    found = data("show", id="clip-2-5", table=f"{s3}/curated", features=None, out=f"{s3}/clips")
    assert Image.open(io.BytesIO(storage.read_bytes(found["sheet"]))).format == "PNG"
    data("compact", input=f"{s3}/curated/accepted", out=f"{s3}/compact", rows_per_file=12)
    assert storage.read_table(f"{s3}/compact").equals(storage.read_table(f"{curated}/accepted"))
    result = data("export", input=f"{s3}/compact", out=f"{s3}/tars")
    with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(f"{s3}/tars/{result['shards'][0]['name']}"))) as tar:
        assert len(tar.getnames()) == 4 * result["shards"][0]["clips"]
