import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from aai import schema, storage
from aai.errors import UserError
from aai.features import FeatureManifest, load_split
from aai.foundation.clip import FrozenClip
from aai.foundation.loaders import load_diffusion
from aai.media.waveform import encode_flac, read_samples, read_sound
from aai.version import code_version
from pipelines import featurize
from pipelines.featurize import FeaturizeConfig, FeaturizeWorker
from tests.pipelines.conftest import run_shards_here
from tests.tiny import of_kinds, write_clip, write_clip_table, write_diffusion, write_sizes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("featurize")
    clip = write_clip(root / "clip")
    foundation = {"clip": str(clip), "diffusion": str(write_diffusion(root / "diffusion", clip))}
    return {"input": str(write_clip_table(root / "accepted", 2, 4)), "foundation": foundation}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards run in this process, one after the other; the engine has its own tests."""

    def in_process(name: str, shards: Any, cls: Any, args: Any, cluster: Any, done: Any, log_dir: Any) -> list[Any]:
        in_process.ran = [shard.name for shard in shards if not done(shard)]  # type: ignore[attr-defined]
        return run_shards_here(name, shards, cls, args, cluster, done)

    monkeypatch.setattr(featurize, "run_shards", in_process)


def ran() -> list[str]:
    return featurize.run_shards.ran  # type: ignore[attr-defined]


def test_the_table_holds_the_models_own_features(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "prompts": ["{caption}", "the sound of {caption}"]})
    figures = featurize.run(config)
    assert figures["rows"] == {"train": 6, "val": 2}
    manifest = FeatureManifest.read(str(tmp_path))
    assert (manifest.num_frames, manifest.image_dim, manifest.num_texts, manifest.text_dim) == (2, 32, 2, 32)
    assert manifest.latent_shape == (8, 8, 8)
    assert manifest.latent_frame == 1
    assert manifest.enlarged == {"clip": 0, "latents": 0}
    assert manifest.processor == "CLIPImageProcessorPil"
    clips, table = storage.read_table(config.input), storage.read_table(str(tmp_path))
    assert table.schema.equals(schema.feature_table(2, 32, 2, 32, 512))
    for name in ("clip_id", "caption", "split", "labels"):
        assert table[name].to_pylist() == clips[name].to_pylist()

    frames = [Image.open(io.BytesIO(data)) for data in clips["frames"][5].as_py()]
    clip = FrozenClip(config.foundation)
    images = np.array(table["image_features"][5].as_py()).reshape(2, 32)
    np.testing.assert_allclose(images, clip.images(frames), atol=1e-3)
    caption = clips["caption"][5].as_py()
    texts = np.array(table["text_features"][5].as_py()).reshape(2, 32)
    np.testing.assert_allclose(texts, clip.texts([caption, f"the sound of {caption}"]), atol=1e-3)

    vae = load_diffusion(config.foundation).vae
    pixels = torch.from_numpy(np.array(frames[1])).permute(2, 0, 1)[None] / 127.5 - 1
    expected = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    latents = np.array(table["latents"][5].as_py()).reshape(8, 8, 8)
    np.testing.assert_allclose(latents, expected[0].numpy(), atol=1e-2, rtol=1e-2)


def test_sounds_are_kept_as_asked(inputs: dict[str, Any], tmp_path: Path) -> None:
    clips = storage.read_table(inputs["input"], ["clip_id", "audio"]).sort_by("clip_id")["audio"].to_pylist()
    for sound, head in (("wav", b"RIFF"), ("flac", b"fLaC")):
        config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path / sound), "sound": sound})
        featurize.run(config)
        kept = storage.read_table(config.out, ["clip_id", "audio"]).sort_by("clip_id")["audio"].to_pylist()
        assert {data[:4] for data in kept} == {head}
        for ours, theirs in zip(kept, clips, strict=True):
            assert np.array_equal(read_samples(ours), read_samples(theirs))


def test_a_second_run_does_nothing_and_a_lost_shard_alone_is_made_again(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path)})
    first = featurize.run(config)
    before = {file: (tmp_path / file).read_bytes() for file in ("shard-00000.parquet", "shard-00001.parquet")}
    assert ran() == list(before)
    featurize.run_shards.ran = ["none"]  # type: ignore[attr-defined]
    assert featurize.run(config) == first
    assert ran() == ["none"]
    (tmp_path / "shard-00001.parquet").unlink()
    (tmp_path / "manifest.json").unlink()
    again = featurize.run(config)
    assert ran() == ["shard-00001.parquet"]
    assert again["fingerprint"] == first["fingerprint"]
    assert {file: (tmp_path / file).read_bytes() for file in before} == before


def test_another_commit_keeps_what_is_there(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path)})
    first = featurize.run(config)
    assert FeatureManifest.read(str(tmp_path)).written_by == code_version()
    assert storage.written_by(str(tmp_path / "shard-00000.parquet")) == code_version()
    for module in ("aai.storage", "pipelines.featurize"):
        monkeypatch.setattr(f"{module}.code_version", lambda: "9.9 (commit fffffff)")
    featurize.run_shards.ran = ["none"]  # type: ignore[attr-defined]
    assert featurize.run(config) == first
    assert ran() == ["none"]
    (tmp_path / "shard-00001.parquet").unlink()
    (tmp_path / "manifest.json").unlink()
    assert featurize.run(config)["fingerprint"] == first["fingerprint"]
    assert ran() == ["shard-00001.parquet"]
    manifest = storage.read_json(str(tmp_path / "manifest.json"))
    assert manifest.pop("written_by") == "9.9 (commit fffffff)"
    storage.write_json(str(tmp_path / "manifest.json"), manifest)  # as the code before wrote it
    assert FeatureManifest.read(str(tmp_path)).written_by == "unknown"


def test_changed_clips_are_made_again_and_lost_ones_go(inputs: dict[str, Any], tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    write_clip_table(clips, 2, 4)
    config = FeaturizeConfig.parse({**inputs, "input": str(clips), "out": str(tmp_path / "out")})
    first = featurize.run(config)
    table = pq.read_table(clips / "shard-00000.parquet")
    storage.write_table(str(clips / "shard-00000.parquet"), table.slice(0, 3))
    (clips / "shard-00001.parquet").unlink()
    second = featurize.run(config)
    assert ran() == ["shard-00000.parquet"]
    assert second["rows"] == {"train": 3}
    assert second["fingerprint"] != first["fingerprint"]
    assert [f.name for f in (tmp_path / "out").glob("*.parquet")] == ["shard-00000.parquet"]


def test_other_settings_do_not_mix_into_a_table(inputs: dict[str, Any], tmp_path: Path) -> None:
    featurize.run(FeaturizeConfig.parse({**inputs, "out": str(tmp_path)}))
    with pytest.raises(UserError, match="other settings"):
        featurize.run(FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "prompts": ["hear {caption}"]}))
    faster = FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "batch_size": 3})
    assert faster.content_digest() == FeaturizeConfig.parse({**inputs, "out": "elsewhere"}).content_digest()


def test_auto_is_decided_once_for_a_table(
    inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aai.precision.native_bfloat16", lambda device: True)
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "dtype": "auto"})
    first = featurize.run(config)
    assert FeatureManifest.read(config.out).dtype == "bfloat16"
    monkeypatch.setattr("aai.precision.native_bfloat16", lambda device: False)
    (tmp_path / "shard-00001.parquet").unlink()
    (tmp_path / "manifest.json").unlink()
    assert featurize.run(config)["fingerprint"] == first["fingerprint"]  # the other shard is there: as it was made
    assert ran() == ["shard-00001.parquet"]
    assert FeatureManifest.read(config.out).dtype == "bfloat16"
    elsewhere = config.model_copy(update={"out": str(tmp_path / "other")})
    assert featurize.run(elsewhere)["fingerprint"] != first["fingerprint"]
    assert FeatureManifest.read(elsewhere.out).dtype == "float32"


def test_mistakes_are_user_errors(inputs: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no clips"):
        featurize.run(FeaturizeConfig.parse({**inputs, "input": str(tmp_path / "none"), "out": str(tmp_path)}))
    curated = Path(inputs["input"]).parent
    with pytest.raises(UserError, match=f"curate's whole output, rejected clips too; give {curated}/accepted$"):
        featurize.run(FeaturizeConfig.parse({**inputs, "input": str(curated), "out": str(tmp_path)}))
    with pytest.raises(UserError, match="does not contain"):
        FeaturizeConfig.parse({**inputs, "out": "x", "prompts": ["sound"]})
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "latent_frame": 2})
    with pytest.raises(UserError, match="clips have 2 pictures"):
        featurize.run(config)


def test_pictures_are_enlarged_only_where_that_is_allowed(inputs: dict[str, Any], tmp_path: Path) -> None:
    large = write_sizes(tmp_path / "large").model_dump()  # no weights: refused before any model is loaded
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"shard-00000.*a source of 64 px; foundation\.clip takes 224 px"):
        featurize.run(FeaturizeConfig.parse({**inputs, "foundation": large, "out": str(out)}))
    # One small clip in the second file is a worker's to find.
    clips = write_clip_table(tmp_path / "clips", 2, 4)
    rows = pq.read_table(clips / "shard-00001.parquet").to_pylist()
    small = io.BytesIO()
    Image.new("RGB", (60, 40)).save(small, "JPEG")
    rows[2] |= {"frames": [small.getvalue()] * 2, "width": 96, "height": 64}
    storage.write_table(str(clips / "shard-00001.parquet"), pa.Table.from_pylist(rows, schema=schema.CLIP_TABLE))
    settings = {**inputs, "input": str(clips), "out": str(out)}
    with pytest.raises(UserError, match=r"shard-00001.*keeps pictures of 40 px of a source of 64 px.*allow_upsampling"):
        featurize.run(FeaturizeConfig.parse(settings))
    allowed = featurize.run(FeaturizeConfig.parse({**settings, "allow_upsampling": True}))
    assert FeatureManifest.read(str(out)).enlarged == {"clip": 1, "latents": 1}
    assert featurize.run(FeaturizeConfig.parse(settings)) == allowed  # finished: the setting changes no content


def test_a_worker_keeps_to_its_cpus(inputs: dict[str, Any], tmp_path: Path) -> None:
    threads, had_ray = torch.get_num_threads(), ray.is_initialized()  # files tested before this one may have left it
    try:
        config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path), "cluster": {"cpus_per_worker": 1}})
        FeaturizeWorker(config.model_dump(mode="json"), "d")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert ray.is_initialized() == had_ray


def at_rates(clips: Path, rates_hz: Sequence[int]) -> None:
    """Encodes each clip's samples anew, as those of another rate; the rates come in turn."""
    for file in sorted(clips.glob("*.parquet")):
        table = pq.read_table(file)
        sounds = [read_sound(data) for data in table["audio"].to_pylist()]
        audio = [encode_flac(sound, rates_hz[i % len(rates_hz)]) for i, sound in enumerate(sounds)]
        place = table.schema.get_field_index("audio")
        pq.write_table(table.set_column(place, table.schema.field(place), [audio]), file)


def test_the_table_has_the_rate_of_its_clips(inputs: dict[str, Any], tmp_path: Path) -> None:
    clips = write_clip_table(tmp_path / "clips", 2, 4)
    at_rates(clips, [8_000])
    config = FeaturizeConfig.parse({**inputs, "input": str(clips), "out": str(tmp_path / "out")})
    featurize.run(config)
    assert FeatureManifest.read(config.out).sample_rate_hz == 8_000
    assert load_split(config.out, "train", 8_000, ("audio",))["audio"].shape == (6, 8_000)


def test_clips_of_different_rates_make_no_table(inputs: dict[str, Any], tmp_path: Path) -> None:
    clips = write_clip_table(tmp_path / "clips", 2, 4)
    config = FeaturizeConfig.parse({**inputs, "input": str(clips), "out": str(tmp_path / "out")})
    first = pq.read_table(clips / "shard-00000.parquet")
    at_rates(clips, [8_000])
    storage.write_table(str(clips / "shard-00000.parquet"), first)
    with pytest.raises(UserError, match="clips of its files differ in sample_rate_hz"):
        featurize.run(config)
    at_rates(clips, [8_000, 16_000])
    with pytest.raises(UserError, match=r"sound at \[8000, 16000\] Hz, not at one rate; .* decode\.sample_rate_hz"):
        featurize.run(config)


def test_a_table_begun_before_rates_were_read_is_begun_anew(inputs: dict[str, Any], tmp_path: Path) -> None:
    config = FeaturizeConfig.parse({**inputs, "out": str(tmp_path)})
    featurize.run(config)
    file = tmp_path / "shard-00000.parquet"
    table = pq.read_table(file)
    shapes = json.loads(table.schema.metadata[b"aai.shapes"])
    del shapes["sample_rate_hz"]
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"aai.shapes": json.dumps(shapes)}), file)
    (tmp_path / "manifest.json").unlink()
    featurize.run(config)
    assert ran() == [file.name]


def test_a_still_stands_for_all_pictures_and_a_clip_without_one_says_so(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Beside the same clips as videos: what a picture is encoded to does not depend on the clip's kind."""
    whole = FeaturizeConfig.parse({**inputs, "out": str(tmp_path / "whole")})
    featurize.run(whole)
    kinds = (schema.VIDEO_PICTURES, schema.STILL_PICTURE, schema.VIDEO_PICTURES, schema.NO_PICTURE)
    clips = of_kinds(write_clip_table(tmp_path / "clips", 2, 4), kinds)
    config = FeaturizeConfig.parse({**inputs, "input": clips, "out": str(tmp_path / "mixed")})
    featurize.run(config)
    manifest = FeatureManifest.read(config.out)
    assert (manifest.rows, manifest.without_picture) == ({"train": 6, "val": 2}, {"val": 2})
    assert (manifest.clips("val", pictures_only=True), manifest.clips("train", pictures_only=True)) == (0, 6)
    assert FeatureManifest.read(whole.out).without_picture == {}
    found, usual = storage.read_table(config.out), storage.read_table(whole.out)
    assert found["picture"].to_pylist() == list(kinds) * 2
    images, expected = (np.array(t["image_features"].to_pylist()).reshape(8, 2, 32) for t in (found, usual))
    latents, of_frame = (np.array(t["latents"].to_pylist()) for t in (found, usual))
    for row, kind in enumerate(kinds * 2):
        if kind == schema.NO_PICTURE:
            assert not images[row].any()
            assert not latents[row].any()
            continue
        np.testing.assert_allclose(images[row], expected[row][[0, 0] if kind == schema.STILL_PICTURE else [0, 1]])
        assert (kind == schema.STILL_PICTURE) != np.allclose(latents[row], of_frame[row])  # of the middle one of two
    split = load_split(config.out, "val", 8_000)
    assert split["has_picture"].tolist() == [False, False]
    assert load_split(config.out, "val", 8_000, pictures_only=True)["clip_id"] == []
    assert len(load_split(config.out, "train", 8_000, pictures_only=True)["clip_id"]) == 6


def test_a_table_of_sounds_and_texts_alone_has_the_shapes_of_the_models(inputs: dict[str, Any], tmp_path: Path) -> None:
    clips = of_kinds(write_clip_table(tmp_path / "clips", 1, 4), [schema.NO_PICTURE])
    config = FeaturizeConfig.parse({**inputs, "input": clips, "out": str(tmp_path / "out")})
    featurize.run(config)
    manifest = FeatureManifest.read(config.out)
    assert (manifest.num_frames, manifest.latent_shape) == (1, (8, 8, 8))
    assert manifest.without_picture == manifest.rows == {"train": 3, "val": 1}
    assert ran() == ["shard-00000.parquet"]
    write_clip_table(tmp_path / "clips", 1, 4)  # the same clips, and now they are all of videos
    featurize.run(config)
    assert ran() == ["shard-00000.parquet"]
    assert "picture" not in storage.read_table(config.out).column_names
