import io
import tarfile
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai.errors import UserError
from pipelines.__main__ import load_config
from pipelines.curate import CurateConfig
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import named_splits, read_manifest, with_val_share


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_csv(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "m.csv",
        "uri,start_s,end_s,caption,labels,split\n"
        '-a b ♪.mp4,,,"a dog, barking",dog;rain,test\n'
        "/abs/c.mp4,1.5,3,,,\n"
        "s3://bucket/d.mp4,,,,,val\n",
    )
    first, second, third = read_manifest(manifest)
    assert first == ManifestRow(
        uri=f"{tmp_path}/-a b ♪.mp4", caption="a dog, barking", labels=("dog", "rain"), split="test"
    )
    assert (second.uri, second.start_s, second.end_s) == ("/abs/c.mp4", 1.5, 3.0)
    assert (second.split, second.labels, second.caption) == ("train", (), "")
    assert (third.uri, third.split) == ("s3://bucket/d.mp4", "val")


def test_parquet_with_lists_and_nan(tmp_path: Path) -> None:
    table = pa.table({"uri": ["a.mp4"], "labels": [["dog", "rain"]], "start_s": [float("nan")]})
    pq.write_table(table, tmp_path / "m.parquet")
    row = read_manifest(str(tmp_path / "m.parquet"))[0]
    assert (row.uri, row.labels, row.start_s) == (f"{tmp_path}/a.mp4", ("dog", "rain"), None)


def test_folder(tmp_path: Path) -> None:
    for name in ("dog/b.mp4", "dog/-a.MP4", "cat/c.wav", "cat/notes.txt"):
        write(tmp_path / name, "x")
    rows = read_manifest(str(tmp_path))
    assert [(row.uri.removeprefix(str(tmp_path)), row.labels) for row in rows] == [
        ("/cat/c.wav", ("cat",)), ("/dog/-a.MP4", ("dog",)), ("/dog/b.mp4", ("dog",)),
    ]  # fmt: skip


def test_tars_and_media_of_a_folder_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "c/y.mp4"):
        write(tmp_path / name, "x")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for name in ("2.mp4", "1.mp4"):
            tar.addfile(tarfile.TarInfo(name))
    rows = read_manifest(str(tmp_path), default_split="val")
    assert [row.uri.removeprefix(f"{tmp_path}/") for row in rows] == [
        "a/x.mp4", "b.tar#512,0,2.mp4", "b.tar#1024,0,1.mp4", "c/y.mp4",
    ]  # fmt: skip
    assert {row.split for row in rows} == {"val"}
    assert [row.uri for row in read_manifest(str(tmp_path / "b.tar"))] == [row.uri for row in rows[1:3]]
    write(tmp_path / "c/z.tar.gz", "x")
    with pytest.raises(UserError, match=r"z\.tar\.gz: is a compressed tar"):
        read_manifest(str(tmp_path))


def test_a_table_may_name_members(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.csv", 'uri\n"sub/t.tar#512,3,http://h/-a,b.mp4"\n')
    assert read_manifest(manifest)[0].uri == f"{tmp_path}/sub/t.tar#512,3,http://h/-a,b.mp4"


def test_a_val_share_keeps_files_together_and_is_stable() -> None:
    def row(number: int, start_s: float, split: str = "train") -> ManifestRow:
        return ManifestRow(uri=f"/data/{number}/video.mp4", start_s=start_s, split=split)

    rows = [row(number, start_s) for number in range(1000) for start_s in (0.0, 2.0)]
    chosen = with_val_share(rows, 0.1)
    assert [replace(row, split="train") for row in chosen] == rows
    sides = {split: {r.uri for r in chosen if r.split == split} for split in ("train", "val")}
    assert not sides["train"] & sides["val"]
    assert 70 < len(sides["val"]) < 130
    assert with_val_share(rows, 0.1) == chosen
    assert with_val_share(rows[::-1][:500], 0.1) == chosen[::-1][:500]  # whatever the other clips are
    assert {r.uri for r in with_val_share(rows, 0.2) if r.split == "val"} > sides["val"]
    held_out = [row(number, 0.0, "test") for number in range(100)]
    assert with_val_share(held_out, 0.9) == held_out
    inside = [
        ManifestRow(uri=f"/d/a.tar#{at},5,{name}.mp4", split="train") for name in range(200) for at in (512, 1024)
    ]
    splits = [row.split for row in with_val_share(inside, 0.5)]
    assert splits[::2] == splits[1::2]  # not where in the tar it stands
    assert set(splits) == {"train", "val"}


def test_mistakes_are_named(tmp_path: Path) -> None:
    bad = {
        "path,caption\na.mp4,x\n": r"no column 'uri' \(found: path, caption\)",
        "uri\n": "names no clips",
        "": "no column 'uri'",
        "uri,start_s\na.mp4,soon\n": "row 1: start_s is 'soon'",
        "uri,caption\n ,x\n": "row 1 has an empty uri",
        "uri\nhttp://host/a.mp4\n": "scheme 'http' is not allowed",
        'uri,caption\na.mp4,"x\n' + "b.mp4,y\n" * 20_000: r"cannot be read as CSV \(field larger .* not closed",
    }
    for number, (text, message) in enumerate(bad.items()):
        manifest = write(tmp_path / f"{number}.csv", text)
        with pytest.raises(UserError, match=message) as caught:
            read_manifest(manifest)
        assert manifest in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        read_manifest(str(tmp_path / "none.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no media files"):
        read_manifest(str(tmp_path / "empty"))


def curated_splits(manifest: str, **settings: object) -> list[str]:
    """The splits of the rows that curate takes from a manifest."""
    return [row.split for row in CurateConfig.parse({"manifest": manifest, "out": "out", **settings}).rows()]


def test_splits_that_no_stage_uses_are_refused_with_the_setting_that_mends_them(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.csv", "uri,split\na.mp4,train\nb.mp4,validation\nc.mp4,eval\nd.mp4,\n")
    with pytest.raises(
        UserError, match=r"row 2 \(.*b\.mp4\): split is 'validation', not one of train, val, test"
    ) as error:
        curated_splits(manifest)
    assert error.value.remedy.endswith("""--set 'split_names={"validation": val, "eval": test}'""")
    setting = error.value.remedy.split("'")[1]
    config, _ = load_config("curate", ["--manifest", manifest, "--out", str(tmp_path / "out"), "--set", setting])
    assert [row.split for row in config.rows()] == ["train", "val", "test", "train"]


@pytest.mark.parametrize("name", ["fold3", "1", "no", "Train", " VAL2"])
def test_a_split_of_another_name_can_be_mapped_whatever_it_is(tmp_path: Path, name: str) -> None:
    manifest = write(tmp_path / "m.csv", f"uri,split\na.mp4,{name}\n")
    with pytest.raises(UserError, match="one of train, val, test") as error:
        curated_splits(manifest)
    setting = error.value.remedy.split("'")[1].replace("?", "train")
    config, _ = load_config("curate", ["--manifest", manifest, "--out", str(tmp_path / "out"), "--set", setting])
    assert [row.split for row in config.rows()] == ["train"]


def test_splits_are_mapped_to_known_ones_only(tmp_path: Path) -> None:
    manifest = write(tmp_path / "m.csv", "uri,split\na.mp4,eval\n")
    for settings in ({"split_names": {"eval": "evaluation"}}, {"default_split": "validation"}):
        with pytest.raises(UserError, match="'train', 'val' or 'test'"):
            curated_splits(manifest, **settings)
    rows = [ManifestRow(uri="a", split="test"), ManifestRow(uri="b", split="val")]
    swapped = list(named_splits("m", rows, {"test": "val", "val": "test"}))
    assert [row.split for row in swapped] == ["val", "test"]
    assert [row.split for row in rows] == ["test", "val"], "the given rows stay as they are"


def test_an_empty_split_of_pandas_is_the_default(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a.mp4"], "split": [float("nan")]}), tmp_path / "m.parquet")
    assert curated_splits(str(tmp_path / "m.parquet"), default_split="val") == ["val"]


def test_splits_of_other_forms_of_manifests_are_checked_too(tmp_path: Path) -> None:
    write(tmp_path / "videos/abcdefghij_.mp4", "x")
    vggsound = write(tmp_path / "vggsound.csv", "abcdefghij_,30,dog barking,validation\n")
    note = b'{"split": "dev"}'
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.mp4"))
        info = tarfile.TarInfo("0.json")
        info.size = len(note)
        tar.addfile(info, io.BytesIO(note))
    for manifest, name, settings in (
        (vggsound, "validation", {"media_root": str(tmp_path / "videos")}),
        (str(tmp_path / "a.tar"), "dev", {}),
    ):
        with pytest.raises(UserError, match=f"row 1 .*split is '{name}'"):
            curated_splits(manifest, **settings)
        assert curated_splits(manifest, **settings, split_names={name: "val"}) == ["val"]
