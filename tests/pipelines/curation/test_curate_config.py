"""Which settings of a curation may be combined, and which of them make its tables others."""

import re
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from aai.foundation.identity import FoundationSpec
from pipelines.curation.curate_config import CurateConfig, CutConfig, ScoreConfig

PAGE = Path(__file__).resolve().parents[3] / "docs/curation.md"


def config(**settings: Any) -> CurateConfig:
    return CurateConfig(manifest="m.csv", out="out", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cut": {"min_s": 11}}, "min_s is longer than window_s or max_s"),
        ({"cut": {"min_s": 5, "max_s": 4}}, "min_s is longer than window_s or max_s"),
        ({"filters": {"min_caption_similarity": 0.2}}, r"needs scores\.caption=true"),
        ({"val_share": 1.0}, "val_share"),
        ({"split_names": {"validation": "dev"}}, "split_names"),
        ({"source_pattern": "("}, "is no regular expression"),
        ({"source_pattern": "a.+_"}, "has 0 groups; put parentheses around what names the video"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        config(**settings)


def test_settings_at_the_edge_are_taken() -> None:
    assert CutConfig(min_s=10).min_s == CutConfig().window_s
    scored = config(filters={"min_caption_similarity": 0.2}, scores={"caption": True})
    assert (scored.scores.enabled, config().scores.enabled, ScoreConfig(bundle="b").enabled) == (True, False, True)


def test_codes_to_retry_are_a_list_or_text_with_commas() -> None:
    assert config(retry=" TIMEOUT, IO_ERROR ,").retry == config(retry=["TIMEOUT", "IO_ERROR"]).retry
    assert config(retry="").retry == ()


DECODE, JUDGE = {"decode"}, {"judge"}


@pytest.mark.parametrize(
    ("settings", "differ"),
    [
        ({"decode": {"timeout_s": 9, "decode_threads": 2, "max_memory_mb": 2048, "recycle_after": 7}}, set()),
        ({"rows_per_shard": 9, "run_dir": "x", "cluster": {"num_workers": 9}, "max_reject_ratio": 1}, set()),
        ({"scores": {"dtype": "bfloat16", "batch_size": 2}}, set()),  # nobody looks
        ({"decode": {"num_frames": 8}}, DECODE),
        ({"decode": {"policy": "keyframe"}}, DECODE),
        ({"filters": {"min_duration_s": 3}}, JUDGE),
        ({"duplicates": {"enabled": False}}, JUDGE),
        ({"duplicates": {"edited": {"enabled": False}}}, JUDGE),
        ({"split_by": "source"}, JUDGE),
        ({"source_pattern": "(.*)_"}, set()),  # clips, not videos, stay in one split
        ({"flag_only": True}, JUDGE),
    ],
)
def test_what_changes_a_digest(settings: dict[str, Any], differ: set[str]) -> None:
    first, other = config().digests(), config(**settings).digests()
    assert {name for name in first if first[name] != other[name]} == differ


def test_folders_from_before_files_of_any_size_go_on() -> None:
    def of(**decode: Any) -> object:
        return config(decode=decode).digests()["decode"]

    assert of() == of(max_bytes=512 * 2**20)
    assert of(max_bytes=2**20) not in (of(), of(max_bytes=2**21))


def test_scores_are_of_their_models_and_arithmetic_alone(spec: FoundationSpec) -> None:
    def of(**settings: Any) -> str:
        return ScoreConfig(caption=True, foundation=spec, **settings).content_digest()

    assert of() == of(batch_size=3) == of(false_accept_rate=0.2)
    assert len({of(), of(dtype="bfloat16"), ScoreConfig(foundation=spec).content_digest()}) == 3
    settings = {"caption": True, "foundation": spec.model_dump()}
    rates = [config(scores=settings | {"false_accept_rate": rate}).digests()["judge"] for rate in (0.1, 0.2)]
    assert rates[0] != rates[1]  # the scores stay, the verdict does not


def test_the_plan_counts_rows_and_shards(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("uri,split\n" + "".join(f"{i}.mp4,eval\n" for i in range(5)))
    settings = CurateConfig(
        manifest=str(manifest), out="out", rows_per_shard=2, split_names={"eval": "test"}, default_split="val"
    )
    assert settings.plan().inputs == {"manifest": f"{manifest} (5 rows, 3 shards)"}
    assert settings.plan().outputs == {"accepted": "out/accepted", "rejected": "out/rejected"}
    assert {row.split for row in settings.rows()} == {"test"}
    trained = settings.model_copy(update={"split_names": {"eval": "train"}, "val_share": 0.999999})
    assert {row.split for row in trained.rows()} == {"val"}
    told = "0.999999 (5 of train's 5 rows become the split val, by a hash of where their files lie)"
    assert (trained.plan().chosen["val_share"], settings.plan().chosen.get("val_share")) == (told, None)


def test_the_settings_of_the_documentation_are_taken() -> None:
    """Every YAML block of docs/curation.md, one line at a time where a block gives alternatives."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        alternatives = block.splitlines() if block.count("\ncut:") else [block]
        for text in alternatives:
            CurateConfig.parse({"manifest": "m.csv", "out": "out", **yaml.safe_load(text)}, source=text)


def test_own_signals_and_scores_make_other_tables_and_what_is_said_of_them_does_not() -> None:
    plain = config().digests()
    assert config(about={"name": "bells"}, manifest_columns=("license",)).digests() == plain
    signals = [config(signals={"x": {"table": "t.parquet", "min": limit}}).digests()["judge"] for limit in (1, 2)]
    assert len({plain["judge"], *signals}) == 3
    prompts = [config(scores={"prompts": {"dog": ("a dog", other)}}).digests()["judge"] for other in ("a cat", "x")]
    assert len({plain["judge"], *prompts}) == 3


def test_videos_are_drawn_for_the_validation_where_splits_are_by_source(tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text("uri\n" + "".join(f"video{i % 200:06d}_{i:03d}.mp4\n" for i in range(2000)))
    split = CurateConfig(manifest=str(manifest), out="out", val_share=0.2, split_by="source", source_pattern="(.*)_")
    splits = {}
    for row in split.rows():
        splits.setdefault(split.source_of(row), set()).add(row.split)
    assert all(len(of_video) == 1 for of_video in splits.values())
    assert 20 < sum(of_video == {"val"} for of_video in splits.values()) < 60
