"""The acceptance lines of the whole chain at full size (make accept): one `aai demo`, then a test for each line."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.toy.scoring import score_defects

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "runs" / "accept"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    """The figures of a demo from nothing, or of the finished one in runs/accept."""
    if not (RUN / "summary.json").exists():
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)
        (RUN / "wall_s.json").write_text(json.dumps(time.monotonic() - start))
    return dict(json.loads((RUN / "summary.json").read_text()))


def test_a1_the_demo_takes_ten_minutes_and_eight_gigabytes(summary: dict[str, Any]) -> None:
    assert summary["seconds"]["total"] <= 600
    assert summary["peak_rss_gb"] <= 8
    subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)
    again = json.loads((RUN / "summary.json").read_text())
    (RUN / "summary.json").write_text(json.dumps(summary))
    assert again["registry"] == summary["registry"]
    assert again["generation"] == summary["generation"]


def test_a3_foundation(summary: dict[str, Any]) -> None:
    figures = summary["foundation"]
    assert figures["frames"] >= 1000
    assert figures["caption_pictures"] >= 300
    assert figures["judge_object"] >= 0.99
    assert figures["clip_object"] >= 0.95
    assert figures["caption_object"] >= 0.95
    assert figures["caption_ambience"] >= 0.90
    assert figures["caption_medium"] >= 0.95
    assert figures["weights_mb"] <= 24


def test_a4_pictures_from_sound(summary: dict[str, Any]) -> None:
    figures = summary["generation"]
    sound, ceiling, chance = figures["sound"], figures["ceiling"], figures["chance"]
    assert sound["pictures"] >= 300
    assert sound["object"] >= 0.90 * ceiling["object"]
    assert sound["ambience"] >= 0.85 * ceiling["ambience"]
    for floor in ("random_token", "shuffled_audio"):
        for attribute in ("object", "ambience"):
            assert abs(figures[floor][attribute] - chance[attribute]) <= 0.05, (floor, attribute)
    assert figures["loudness_size_spearman"] >= 0.5
    assert figures["sketch"]["medium"] >= 0.90
    assert figures["sketch"]["object"] >= 0.80


def test_a5_retrieval(summary: dict[str, Any]) -> None:
    figures = summary["retrieval"]
    assert figures["gallery"] >= 500
    assert figures["overlap"] == 0
    assert figures["batch_invariance_max_abs"] <= 1e-4
    assert figures["same_object_r1"] >= 0.90
    for way in ("a2v", "a2t"):
        assert figures[way]["ci95"][0] > figures[way]["chance"]


def test_a6_curation(summary: dict[str, Any]) -> None:
    scores = score_defects(str(RUN / "world" / "defects.json"), str(RUN / "curated"))
    assert scores["recall"] >= 0.98
    assert scores["precision"] >= 0.98
    rejected = storage.read_table(str(RUN / "curated" / "rejected"), ["code", "message"]).to_pylist()
    assert all(row["code"] and len(row["message"]) > 5 for row in rejected)
    curate = summary["curate"]
    assert curate["rows_in"] == curate["accepted"] + curate["rejected"] == 2400


def test_a10_edit_and_stylize(summary: dict[str, Any]) -> None:
    edit, stylize = summary["generation"]["edit"], summary["generation"]["stylize"]
    assert min(edit["pictures"], stylize["pictures"]) >= 100
    assert min(edit["object"], edit["kept"]) >= 0.70
    assert min(stylize["ambience"], stylize["kept"]) >= 0.70
