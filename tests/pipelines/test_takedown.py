"""`aai takedown`: all that has a clip, and a list that curate takes."""

import json
from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.curate import CurateConfig
from tests.pipelines.tracing.archive import Archive


def test_lists_what_has_the_clips(archive: Archive, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gone.txt").write_text("c1\n4.mp4\nnobody\n")
    words = ["takedown", "--clips", f"{tmp_path}/gone.txt", "--set", f"run_dir={tmp_path}"]
    assert main([*words, "--dry-run"]) == 0
    assert main(words) == 0
    assert "nowhere    nobody" in capsys.readouterr().out
    told = json.loads((tmp_path / "takedown" / "takedown.json").read_text())
    assert [(table["kind"], table["clips"]) for table in told["tables"]] == [
        ("features", {"train": 2}), ("accepted", {"train": 2}), ("measured", {"": 2}), ("embeddings", {"": 2}),
    ]  # fmt: skip
    assert {run["bundle"] for run in told["runs"]} == {"both", ""}
    assert told["versions"] == [{"model": "aai-demo", "version": 1, "aliases": ["champion"]}]
    assert told["nowhere"] == ["nobody"]
    config = CurateConfig(manifest="m.csv", out="o", exclude=told["exclude"])
    assert config.excluded() == {"c1", "4.mp4", "nobody", "h1", "h4"}  # other copies of the files too


def test_a_list_is_needed(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["takedown", "--set", f"run_dir={archive.folder}"]) == 2
    assert "give --clips FILE" in capsys.readouterr().err
    (archive.folder / "gone.txt").write_text("c1\n")
    elsewhere = ["--set", f"run_dir={archive.folder}/elsewhere"]
    assert main(["takedown", "--clips", f"{archive.folder}/gone.txt", *elsewhere]) == 2
    assert "no such file; give the store" in capsys.readouterr().err
