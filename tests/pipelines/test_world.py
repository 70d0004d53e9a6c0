"""`aai world`: kept when it is there, refused over something else, made again when it was interrupted."""

import json
import logging
from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.__main__ import load_config
from pipelines.world import CONFIG, run


def _config(out: Path, **changes: int) -> CONFIG:
    settings = {"clips": 4, "images": 0, "seed": 1, "processes": 1, **changes}
    return CONFIG.parse({"out": str(out), **settings})


def _times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*.mp4")}


def test_a_finished_world_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = run(_config(tmp_path / "world"))
    assert "world: 4 clips (" in caplog.text
    before = _times(tmp_path)
    assert len(before) == 4
    assert run(_config(tmp_path / "world")) == first
    assert _times(tmp_path) == before
    assert "kept" in caplog.text


def test_an_unfinished_world_is_made_again(tmp_path: Path) -> None:
    run(_config(tmp_path))
    marker = tmp_path / "world.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "finished": False}))
    (tmp_path / "manifest.csv").unlink()
    run(_config(tmp_path))
    assert (tmp_path / "manifest.csv").is_file()
    assert json.loads(marker.read_text())["finished"]


def test_another_world_in_the_folder_is_an_error(tmp_path: Path) -> None:
    run(_config(tmp_path))
    with pytest.raises(UserError, match=r"out=.*another world.*; choose another folder or delete it"):
        run(_config(tmp_path, seed=2))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run(_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_pictures_alone(tmp_path: Path) -> None:
    assert run(_config(tmp_path, clips=0, images=3))["images"] == 3
    assert len(list((tmp_path / "captioned" / "images").glob("*.jpg"))) == 3
    assert not (tmp_path / "clips").exists()


def test_flags_stand_for_settings(tmp_path: Path) -> None:
    config, _ = load_config("world", ["--out", str(tmp_path), "--clips", "5", "--seed", "0", "--images", "2"])
    assert isinstance(config, CONFIG)
    assert (config.out, config.clips, config.seed, config.images) == (str(tmp_path), 5, 0, 2)


def test_default_config_goes_to_the_run_dir() -> None:
    config, _ = load_config("world", ["--set", "run_dir=elsewhere"])
    assert isinstance(config, CONFIG)
    assert config.out == "elsewhere/world"
    assert config.plan().outputs["clips"] == "2400"
