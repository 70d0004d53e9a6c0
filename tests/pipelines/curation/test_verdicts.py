"""What speaks against measured clips, and the two tables that come of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from aai.errors import UserError
from aai.schema import CLIP_TABLE, REJECT_TABLE
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.curate_config import CurateConfig
from pipelines.curation.layout import MEASURED, shard_file
from pipelines.curation.measured import MEASURED_TABLE, MeasuredTables
from pipelines.curation.spilled import SpilledTables
from pipelines.curation.table_slices import TableSlices
from pipelines.curation.verdicts import DIGEST, JudgeWorker, Verdicts, judge, judge_shards, read_measured
from pipelines.manifests.row import ManifestRow

CONFIG = CurateConfig(manifest="m.csv", out="out", duplicates={"enabled": False}).fitted()[0]
KEYS = ["good", "short", "torn"]
ROWS = {key: ManifestRow(uri=f"/{key}.mp4", caption=f"a {key} one", labels=("dog",), split="val") for key in KEYS}


def measured_row(key: str, **changes: Any) -> dict[str, Any]:
    """A clip that nothing speaks against."""
    good = {
        "key": key, "clip_id": f"id-{key}", "content_hash": f"hash-{key}", "duration_s": 2.0, "width": 64,
        "height": 64, "fps": 8.0, "source_sample_rate_hz": 16_000, "channels": 1, "av_gap_s": 0.0, "rms_db": -20.0,
        "silent_fraction": 0.0, "clipped_fraction": 0.0, "luma_mean": 100.0, "luma_std": 40.0, "motion": 5.0,
        "video_hash": bytes(32), "audio_hash": bytes(32), "audio": b"flac", "frames": [b"first", b"second"],
        "frame_pts_s": [0.5, 1.5],
    }  # fmt: skip
    return good | changes


@pytest.fixture
def out(tmp_path: Path) -> str:
    """One measured shard: a good clip, a short one, one that could not be decoded, and one nobody names any more."""
    torn = {"key": "torn", "stage": "decode", "code": "UNREADABLE", "message": "torn", "transient": True}
    rows = [measured_row("good"), measured_row("short", duration_s=0.1), torn, measured_row("gone")]
    table = pa.Table.from_pylist(rows, schema=MEASURED_TABLE)
    storage.write_table(shard_file(str(tmp_path), MEASURED, "shard-00000"), table)
    return str(tmp_path)


def told(out: str, keys: Iterable[str]) -> tuple[TableSlices, SpilledTables]:
    """What the driver reads of these clips of the shard."""
    tables = MeasuredTables(out, compares=True)
    return read_measured(tables, {"shard-00000": ClipKeys(keys)}, scored=False)[0], tables.prints


def judged(out: str, flag_only: bool, config: CurateConfig = CONFIG) -> tuple[list[Any], list[Any]]:
    """The rows of accepted/ and rejected/."""
    shards = {"shard-00000": ClipKeys(KEYS)}
    measured, prints = told(out, KEYS)
    found, null = judge(measured, prints, ROWS, config, out)
    assert null is None
    for shard in judge_shards(measured, shards, ROWS, found, flag_only):
        result = JudgeWorker(out, flag_only)(shard)
        assert result.rows == 3
        for folder, schema in (("accepted", CLIP_TABLE), ("rejected", REJECT_TABLE)):
            table = storage.read_table(shard_file(out, folder, shard.name))
            assert table.schema.equals(schema)
            assert table.schema.metadata[DIGEST] == shard.digest.encode()
    accepted, rejected = (storage.read_table(f"{out}/{name}").to_pylist() for name in ("accepted", "rejected"))
    assert result.rejected == len(rejected)
    return accepted, rejected


def test_only_wanted_clips_are_read_and_have_no_scores_where_nobody_looked(out: str) -> None:
    table = told(out, ["torn", "good"])[0]["shard-00000"]
    assert table["key"].to_pylist() == ["good", "torn"]
    assert table["av_similarity"].to_pylist() == [None, None]
    assert "audio" not in table.column_names


def test_each_clip_goes_to_one_table_as_its_manifest_row_describes_it(out: str) -> None:
    accepted, rejected = judged(out, flag_only=False)
    assert [(row["uri"], row["caption"], row["labels"], row["split"], row["flags"]) for row in accepted] == [
        ("/good.mp4", "a good one", ["dog"], "val", [])
    ]
    assert [(row["uri"], row["stage"], row["code"], row["transient"], row["thumbnail"]) for row in rejected] == [
        ("/short.mp4", "filter", "TOO_SHORT", False, b"first"), ("/torn.mp4", "decode", "UNREADABLE", True, None),
    ]  # fmt: skip


def test_flagged_clips_are_kept_and_undecodable_ones_are_not(out: str) -> None:
    accepted, rejected = judged(out, flag_only=True)
    assert [(row["uri"], row["flags"]) for row in accepted] == [("/good.mp4", []), ("/short.mp4", ["TOO_SHORT"])]
    assert [row["uri"] for row in rejected] == ["/torn.mp4"]


def test_a_clip_that_a_filter_refuses_takes_no_twin_with_it(out: str) -> None:
    """ "short" has the same hashes as "good": were it compared, one of the two would be a duplicate."""
    accepted, _ = judged(out, flag_only=False, config=CurateConfig(manifest="m.csv", out="out").fitted()[0])
    assert [row["uri"] for row in accepted] == ["/good.mp4"]
    measured = told(out, ["good", "gone"])
    config = CurateConfig(manifest="m.csv", out="out").fitted()[0]
    found, _ = judge(*measured, {**ROWS, "gone": ROWS["good"]}, config, out)
    again, _ = judge(*measured, {**ROWS, "gone": ROWS["good"]}, config, out)  # what it is given stays as it is
    assert again.reasons == found.reasons
    assert [reason[1] for reasons in found.reasons.values() for reason in reasons] == ["NEAR_DUPLICATE"]


@pytest.mark.parametrize("named", ["id-good", "hash-good", "/good.mp4"])
@pytest.mark.parametrize("flag_only", [False, True])
def test_an_excluded_clip_is_kept_in_no_form_and_no_twin_takes_its_place(
    named: str, flag_only: bool, out: str, tmp_path: Path
) -> None:
    (tmp_path / "exclude.txt").write_text(named)
    config = CurateConfig(manifest="m.csv", out="out", exclude=str(tmp_path / "exclude.txt")).fitted()[0]
    accepted, rejected = judged(out, flag_only=flag_only, config=config)
    assert accepted == []  # "short" looks and sounds the same: not even flagged it may stay
    good = next(row for row in rejected if row["uri"] == "/good.mp4")
    assert (good["stage"], good["code"], good["thumbnail"]) == ("exclude", "EXCLUDED", None)
    rows = {**ROWS, "gone": ROWS["good"].__class__(uri="/gone.mp4", split="test")}
    found, _ = judge(*told(out, ["good", "gone"]), rows, config, out)
    assert {key: [reason[:2] for reason in reasons] for key, reasons in found.reasons.items()} == {
        "good": [("exclude", "EXCLUDED")],
        "gone": [("exclude", "EXCLUDED")],  # the same hashes, and of a split that else wins
    }


def test_the_list_is_part_of_how_clips_are_judged(tmp_path: Path) -> None:
    config = CurateConfig(manifest="m.csv", out="out", exclude=str(tmp_path / "a")).fitted()[0]
    digests = [CONFIG.model_copy(update={"duplicates": config.duplicates}).digests()["judge"]]
    for text in ("c1\n", "c1\nc2\n", "c2\n\nc1\n"):
        (tmp_path / "a").write_text(text)
        digests.append(config.digests()["judge"])
    assert digests[2] == digests[3]
    assert len(set(digests)) == 3
    with pytest.raises(UserError, match="no such file"):
        config.model_copy(update={"exclude": "/none"}).digests()


def test_the_digest_is_of_all_that_the_tables_hold(out: str) -> None:
    shards = {"shard-00000": ClipKeys(KEYS)}
    measured, _ = told(out, KEYS)

    def of(rows: dict[str, ManifestRow] = ROWS, reasons: tuple[str, ...] = (), flag_only: bool = False) -> str:
        found = Verdicts()
        for code in reasons:
            found.add("good", "filter", code, "so")
        return next(judge_shards(measured, shards, rows, found, flag_only)).digest

    other = {**ROWS, "good": ManifestRow(uri="/good.mp4", caption="another", labels=("dog",), split="val")}
    assert of() == of(dict(ROWS))
    assert len({of(), of(other), of(reasons=("A",)), of(reasons=("A", "B")), of(flag_only=True)}) == 5


def test_a_video_stands_in_one_split_where_splits_are_by_source(out: str) -> None:
    """Of "good" and "gone", two parts of a video, the one that is held out stays; a clip that is refused holds none."""
    rows = {
        "good": ManifestRow(uri="/film_1.mp4", split="train"),
        "gone": ManifestRow(uri="/film_2.mp4", split="val"),
        "short": ManifestRow(uri="/film_3.mp4", split="test"),
    }
    measured = told(out, rows)
    by_source = {"split_by": "source", "source_pattern": "(.*)_"}
    for settings, expected in (({}, {}), (by_source, {"good": "CROSS_SPLIT_SOURCE"})):
        config = CurateConfig(manifest="m.csv", out="out", duplicates={"enabled": False}, **settings).fitted()[0]
        found, _ = judge(*measured, rows, config, out)
        del found.reasons["short"]
        assert {key: reason[1] for key, [reason] in found.reasons.items()} == expected
    assert "film, is in split val, too (/film_2.mp4)" in found.reasons["good"][0][2]


def test_clips_measured_before_there_were_prints_are_judged_by_their_hashes(
    out: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = shard_file(out, MEASURED, "shard-00000")
    storage.write_table(file, storage.read_table(file).drop_columns(["picture_print", "sound_print"]))
    config = CurateConfig(manifest="m.csv", out="out").fitted()[0]
    rows = dict.fromkeys(("good", "gone"), ROWS["good"])
    found, _ = judge(*told(out, rows), rows, config, out)
    assert [reason[1] for reasons in found.reasons.values() for reason in reasons] == ["NEAR_DUPLICATE"]
    assert "2 of 2 clips were measured by a version that made no prints" in caplog.text
