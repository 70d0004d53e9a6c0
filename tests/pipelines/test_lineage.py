"""`aai lineage` as a user asks it."""

import csv
from pathlib import Path

import pytest
from PIL import Image

from aai.png import encode_png
from pipelines.__main__ import main
from tests.pipelines.tracing.archive import Archive


def ask(where: Archive, *words: str) -> int:
    return main(["lineage", "--set", f"run_dir={where.folder}", *words])


def test_both_ways(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(archive, "--clip", "c30") == 0
    told = capsys.readouterr().out
    assert "version    1 of aai-demo (champion)" in told
    assert "version    2 of aai-demo  bundle second" in told
    assert ask(archive, "--version", "2") == 0
    assert "clips  20 of train, 10 of val" in capsys.readouterr().out


def test_all_clips_of_a_picture(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(encode_png(Image.new("RGB", (8, 8)), {"verb": "generate", "bundle": "both", "seed": 3}))
    assert ask(archive, "--image", str(picture), "--out", f"{tmp_path}/clips.csv") == 0
    assert "seed 3" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "clips.csv").open()))
    assert {row["clip_id"] for row in rows} == {f"c{n}" for n in range(60)}
    assert rows[0].keys() == {"clip_id", "content_hash", "uri", "split"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "nothing to follow"),
        (["--clip", "nobody"], "none of the tables"),
        (["--version", "9"], "has the versions 1 to 3"),
        (["--version", "1", "--clip", "c1"], "exclude each other"),
        (["--image", "none.png"], "no such file"),
        (["--version", "1", "--set", "tracking.model_name=other"], "is not registered"),
    ],
)
def test_what_is_not_known_is_told(
    words: list[str],
    told: str,
    archive: Archive,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ask(archive, *words) == 2
    assert told in capsys.readouterr().err


def test_a_picture_that_says_nothing(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(Image.new("RGB", (8, 8))))
    assert ask(archive, "--image", f"{tmp_path}/a.png") == 2
    assert "does not say" in capsys.readouterr().err
    assert main(["lineage", "--dry-run", "--image", "a.png", "--out", "b.csv"]) == 0
