"""Sounds without a video, from the manifest to the text term of align: alone, or beside a still picture."""

import csv
import io
import json
import logging
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from aai import storage
from aai.encoders.aligner import embed
from aai.features import FeatureManifest, load_split
from aai.foundation.identity import FoundationSpec
from aai.media.waveform import write_wav
from aai.metrics import retrieval
from aai.toy.draw import draw_scene
from aai.toy.grammar import Scene, clip_caption, full_caption, random_scene
from aai.toy.synthesis import synthesise
from pipelines import curate, featurize
from pipelines.tables import webdataset
from tests.clips import make_clip, make_moving
from tests.e2e.plain_align import settings_of, trained
from tests.pipelines.conftest import run_here

SECONDS = 2.0


def sound(folder: Path, name: str, scene: Scene) -> str:
    write_wav(str(folder / f"{name}.wav"), synthesise(scene, SECONDS), 16_000)
    return f"{name}.wav"


def as_mp3(wav: Path, target: Path) -> None:
    """The same sound, less loud."""
    with av.open(str(wav)) as given, av.open(str(target), "w", format="mp3") as out:
        stream = out.add_stream("libmp3lame", rate=16_000, layout="mono")
        stream.bit_rate = 64_000
        samples = 0.7 * np.concatenate([frame.to_ndarray().reshape(-1) for frame in given.decode(audio=0)]) / 32_768
        frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = 16_000, Fraction(1, 16_000), 0
        resampler = av.AudioResampler(stream.format.name, "mono", 16_000, frame_size=576)
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))


def write_manifest(folder: Path, rows: list[dict[str, str]]) -> str:
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["uri", "caption", "image_uri", "split"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "manifest.csv")


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, list[dict[str, str]]]:
    """Two videos; four sounds with a text, four with a picture, two of which have both; and what is wrong besides."""
    rng, folder = np.random.default_rng(5), tmp_path / "world"
    folder.mkdir()
    (folder / "video.mp4").write_bytes(make_moving(num_frames=30, fps=15, size=(96, 64)))
    (folder / "other.mp4").write_bytes(make_moving(num_frames=30, fps=15, size=(128, 96)))
    rows = [{"uri": "video.mp4", "caption": "a moving thing"}]
    for number in range(4):
        scene = random_scene(rng)
        split = "val" if number == 3 else "train"
        rows.append({"uri": sound(folder, f"text{number}", scene), "caption": full_caption(scene), "split": split})
    for number in range(4):
        scene, suffix = random_scene(rng), ("jpg", "png")[number % 2]
        draw_scene(scene, 64).save(folder / f"still{number}.{suffix}")
        picture = f"still{number}.{suffix}"
        caption = full_caption(scene) if number < 2 else ""
        rows.append({"uri": sound(folder, f"seen{number}", scene), "caption": caption, "image_uri": picture})
    sound(folder, "bare", random_scene(rng))
    sound(folder, "lost", random_scene(rng))
    as_mp3(folder / "text0.wav", folder / "again.mp3")
    (folder / "torn.jpg").write_bytes((folder / "still0.jpg").read_bytes()[:200])
    (folder / "no pictures.mp4").write_bytes(make_clip(has_video=False))
    rows += [
        {"uri": "bare.wav"},
        {"uri": "lost.wav", "caption": "lost", "image_uri": "lost.jpg"},
        {"uri": "seen0.wav", "caption": "torn", "image_uri": "torn.jpg"},
        {"uri": "again.mp3", "caption": "the same sound", "split": "val"},
        {"uri": "no pictures.mp4", "caption": "a film of which only the sound came"},
    ]
    return folder, rows


def curated(manifest: str, out: Path, **settings: Any) -> dict[str, Any]:
    usual = {"manifest": manifest, "out": str(out), "rows_per_shard": 4, "max_reject_ratio": 1}
    return curate.run(curate.CurateConfig.parse({**usual, "decode": {"frame_size_px": 64}, **settings}))


def no_card(patch: pytest.MonkeyPatch) -> None:
    """Its plots take most of the time."""
    patch.setattr(curate, "_write_card", lambda *_: None)


def by_name(table: Path) -> dict[str, dict[str, Any]]:
    return {row["uri"].rsplit("/", 1)[1]: row for row in storage.read_table(str(table)).to_pylist()}


def test_sounds_with_texts_and_stills_go_all_the_way(
    world: tuple[Path, list[dict[str, str]]],
    spec: FoundationSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run_here(monkeypatch)
    caplog.set_level(logging.INFO)
    folder, rows = world
    manifest, out = write_manifest(folder, rows), tmp_path / "curated"
    scores = {"foundation": spec.model_dump(), "caption": True, "prompts": {"shown": ["a thing", "nothing"]}}
    settings: dict[str, Any] = {"scores": scores, "signals": {"shown": {"missing": "reject"}}}
    result = curated(manifest, out, **settings)
    accepted, rejected = by_name(out / "accepted"), by_name(out / "rejected")
    texts, seen = ["text1.wav", "text2.wav", "text3.wav", "again.mp3"], [f"seen{i}.wav" for i in range(4)]
    kinds = {"video.mp4": "frames", **dict.fromkeys(texts, "none"), **dict.fromkeys(seen, "still")}
    assert {name: row["picture"] for name, row in accepted.items()} == kinds
    assert result["pictures"] == {"frames": 1, "still": 4, "none": 4}
    assert "taken with a video 1, with a still picture 4, with sound and text alone 4" in caplog.text
    assert {name: row["code"] for name, row in rejected.items()} == {
        "bare.wav": "NO_VIDEO",
        "lost.wav": "MISSING_FILE",
        "seen0.wav": "UNREADABLE",
        "text0.wav": "CROSS_SPLIT_DUPLICATE",  # its copy is of val
        "no pictures.mp4": "NO_VIDEO",
    }
    assert rejected["bare.wav"]["message"].endswith("give the row of the manifest a caption, or a picture's URI")
    assert "its picture, /" in rejected["lost.wav"]["message"]
    assert rejected["seen0.wav"]["message"].startswith("its picture cannot be decoded")
    check_rows(accepted, rejected)
    assert curated(manifest, out, **settings) == result, "nothing to do"
    no_card(monkeypatch)
    flagged = curated(manifest, out, **settings, flag_only=True, rejudge=True)
    assert flagged["by_code"].keys() == {"NO_VIDEO", "MISSING_FILE", "UNREADABLE"}, "what teaches nothing is not kept"

    table = {"input": str(out / "accepted"), "out": str(tmp_path / "features"), "foundation": spec.model_dump()}
    featurize.run(featurize.FeaturizeConfig.parse(table))
    told = FeatureManifest.read(table["out"])
    assert told.without_picture == {"train": 3, "val": 2}
    assert told.num_frames == 4
    train = load_split(table["out"], "train", 16_000)
    by_kind = {name.rsplit("/", 1)[1]: bool(x) for name, x in zip(train["uri"], train["has_picture"], strict=True)}
    assert {name for name, shown in by_kind.items() if not shown} == {"text0.wav", "text1.wav", "text2.wav"}

    webdataset.export(str(out / "accepted"), str(tmp_path / "tars"), 2**30)
    again = by_name_of_tar(str(tmp_path / "tars"), tmp_path / "again")
    assert sorted(row["picture"] for row in again) == ["none"] * 6 + ["still"] * 4


def check_rows(accepted: dict[str, dict[str, Any]], rejected: dict[str, dict[str, Any]]) -> None:
    """What is seen is told of what shows something, and of nothing else."""
    for name, row in accepted.items():
        count = {"frames": 4, "still": 1, "none": 0}[row["picture"]]
        assert len(row["frames"]) == len(row["frame_pts_s"]) == count, name
        assert (row["motion"] is not None) == (row["av_gap_s"] is not None) == (row["picture"] == "frames"), name
        assert (row["luma_mean"] is not None) == (row["width"] is not None) == (count > 0), name
        assert (row["shown"] is not None) == (count > 0), name
        assert (row["caption_similarity"] is not None) == (count > 0 and row["caption"] != ""), name
        assert (row["image_uri"] is not None) == (row["picture"] == "still"), name
        assert len(row["audio"]) > 1000, name
    assert Image.open(io.BytesIO(accepted["seen1.wav"]["frames"][0])).size == (64, 64)
    assert accepted["seen1.wav"]["image_uri"].endswith("/still1.png")
    assert {row["picture"] for row in rejected.values()} == {"none", None}


def by_name_of_tar(tars: str, out: Path) -> list[dict[str, Any]]:
    """The clips of exported tars, curated again: of a video only the sound is in them."""
    curated(tars, out, duplicates={"enabled": False})
    return list(storage.read_table(str(out / "accepted")).to_pylist())


def test_tables_of_videos_tell_no_kinds_until_there_are_others(
    world: tuple[Path, list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_here(monkeypatch)
    no_card(monkeypatch)
    folder, rows = world
    videos = [{"uri": name, "caption": "a moving thing"} for name in ("video.mp4", "other.mp4")]
    out = tmp_path / "curated"
    first = curated(write_manifest(folder, videos), out, duplicates={"enabled": False}, rows_per_shard=1)
    assert "pictures" not in first
    assert not {"picture", "image_uri"} & set(storage.read_table(str(out / "accepted")).column_names)
    batch = storage.read_table(storage.list_files(str(out / "_plan"), ".parquet")[0])
    assert "image_uri" not in batch.column_names
    grown = curated(
        write_manifest(folder, [*videos, *rows[1:3], rows[5]]), out, duplicates={"enabled": False}, rows_per_shard=1
    )
    assert (grown["measured"], grown["accepted"]) == (3, 5), "what was measured stays"
    kinds = {name: row["picture"] for name, row in by_name(out / "accepted").items()}
    assert sorted(kinds.values()) == ["frames", "frames", "none", "none", "still"]
    cut = {"mode": "windows", "window_s": 1, "min_s": 0.5}
    parts = curated(write_manifest(folder, rows[1:2] + rows[5:6]), tmp_path / "cut", cut=cut)
    assert (parts["accepted"], parts["pictures"]) == (4, {"frames": 0, "still": 2, "none": 2})
    # Another picture beside the same sound is another clip.
    Image.new("RGB", (80, 80), "red").save(folder / "still0.jpg")
    changed = curated(
        write_manifest(folder, [*videos, *rows[1:3], rows[5]]),
        out,
        duplicates={"enabled": False},
        filters={"min_luma_std": 0},
        rejudge=True,
        rows_per_shard=1,
    )
    assert changed["measured"] == 1


# ---------------------------------------------------------------- what such rows teach

SEEN, TOLD, HELD_OUT = 100, 500, 200
"""Sounds with a picture and a caption, sounds with a caption alone, and held-out ones of these."""
RUNS = Path(__file__).resolve().parents[2] / "runs" / "accept-sounds"
"""Where the long test keeps its figures."""


def write_sounds(folder: Path) -> list[dict[str, str]]:
    """Rows of a manifest: what is seen, what is only told of, what is held out."""
    rng, rows = np.random.default_rng(11), []
    folder.mkdir(parents=True)
    for number in range(SEEN + TOLD + HELD_OUT):
        scene = replace(random_scene(rng), medium="photo")  # which nobody can hear
        row = {"uri": sound(folder, f"{number:04d}", scene), "caption": clip_caption(scene), "split": "train"}
        if number < SEEN:
            row["image_uri"] = f"{number:04d}.png"
            draw_scene(scene, 64).save(folder / row["image_uri"])
        rows.append(row | ({"split": "test"} if number >= SEEN + TOLD else {}))
    return rows


def featurized(folder: Path, rows: list[dict[str, str]], out: Path) -> str:
    folder.joinpath("manifest.csv").unlink(missing_ok=True)
    found = curated(write_manifest(folder, rows), out / "curated", rows_per_shard=64)
    assert found["accepted"] == len(rows), found["by_code"]
    table = {"input": str(out / "curated" / "accepted"), "out": str(out / "features")}
    featurize.run(featurize.FeaturizeConfig.parse(table))
    return table["out"]


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_j7_500_rows_of_sound_and_text_raise_retrieval_of_held_out_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the toy world's CLIP: with these rows, and the same training without them."""
    run_here(monkeypatch)
    no_card(monkeypatch)
    rows = write_sounds(tmp_path / "world")
    without = [*rows[:SEEN], *rows[SEEN + TOLD :]]
    found: dict[str, Any] = {}
    for name, given in (("without", without), ("with", rows)):
        features = featurized(tmp_path / "world", given, tmp_path / name)
        told = FeatureManifest.read(features)
        assert told.without_picture["test"] == HELD_OUT
        assert told.without_picture.get("train", 0) == (TOLD if name == "with" else 0)
        fit = {"fit__steps": 200, "fit__batch_size": 64, "fit__eval_every": 0, "loss__w_text": 1}
        encoder = trained(settings_of(tmp_path, features=features, **fit))
        test = load_split(features, "test", encoder.config.clip_samples, ("audio", "image_features", "text_features"))
        assert not test["has_picture"].any()
        texts = torch.nn.functional.normalize(test["text_features"].mean(1), dim=-1).numpy()
        captions = test["caption_id"].numpy()
        audio = embed(encoder, test["audio"]).numpy()
        found[name] = retrieval(audio, texts, captions, captions)
        shuffled = np.random.default_rng(0).permutation(len(audio))
        found[f"{name}, shuffled"] = {"r1": retrieval(audio[shuffled], texts, captions, captions, draws=0)["r1"]}
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / "retrieval.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))
    assert found["with"]["ci95"][0] > found["without"]["ci95"][1], "beyond what chance gives and takes"
