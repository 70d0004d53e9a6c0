"""VGGSound and AudioSet CSVs with the folders of videos that people have."""

from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.manifests.table import read_manifest
from tests.pipelines.manifests.test_table import write

SEGMENTS = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=6
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"
-0RWZT-miFs, 420.000, 430.000, "/m/03v3yw"
abcdefghij_, 0.000, 7.500, "/m/09x0r"
missing____, 10.000, 20.000, "/m/unknown"
"""
NAMES = 'index,mid,display_name\n0,/m/09x0r,"Speech, adult"\n1,/t/dd00088,Gush\n2,/m/03v3yw,Keys jangling\n'


def test_vggsound(tmp_path: Path) -> None:
    manifest = write(
        tmp_path / "vggsound.csv",
        '-_gaZzFfzDQ,517,"church bell ringing, loud",test\nabcdefghij_,30,dog barking,train\nmissing____,7,cat,train\n',
    )
    for name in ("-_gaZzFfzDQ_517000_527000.mp4", "abcdefghij__000030.mp4", "readme.md"):
        write(tmp_path / "videos" / name, "x")
    rows = read_manifest(manifest, media_root=str(tmp_path / "videos"))
    assert [row.uri.rsplit("/", 1)[1] for row in rows] == [
        "-_gaZzFfzDQ_517000_527000.mp4", "abcdefghij__000030.mp4", "missing_____000007.mp4",
    ]  # fmt: skip
    assert rows[0].labels == ("church bell ringing, loud",)
    assert [row.split for row in rows] == ["test", "train", "train"]
    assert {row.start_s for row in rows} == {None}


def test_audioset(tmp_path: Path) -> None:
    for name in ("--PJHxphWEs_30.000_40.000.wav", "-0RWZT-miFs.mkv", "abcdefghij_.mp4", "abcdefghij_.json"):
        write(tmp_path / "videos" / name, "x")
    manifest = write(tmp_path / "balanced_train_segments.csv", SEGMENTS)
    names = write(tmp_path / "class_labels_indices.csv", NAMES)
    rows = read_manifest(manifest, str(tmp_path / "videos"), "val", names)
    assert [(row.uri.rsplit("/", 1)[1], row.start_s, row.end_s) for row in rows] == [
        ("--PJHxphWEs_30.000_40.000.wav", None, None),
        ("-0RWZT-miFs.mkv", 420.0, 430.0),
        ("abcdefghij_.mp4", 0.0, 7.5),
        ("missing_____000010.mp4", None, None),
    ]
    assert rows[0].labels == ("Speech, adult", "Gush")
    assert rows[0].caption == "Speech, adult, Gush"
    assert rows[3].labels == ("/m/unknown",), "a label without a name stays what it is"
    assert {row.split for row in rows} == {"val"}
    evaluation = write(tmp_path / "eval_segments.csv", SEGMENTS)
    rows = read_manifest(evaluation, str(tmp_path / "videos"))
    assert {row.split for row in rows} == {"test"}
    assert rows[0].caption == "/m/09x0r, /t/dd00088"


@pytest.mark.parametrize(
    ("file", "window"),
    [
        ("--PJHxphWEs_30.mp4", None),
        ("vggsound_--PJHxphWEs_000030.mp4", None),
        ("--PJHxphWEs_30_40.webm", None),
        ("deep/er/--PJHxphWEs_30000_40000.mp4", None),
        ("Y--PJHxphWEs_30.000_40.000.wav", None),
        ("Y--PJHxphWEs.wav", None),
        ("--PJHxphWEs-30.0-40.0.MP4", None),
        ("--PJHxphWEs.mp4", 30.0),
    ],
)
def test_names_of_one_segment(tmp_path: Path, file: str, window: float | None) -> None:
    write(tmp_path / "videos" / file, "x")
    write(tmp_path / "videos/--PJHxphWEs_99.mp4", "another segment of the same video")
    manifest = write(tmp_path / "a.csv", SEGMENTS)
    row = read_manifest(manifest, str(tmp_path / "videos"))[0]
    assert (row.uri, row.start_s) == (f"{tmp_path}/videos/{file}", window)


def test_video_goes_before_sound(tmp_path: Path) -> None:
    for suffix in ("wav", "mp4", "opus"):
        write(tmp_path / f"videos/--PJHxphWEs_30.{suffix}", "x")
    row = read_manifest(write(tmp_path / "a.csv", SEGMENTS), str(tmp_path / "videos"))[0]
    assert row.uri.endswith(".mp4")


def test_mistakes_are_named(tmp_path: Path) -> None:
    write(tmp_path / "videos/--PJHxphWEs_30.mp4", "x")
    (tmp_path / "empty").mkdir()
    good, videos = write(tmp_path / "good.csv", SEGMENTS), str(tmp_path / "videos")
    names = write(tmp_path / "names.csv", "a,b\n1,2\n")
    for arguments, message in (
        ((good, str(tmp_path / "empty")), "holds no files named"),
        ((good, videos, "train", names), "is not a CSV with the columns mid"),
        ((good, videos, "train", "none.csv"), "label_names=none.csv: does not exist"),
        ((write(tmp_path / "b.csv", SEGMENTS + "abcdefghij_,1,2\n"), videos), "is no AudioSet CSV"),
        ((write(tmp_path / "c.csv", "uri\na.mp4\n"), videos), "is neither a VGGSound nor an AudioSet CSV"),
        ((write(tmp_path / "d.csv", "# nothing\n"), videos), "names no clips"),
    ):
        with pytest.raises(UserError, match=message):
            read_manifest(*arguments)


@pytest.mark.parametrize(
    "text",
    [
        "-_gaZabcdef,30,dog barking,train\n",
        '# Segments csv\n# YTID, start_seconds\n-_gaZabcdef, 30.0, 40.0, "/m/0bt9lr"\n',
    ],
)
def test_a_list_of_ids_without_its_videos_names_the_missing_setting(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=r"is a VGGSound or AudioSet CSV.*; give media_root"):
        read_manifest(str(tmp_path / "list.csv"))
