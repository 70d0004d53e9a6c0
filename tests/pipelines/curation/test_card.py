"""The data card of really curated clips, and of hand-made tables with everything that can stand in them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from aai.media.filters import RULES, FilterConfig, broken_rules
from aai.schema import CLIP_TABLE, REJECT_TABLE, SIGNALS, SIMILARITIES
from aai.toy.writer import write_world
from pipelines.curate import CurateConfig
from pipelines.curate import run as curate
from pipelines.curation import card
from pipelines.registry import tracking
from pipelines.settings import TrackingConfig
from tests.pipelines.conftest import run_here
from tests.tiny import write_clip_table

HOSTILE = "<script>alert('x')</script>"
FILTERS = FilterConfig().model_dump()


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """100 toy clips with every kind of defect, curated."""
    root = tmp_path_factory.mktemp("card")
    write_world(str(root / "world"), 100, seed=3, num_workers=1, progress=False)
    out = root / "curated"
    settings = {"manifest": str(root / "world/manifest.csv"), "out": str(out), "rows_per_shard": 24}
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        return out, curate(CurateConfig.parse(settings))


@pytest.fixture(scope="module")
def made(curated: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    """Its card."""
    return card.write_card(str(curated[0]), FILTERS, curated[1])


def test_the_funnel_adds_up(curated: tuple[Path, dict[str, Any]], made: dict[str, Any]) -> None:
    out, result = curated
    funnel = made["funnel"]
    assert [funnel[key] for key in ("rows_in", "accepted", "rejected")] == [
        result[key] for key in ("rows_in", "accepted", "rejected")
    ]
    assert funnel["hours"] == pytest.approx(result["hours"], abs=1e-4)
    codes = {code["code"]: code["rows"] for stage in funnel["stages"] for code in stage["codes"]}
    assert codes == result["by_code"]
    assert [stage["stage"] for stage in funnel["stages"]] == ["decode", "filter", "duplicate"]
    assert funnel["stages"][-1]["left_rows"] == result["accepted"]
    assert storage.read_json(str(out / "card.json")) == json.loads(json.dumps(made))


def test_a_split_of_our_own_making_is_told(curated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(curated[0], tmp_path / "out")
    chosen = {"val_share": {"value": 0.02, "why": "3 of train's 150 rows become val"}}
    for result, told in ((curated[1], False), (curated[1] | {"chosen": curated[1]["chosen"] | chosen}, True)):
        made = card.write_card(str(tmp_path / "out"), FILTERS, result)
        page = " ".join((tmp_path / "out/card.html").read_text().split())
        assert ("val_share 0.02: 3 of train&#39;s 150 rows become val." in page) == told
        assert made["val_share"] == (chosen["val_share"] if told else None)


def test_moving_a_threshold_is_told_as_judging_anew_would_have_it(
    curated: tuple[Path, dict[str, Any]], made: dict[str, Any]
) -> None:
    out, _ = curated
    accepted = storage.read_table(str(out / "accepted")).to_pylist()
    rejected = [row for row in storage.read_table(str(out / "rejected")).to_pylist() if row["stage"] == "filter"]
    assert list(made["thresholds"]) == list(dict.fromkeys(rule[2] for rule in RULES if FILTERS[rule[2]] is not None))
    seen = 0
    for setting, move in made["thresholds"].items():
        assert move["limit"] == FILTERS[setting]
        assert [t["limit"] for t in move["tried"]] == sorted({t["limit"] for t in move["tried"]})
        for tried in move["tried"]:
            cfg = FilterConfig.parse({setting: tried["limit"]})
            assert tried["lost"] == sum(bool(broken_rules(row, cfg)) for row in accepted)
            assert tried["gained"] == sum(not broken_rules(row, cfg) for row in rejected)
            seen += tried["lost"] + tried["gained"]
    low, high = made["thresholds"]["min_duration_s"]["quiet"]
    short = [row["duration_s"] for row in rejected if row["code"] == "TOO_SHORT"]
    assert low == pytest.approx(max(short), rel=1e-3)
    assert high == pytest.approx(min(row["duration_s"] for row in accepted), rel=1e-3)


def test_histograms_hold_every_row_and_threshold(made: dict[str, Any], curated: tuple[Path, dict[str, Any]]) -> None:
    measured = made["funnel"]["rows_in"] - sum(c["rows"] for c in made["funnel"]["stages"][0]["codes"])
    for name, signal in made["signals"].items():
        assert sum(sum(signal[key]) for key in ("kept", "this", "other")) == measured, name
        assert sum(signal["kept"]) == curated[1]["accepted"]
        assert len(signal["edges"]) == len(signal["kept"]) + 1 < 130
        for mark in signal["thresholds"]:
            if signal["edges"][0] <= mark["limit"] <= signal["edges"][-1]:
                assert min(abs(edge - mark["limit"]) for edge in signal["edges"]) < 1e-4 * max(1, abs(mark["limit"]))
    assert "caption_similarity" not in made["signals"]


def test_samples_are_the_nearest_and_duplicates_have_their_kept_clip(made: dict[str, Any]) -> None:
    for sheet in made["borderline"]:
        for part, sign in (("dropped", -sheet["sign"]), ("kept", sheet["sign"])):
            margins = [sign * (clip["value"] - sheet["limit"]) for clip in sheet[part]]
            assert margins == sorted(margins)
            assert all(margin >= 0 for margin in margins)
        assert all(sheet["signal"] in clip["message"] or sheet["code"] == "SILENT" for clip in sheet["dropped"])
    codes = {group["code"] for group in made["duplicate_groups"]}
    assert codes == {"EXACT_DUPLICATE", "NEAR_DUPLICATE", "CROSS_SPLIT_DUPLICATE"}
    for group in made["duplicate_groups"]:
        for dropped in group["dropped"]:
            assert f"same clip as {group['kept']['uri']} " in dropped["message"]
            across = dropped["split"] != group["kept"]["split"]
            assert across == (group["code"] == "CROSS_SPLIT_DUPLICATE")
    assert {"UNREADABLE", "EMPTY_FILE"} <= set(made["examples"])


def test_labels_are_counted_by_split(made: dict[str, Any], curated: tuple[Path, dict[str, Any]]) -> None:
    accepted = storage.read_table(str(curated[0] / "accepted"), ["labels", "split"]).to_pylist()
    top = made["labels"]["rows"][0]
    for split in made["labels"]["splits"]:
        of_split = [row["labels"] for row in accepted if row["split"] == split]
        assert top["splits"].get(split, 0) == sum(top["label"] in labels for labels in of_split)
        assert made["labels"]["splits"][split]["accepted"] == len(of_split)


def test_the_page_needs_nothing_else(made: dict[str, Any], curated: tuple[Path, dict[str, Any]]) -> None:
    page = (curated[0] / "card.html").read_text()
    assert "<script" not in page
    named = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {ref for ref in named if not ref.startswith(("data:", "#"))} == {"croissant.json"}  # to read, not to see
    assert not re.search(r"@import|url\((?!#)", page)
    anchors = re.findall(r'<a href="#(\w+)"', page)
    assert [name for name in anchors if f'<section id="{name}">' not in page] == []
    assert page.count("<svg") == len(made["signals"])
    assert page.count('src="data:image/jpeg') > 20
    assert len(page) < 3_000_000


# ---------------------------------------------------------------- tables made by hand


def write_tables(out: Path) -> None:
    """16 accepted clips, 4 of them flagged; rejects: transient ones, a wrong sound, a hostile one, a lost double."""
    write_clip_table(out / "plain", 2, 8)
    rows = storage.read_table(str(out / "plain")).to_pylist()
    shutil.rmtree(out / "plain")
    signals = {f.name: 100.0 for f in (*SIGNALS, *SIMILARITIES) if pa.types.is_floating(f.type)}
    signals |= {"width": 64, "height": 64, "duration_s": 2.0, "rms_db": -20.0, "silent_fraction": 0.0, "av_gap_s": 0.0}
    signals |= {"clipped_fraction": 0.0}
    for i, row in enumerate(rows):
        row |= signals | {"av_similarity": 0.2 + 0.01 * i, "flags": ["SILENT", "AV_GAP"] if i < 4 else []}
        row["rms_db"] = -70.0 if i < 4 else -20.0
        row["av_gap_s"] = 3.0 if i < 4 else 0.0
    rows[3]["flags"] = ["SILENT"]
    rows[3]["av_gap_s"] = 0.0
    for n in range(2):
        part = pa.Table.from_pylist(rows[n * 8 : n * 8 + 8], CLIP_TABLE)
        storage.write_table(f"{out}/accepted/shard-0000{n}.parquet", part)
    base = {"uri": f"/x/{HOSTILE}.mp4", "caption": "", "labels": [HOSTILE], "split": "train", "transient": False}
    wrong = signals | {"av_similarity": 0.05, "stage": "correspondence", "code": "WRONG_AUDIO", "message": "low"}
    double = {"stage": "duplicate", "code": "NEAR_DUPLICATE", "message": "same clip as /gone.mp4 (none) of split test"}
    rejects = [
        base | {"stage": "read", "code": "IO_ERROR", "message": HOSTILE, "transient": True},
        base | wrong,
        base | {"stage": "odd", "code": "ODD", "message": "never heard of"},
        base | signals | double,
    ]
    storage.write_table(f"{out}/rejected/shard-00000.parquet", pa.Table.from_pylist(rejects, REJECT_TABLE))


def test_flags_correspondence_transient_errors_and_hostile_names(tmp_path: Path) -> None:
    write_tables(tmp_path)
    result = {"correspondence": {"threshold": 0.1, "false_accept_rate": 0.01, "null": [0, 0.05], "matched": [0.2, 0.3]}}
    made = card.write_card(str(tmp_path), FILTERS, result)
    funnel = made["funnel"]
    assert (funnel["rows_in"], funnel["accepted"], funnel["flagged"], funnel["transient"]) == (20, 16, 4, 1)
    assert {flag["code"]: flag["rows"] for flag in funnel["flags"]} == {"SILENT": 4, "AV_GAP": 3}
    # Only the row with no other flag comes in when SILENT alone is relaxed.
    loud = {t["limit"]: t["gained"] for t in made["thresholds"]["silent_rms_db"]["tried"]}
    assert loud[-80.0] == 1
    moved = made["thresholds"]["correspondence.threshold"]
    assert moved["quiet"] == [0.05, 0.24]
    assert sum(made["correspondence"]["null"]) == 2 == sum(made["correspondence"]["matched"])
    assert [sheet["code"] for sheet in made["borderline"]] == ["SILENT", "AV_GAP", "WRONG_AUDIO"]
    assert made["duplicate_groups"][0]["kept"] is None
    assert made["transient"][0]["code"] == "IO_ERROR"
    assert list(made["examples"]) == ["ODD"]
    page = (tmp_path / "card.html").read_text()
    assert "<script" not in page
    assert "Likeness of sound and pictures" in page
    assert "aai curate --retry IO_ERROR" in page
    assert "Flags on accepted rows" in page


def test_counts_on_given_edges_are_taken_as_they_are(tmp_path: Path) -> None:
    write_tables(tmp_path)
    given = {"threshold": 0.1, "edges": [0, 0.1, 1], "null": [99, 1], "matched": [1, 99]}
    assert card.write_card(str(tmp_path), FILTERS, {"correspondence": given})["correspondence"] == given


def test_nothing_accepted_nothing_rejected_no_filters(tmp_path: Path) -> None:
    write_tables(tmp_path)
    shutil.rmtree(tmp_path / "accepted")
    made = card.write_card(str(tmp_path), FILTERS, {})
    assert (made["funnel"]["accepted"], made["funnel"]["rejected"]) == (0, 4)
    shutil.rmtree(tmp_path / "rejected")
    made = card.write_card(str(tmp_path), {}, {})
    assert made["funnel"]["rows_in"] == 0
    assert made["thresholds"] == made["signals"] == {}


def test_s3(tmp_path: Path, s3: str) -> None:
    write_tables(tmp_path)
    local = card.write_card(str(tmp_path), FILTERS, {})
    storage.upload_folder(tmp_path, s3)
    assert card.write_card(s3, FILTERS, {}) == {**local, "out": s3}
    assert storage.read_bytes(f"{s3}/card.html").startswith(b"<!doctype html>")


def test_the_card_goes_to_mlflow(
    curated: tuple[Path, dict[str, Any]], made: dict[str, Any], empty_store: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="card")
    run_id = card.log_card(cfg, "curate", str(curated[0]), made)
    client = tracking.connect(cfg)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["accepted"] == curated[1]["accepted"]
    assert metrics["by_code.SILENT"] == curated[1]["by_code"]["SILENT"]
    assert {item.path for item in client.list_artifacts(run_id)} == {"card.html", "card.json", "croissant.json"}
