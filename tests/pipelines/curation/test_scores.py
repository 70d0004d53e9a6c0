import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from aai import storage
from aai.bundle import BundleConfig, write_bundle
from aai.encoders.aligner import embed_files
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import FoundationSpec
from aai.foundation.tagger import SoundTagger
from pipelines.curate import CurateConfig
from pipelines.curate import run as curate
from pipelines.curation.curate_config import ScoreConfig
from pipelines.curation.layout import SCORED, shard_file
from pipelines.curation.measured import MEASURED_TABLE
from pipelines.curation.scores import ScoreWorker, check_sound
from pipelines.curation.similarity import CaptionedClip, ScoreShard, sample_embeddings
from pipelines.engine.shards import Result
from tests.clips import make_clip
from tests.taggers import write_ast_tagger
from tests.tiny import write_bundle_of, write_clip, write_clip_table, write_diffusion

ENCODER = AudioEncoderConfig(hidden_size=32, num_layers=1, num_heads=2, num_mel_bins=16, embed_dim=32)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], FoundationSpec]:
    """An output folder with one measured shard of eight clips, the third of them not decodable; and a tiny CLIP."""
    out = tmp_path_factory.mktemp("score")
    clips = storage.read_table(str(write_clip_table(out / "clips", 1, 8))).to_pylist()
    rows = [{**clip, "key": f"key{i}", "code": "UNREADABLE" if i == 2 else None} for i, clip in enumerate(clips)]
    table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE)
    storage.write_table(str(out / "_measured/shard-00000.parquet"), table)
    clip = write_clip(out / "clip")
    return out, rows, FoundationSpec(clip=str(clip), diffusion=str(write_diffusion(out / "diffusion", clip)))


def shard(rows: list[dict[str, Any]]) -> ScoreShard:
    clips = [CaptionedClip(row["key"], row["caption"] if i else "") for i, row in enumerate(rows)]
    return ScoreShard(name="shard-00000", rows=len(rows), digest="d", clips=clips)


def image_features(clip: FrozenClip, frames: list[bytes]) -> np.ndarray:
    mean = clip.images([Image.open(io.BytesIO(data)) for data in frames]).numpy().mean(0)
    return np.asarray(mean / np.linalg.norm(mean))


def test_scores_are_cosines_of_the_models_own_features(
    measured: tuple[Path, list[dict[str, Any]], FoundationSpec], tmp_path: Path
) -> None:
    out, rows, foundation = measured
    torch.manual_seed(0)
    encoder = AudioEncoder(ENCODER).eval()
    settings = BundleConfig(foundation=foundation, encoder=ENCODER.model_dump())
    write_bundle(tmp_path / "bundle", settings, encoder.state_dict(), None, {"data_fingerprint": "d"})
    config = ScoreConfig(caption=True, foundation=foundation, bundle=str(tmp_path / "bundle"))
    assert ScoreWorker(str(out), config.model_dump(mode="json"), 1, False)(shard(rows)) == Result(rows=8)
    scores = scored(out)
    assert list(scores) == [f"key{i}" for i in range(8) if i != 2]
    clip = FrozenClip(foundation)
    for i in (0, 5):
        image = image_features(clip, rows[i]["frames"])
        sound = embed_files(encoder, [rows[i]["audio"]])[0]
        assert scores[f"key{i}"]["av_similarity"] == pytest.approx(float(image @ sound), abs=1e-5)
    text = clip.texts([rows[5]["caption"]]).numpy()[0]
    assert scores["key5"]["caption_similarity"] == pytest.approx(float(text @ image), abs=1e-5)
    assert scores["key0"]["caption_similarity"] is None  # it has no caption


def scored(out: Path) -> dict[str, dict[str, Any]]:
    """What a worker wrote, by key."""
    rows = storage.read_table(shard_file(str(out), SCORED, "shard-00000")).to_pylist()
    return {row.pop("key"): row for row in rows}


def test_what_is_not_seen_has_no_scores_and_is_no_evidence_of_chance(
    measured: tuple[Path, list[dict[str, Any]], FoundationSpec], tmp_path: Path
) -> None:
    _, rows, foundation = measured
    bare = [{**row, "frames": []} if i in (1, 5) else row for i, row in enumerate(rows)]
    for name, given in (("whole", rows), ("bare", bare), ("all bare", [{**row, "frames": []} for row in rows])):
        table = pa.Table.from_pylist(given, schema=MEASURED_TABLE)
        storage.write_table(str(tmp_path / name / "_measured/shard-00000.parquet"), table)
    bundle = str(write_bundle_of(tmp_path / "bundle", foundation))
    settings = {"caption": True, "foundation": foundation, "bundle": bundle, "prompts": {"dark": ["night", "day"]}}
    config = ScoreConfig.parse(settings).model_dump(mode="json")
    found, nothing = {}, dict.fromkeys(("caption_similarity", "av_similarity", "dark"))
    for name in ("whole", "bare", "all bare"):
        ScoreWorker(str(tmp_path / name), config, 1, False)(shard(rows))
        rows_of = scored(tmp_path / name)
        found[name] = {key: {signal: row[signal] for signal in nothing} for key, row in rows_of.items()}
    assert {key for key, row in found["bare"].items() if row == nothing} == {"key1", "key5"}
    assert set(map(str, found["all bare"].values())) == {str(nothing)}
    for key in ("key0", "key3", "key7"):
        assert found["bare"][key]["av_similarity"] == pytest.approx(found["whole"][key]["av_similarity"], abs=1e-5)
    keys, audio, image = sample_embeddings(str(tmp_path / "bare"), ["shard-00000"], {"key0"})
    assert sorted(keys) == ["key3", "key4", "key6", "key7"]
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-2)
    assert len(audio) == 4


def test_captions_alone_need_no_bundle(measured: tuple[Path, list[dict[str, Any]], FoundationSpec]) -> None:
    out, rows, foundation = measured
    config = ScoreConfig(caption=True, foundation=foundation)
    ScoreWorker(str(out), config.model_dump(mode="json"), 1, False)(shard(rows))
    scores = scored(out)
    assert all(score["av_similarity"] is None for score in scores.values())
    assert all(-1 <= scores[f"key{i}"]["caption_similarity"] <= 1 for i in range(3, 8))


def test_a_bundle_that_hears_another_rate_is_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    bundle = str(write_bundle_of(tmp_path / "bundle", FoundationSpec()))
    check_sound(ScoreConfig(bundle=bundle), 16_000)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    out = tmp_path / "out"
    settings = {"decode": {"sample_rate_hz": 8_000}, "scores": {"bundle": bundle}}
    with pytest.raises(UserError, match=r"scores\.bundle=.*: hears 16000 Hz, but decode\.sample_rate_hz=8000"):
        curate(CurateConfig.parse({"manifest": str(tmp_path / "videos"), "out": str(out), **settings}))
    assert not (out / "_started.json").exists()


def test_a_caption_threshold_needs_scores() -> None:
    with pytest.raises(UserError, match=r"scores\.caption=true"):
        CurateConfig.parse({"manifest": "m", "out": "o", "filters": {"min_caption_similarity": 0.2}})


def test_tags_and_prompts_become_signals(
    measured: tuple[Path, list[dict[str, Any]], FoundationSpec], tmp_path: Path
) -> None:
    out, rows, foundation = measured
    tagger = str(write_ast_tagger(tmp_path))
    texts = ("a photo of a dog", "a sketch", "thing")
    tags = {"speech": ("Speech", "Conversation"), "rain": ("Rain",)}
    config = ScoreConfig(tagger=tagger, tags=tags, prompts={"has_dog": texts}, foundation=foundation)
    assert config.names == ["speech_share", "rain_share", "other_share", "has_dog"]
    ScoreWorker(str(out), config.model_dump(mode="json"), 1, False)(shard(rows))
    scores = scored(out)
    heard = SoundTagger(tagger, None, tags).shares([rows[5]["audio"]])[0]
    shares = [scores["key5"][f"{name}_share"] for name in ("speech", "rain", "other")]
    assert shares == pytest.approx(heard)
    clip = FrozenClip(foundation)
    cosines = clip.texts(texts).numpy() @ image_features(clip, rows[5]["frames"])
    scale = float(clip.model.logit_scale.exp())
    chances = np.exp(scale * cosines) / np.exp(scale * cosines).sum()
    assert scores["key5"]["has_dog"] == pytest.approx(float(chances[0]), rel=1e-4)
    assert scores["key5"]["caption_similarity"] is None
    # A tagger alone loads no CLIP, and there are no embeddings to keep.
    alone = ScoreConfig(tagger=tagger, tags=tags, foundation=FoundationSpec(clip="/none"))
    ScoreWorker(str(out), alone.model_dump(mode="json"), 1, False)(shard(rows))
    assert storage.read_table(str(out / "_scored")).column_names == [
        "key", "caption_similarity", "av_similarity", "speech_share", "rain_share", "other_share",
    ]  # fmt: skip


@pytest.mark.usefixtures("shards_here")
def test_a_share_of_tags_is_a_filter(tmp_path: Path) -> None:
    """From the settings to both tables and the card, by a small ASTForAudioClassification: windows of a clip whose
    first half is silence ("Rain") and whose second half is a tone."""
    storage.write_bytes(f"{tmp_path}/a.mp4", make_clip())
    (tmp_path / "m.csv").write_text("uri,start_s,end_s\na.mp4,0.5,1.5\na.mp4,1,2\n")
    tagger = str(write_ast_tagger(tmp_path / "tagger"))
    settings: dict[str, Any] = {"manifest": f"{tmp_path}/m.csv", "out": f"{tmp_path}/out", "max_reject_ratio": 1}
    scores = {"tagger": tagger, "tags": {"quiet": ["Rain"]}, "tag_window_s": 0.5}
    settings |= {"duplicates": {"enabled": False}, "scores": scores}
    first = curate(CurateConfig.parse(settings))
    assert (first["accepted"], list(first["signals"])) == (2, ["quiet_share", "other_share"])
    assert storage.read_table(f"{tmp_path}/out/accepted")["quiet_share"].to_pylist() == [0.5, 0]
    settings |= {"signals": {"quiet_share": {"max": 0.3}}, "rejudge": True}
    assert curate(CurateConfig.parse(settings))["by_code"] == {"HIGH_QUIET_SHARE": 1}
    (reject,) = storage.read_table(f"{tmp_path}/out/rejected").to_pylist()
    assert (reject["message"], reject["other_share"]) == (
        "quiet_share 0.5 is above signals.quiet_share.max 0.3", 0.5,
    )  # fmt: skip
    (mark,) = storage.read_json(f"{tmp_path}/out/card.json")["signals"]["quiet_share"]["thresholds"]
    assert (mark["setting"], mark["limit"]) == ("signals.quiet_share.max", 0.3)


@pytest.mark.parametrize(
    ("scores", "rule"),
    [
        ({"prompts": {"dog": ["a dog"]}}, r"prompts\.dog has 1 texts"),
        ({"prompts": {"width": ["a", "b"]}}, "width stands for something else"),
        ({"tags": {"other": ["Dog"]}}, "other is what no tag names"),
        ({"tagger": "t", "tags": {"a": ["Dog"]}, "prompts": {"a_share": ["a", "b"]}}, "one signal two meanings"),
    ],
)
def test_signals_that_cannot_be_told_are_refused(scores: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        CurateConfig.parse({"manifest": "m", "out": "o", "scores": scores})
