"""`aai generate --manifest` on Ray: every sound has a row, a killed run goes on, pictures are those of single calls."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai.bundle import read_bundle
from aai.errors import UserError
from aai.media.waveform import write_wav
from pipelines.__main__ import main
from pipelines.painting.batch import paint_manifest
from pipelines.painting.request import GenerateConfig
from tests import hostile


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 9 sounds, a file that is none, and a manifest that names another one and a part of a sound."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(9):
        tone = 0.3 * np.sin(np.arange(16_000) * (0.05 + 0.03 * i))
        write_wav(str(folder / f"s{i}.wav"), tone.astype(np.float32), 16_000)
    (folder / "broken.wav").write_bytes(next(iter(hostile.SOUNDS.values()))[0])
    with (folder / "manifest.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["uri", "start_s", "end_s"])
        table.writerows([[f"s{i}.wav", "", ""] for i in range(9)])
        table.writerows([["broken.wav", "", ""], ["absent.wav", "", ""], ["s0.wav", 0.5, ""], ["s0.wav", 3, 4]])
    return folder


def settings(sounds: Path, bundle: str, out: Path, **changes: Any) -> GenerateConfig:
    values = {
        "manifest": str(sounds / "manifest.csv"),
        "bundle": bundle,
        "out": str(out),
        "request": {"steps": 2, "seed": 5},
        "batch_size": 4,
        "cluster": {"num_workers": 1},
    }
    return GenerateConfig.parse(values | changes)


@pytest.fixture(scope="module")
def painted(sounds: Path, tiny_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("painted") / "out"
    result = paint_manifest(settings(sounds, tiny_bundle, out))
    assert (result["sounds"], result["pictures"]) == (13, 10)
    return out


def test_every_sound_has_its_row(painted: Path, sounds: Path, tiny_bundle: str) -> None:
    rows = pq.read_table(painted / "index.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(13))
    for row in rows:
        assert bool(row["picture"]) != bool(row["error"])
        assert row["bundle"] == read_bundle(tiny_bundle).sha
        if row["picture"]:
            assert row["seed"] == 5
            assert row["sound_sha256"] in Image.open(painted / row["picture"]).info["aai"]
    codes = {Path(row["uri"]).stem: row["error_code"] for row in rows if row["error"]}
    assert codes["absent"] == "UNREADABLE"
    assert rows[12]["error_code"] == "OUT_OF_RANGE"
    assert len({row["sound_sha256"] for row in rows if row["picture"]}) == 10  # the half is another sound


def test_pictures_of_a_batch_are_those_of_single_calls(
    painted: Path, sounds: Path, tiny_bundle: str, tmp_path: Path
) -> None:
    """Within 1 of 255: sums of another batch size round otherwise."""
    for i in (0, 3, 8):
        words = ["--bundle", tiny_bundle, "--out", str(tmp_path), "--seed", "5", "--set", "request.steps=2"]
        assert main(["generate", "--audio", str(sounds / f"s{i}.wav"), *words]) == 0
        single, batch = (
            np.asarray(Image.open(file), np.int16)
            for file in (tmp_path / f"generate_s{i}_seed5.png", painted / "pictures" / f"{i:07d}_s{i}_seed5.png")
        )
        assert np.abs(single - batch).max() <= 1


def test_a_run_that_was_killed_goes_on_where_it_was(
    painted: Path, sounds: Path, tiny_bundle: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = settings(sounds, tiny_bundle, painted)
    index, kept = (painted / "index.parquet").read_bytes(), painted / "index" / "sounds-0000000.parquet"
    caplog.set_level("INFO")
    paint_manifest(config)
    assert "up to date" in caplog.text
    (painted / "generate.json").unlink()
    (painted / "index.parquet").unlink()
    (painted / "index" / "sounds-0000004.parquet").unlink()
    picture, stamp = painted / "pictures" / "0000004_s4_seed5.png", kept.stat().st_mtime_ns
    before = picture.read_bytes()
    picture.unlink()
    paint_manifest(config)
    assert "3 of 4 shards are there already" in caplog.text
    assert picture.read_bytes() == before
    assert (painted / "index.parquet").read_bytes() == index
    assert kept.stat().st_mtime_ns == stamp


def test_a_folder_of_other_pictures_is_refused(painted: Path, sounds: Path, tiny_bundle: str) -> None:
    with pytest.raises(UserError, match="holds the generate of another input or size"):
        paint_manifest(settings(sounds, tiny_bundle, painted, request={"steps": 2, "seed": 6}))


def test_a_wrong_prompt_ends_it_before_a_picture(
    sounds: Path, tiny_bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--bundle", tiny_bundle, "--out", str(tmp_path / "out"), "--set", "cluster.num_workers=1"]
    assert main(["generate", "--manifest", str(sounds), *words, "--prompt", "a photo of <dog>"]) == 2
    assert "has no placeholder <sound>" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
