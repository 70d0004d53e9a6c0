"""`aai generate --manifest` on Ray: every sound has a row, a killed run goes on, pictures are those of single calls."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from aai.addons import AddOns, content
from aai.bundle import read_bundle, write_bundle
from aai.errors import UserError
from aai.media.decode import decode_audio
from aai.media.waveform import write_wav
from aai.painter import Painter
from aai.sampling import PaintRequest
from pipelines.__main__ import main
from pipelines.painting.batch import BatchPainter, SoundShard, Wanted, paint_manifest
from pipelines.painting.request import GenerateConfig
from tests import hostile
from tests.aai.test_addons import write_checker


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
    assert codes["absent"] == "MISSING_FILE"
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
    assert "names other sounds than <sound>" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def worker(sounds: Path, bundle: str, out: Path, **changes: Any) -> BatchPainter:
    config = settings(sounds, bundle, out, **changes)
    return BatchPainter(config.model_dump(mode="json"), read_bundle(bundle).sha)


def shard(*wanted: Wanted) -> SoundShard:
    return SoundShard(name="some", rows=len(wanted), sounds=list(wanted))


def test_a_worker_heeds_every_setting(sounds: Path, tiny_bundle: str, tmp_path: Path) -> None:
    """Against the painter itself: seeds, a sound in the negative prompt, a part of a file."""
    request = PaintRequest(steps=2, seed=5, num_images=2, negative_prompt="<sound>", prompt="a bell")
    paints = worker(sounds, tiny_bundle, tmp_path, request=request.model_dump())
    made = paints(shard(Wanted(row=0, uri=str(sounds / "s3.wav"), start_s=0.25, end_s=0.75)))
    assert (made.rows, made.pictures, made.errors) == (1, 2, {})
    rows = pq.read_table(tmp_path / "index" / "some.parquet").to_pylist()
    assert [row["seed"] for row in rows] == [5, 6]
    audio = decode_audio((sounds / "s3.wav").read_bytes(), 60, 2**20, 16_000)[4000:12_000]
    expected = Painter.load(tiny_bundle).generate(audio, request)
    for row, picture in zip(rows, expected, strict=True):
        found = np.asarray(Image.open(tmp_path / row["picture"]), np.int16)
        assert np.abs(found - np.asarray(picture, np.int16)).max() <= 1
        assert row["prompt"] == "a bell"
    with pytest.raises(UserError, match="the job was started for 0000"):
        BatchPainter(settings(sounds, tiny_bundle, tmp_path).model_dump(mode="json"), "0000")


def test_a_sound_in_two_parts_shares_a_batch_with_whole_ones(sounds: Path, tiny_bundle: str, tmp_path: Path) -> None:
    given = read_bundle(tiny_bundle)
    config = given.config.model_copy(update={"encoder": {**given.config.encoder, "apart_below": 1.1}})
    bundle = str(write_bundle(tmp_path / "bundle", config, given.aligner(), given.adapter(), {}).folder)
    tone = 0.3 * np.sin(np.arange(16_000) * 0.05).astype(np.float32)
    once = tone * (np.arange(16_000) < 8000)  # the silent half of it tells of nothing
    for name, audio in (("tone", tone), ("once", once)):
        write_wav(str(tmp_path / f"{name}.wav"), audio.astype(np.float32), 16_000)
    paints = worker(sounds, bundle, tmp_path / "out", request={"steps": 2})
    files = enumerate(str(tmp_path / f"{name}.wav") for name in ("tone", "once"))
    paints(shard(*[Wanted(row=i, uri=uri, start_s=None, end_s=None) for i, uri in files]))
    painter = Painter.load(bundle)
    for row in pq.read_table(tmp_path / "out" / "index" / "some.parquet").to_pylist():
        audio, parts = ((tone, 2), (once, 1))[row["row"]]
        (picture,) = painter.generate(audio, PaintRequest(steps=2, sound_parts=parts))
        found = np.asarray(Image.open(tmp_path / "out" / row["picture"]), np.int16)
        assert np.abs(found - np.asarray(picture, np.int16)).max() <= 1


def test_add_ons_reach_the_workers_and_belong_to_the_settings(sounds: Path, tiny_bundle: str, tmp_path: Path) -> None:
    write_checker(tmp_path / "checker", tmp_path / "checker")
    addons = {"safety_checker": str(tmp_path / "checker")}
    paints = worker(sounds, tiny_bundle, tmp_path / "out", addons=addons)
    paints(shard(Wanted(row=0, uri=str(sounds / "s3.wav"), start_s=None, end_s=None)))
    (picture,) = (tmp_path / "out" / "pictures").iterdir()
    assert not np.asarray(Image.open(picture)).any()
    before = content(AddOns(**addons))
    (tmp_path / "checker" / "config.json").write_text("{}")
    assert content(AddOns(**addons)) != before


def test_a_file_that_cannot_be_had_for_the_moment_ends_the_run(
    sounds: Path, tiny_bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paints = worker(sounds, tiny_bundle, tmp_path)

    def away(uri: str, max_bytes: int) -> bytes:
        raise ConnectionResetError("connection reset")

    monkeypatch.setattr("aai.storage.read_bytes", away)
    with pytest.raises(OSError, match="connection reset"):
        paints(shard(Wanted(row=0, uri=str(sounds / "s3.wav"), start_s=None, end_s=None)))
    assert not (tmp_path / "index").exists()


def test_odd_file_names_are_cut_and_replaced(sounds: Path, tiny_bundle: str, tmp_path: Path) -> None:
    names = [sounds / ("é" * 120 + ".wav"), sounds / "\udcff.wav"]
    for name in names:
        name.write_bytes((sounds / "s3.wav").read_bytes())
    paints = worker(sounds, tiny_bundle, tmp_path)
    made = paints(shard(*[Wanted(row=i, uri=str(name), start_s=None, end_s=None) for i, name in enumerate(names)]))
    for name in names:
        name.unlink()
    assert made.pictures == 2
    for row in pq.read_table(tmp_path / "index" / "some.parquet").to_pylist():
        assert (tmp_path / row["picture"]).exists()


@pytest.mark.parametrize("prompt", ["<sound*3>", "<sound> and <dog>", "a dog"])
def test_a_prompt_that_does_not_fit_leaves_the_folder_free(
    sounds: Path, tiny_bundle: str, tmp_path: Path, prompt: str
) -> None:
    with pytest.raises(UserError):
        paint_manifest(settings(sounds, tiny_bundle, tmp_path / "out", request={"prompt": prompt}))
    assert not (tmp_path / "out").exists()


def test_a_mistake_that_a_worker_finds_leaves_the_folder_free(sounds: Path, tiny_bundle: str, tmp_path: Path) -> None:
    long = {"prompt": "a photo of " + "thing " * 60 + "<sound>"}
    with pytest.raises(UserError, match="falls off"):
        paint_manifest(settings(sounds, tiny_bundle, tmp_path / "out", request=long))
    assert not (tmp_path / "out" / "_generate.json").exists()


def test_a_gpu_for_each_worker_is_used() -> None:
    assert GenerateConfig.parse({"cluster": {"gpus_per_worker": 1}}).torch_device == "cuda"
    assert GenerateConfig.parse({}).torch_device == "cpu"
    assert GenerateConfig.parse({"device": "cuda:1"}).torch_device == "cuda:1"
