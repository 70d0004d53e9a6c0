"""Scores of curation against planted truth, on a table of a few rows."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from aai import storage
from aai.toy.scoring import score_defects

DEFECTS: list[dict[str, Any]] = [
    {"uri": "clips/silent.mp4", "kind": "silent", "expect": "reject", "code": "SILENT"},
    {"uri": "clips/quiet.mp4", "kind": "silent", "expect": "reject", "code": "SILENT"},
    {"uri": "clips/b.mp4", "pair": "clips/a.mp4", "kind": "near", "expect": "reject", "code": "NEAR_DUPLICATE"},
    {"uri": "clips/mono.mp4", "kind": "mono", "expect": "accept", "code": None},
    {"uri": "clips/rate.mp4", "kind": "rate", "expect": "accept", "code": None},
    {"uri": "clips/lie.mp4", "kind": "wrong_audio", "expect": "reject", "code": "WRONG_AUDIO"},
]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Curated so: one of two silent clips found, of two twins the other one dropped, an oddity and a good clip lost."""
    rejected = {"silent": "SILENT", "a": "NEAR_DUPLICATE", "rate": "SILENT", "good": "SILENT"}
    accepted = ["quiet", "b", "mono", "lie", "fine"]
    uris = [f"{tmp_path}/clips/{name}.mp4" for name in rejected]
    storage.write_table(f"{tmp_path}/out/rejected/a.parquet", pa.table({"uri": uris, "code": list(rejected.values())}))
    uris = [f"{tmp_path}/clips/{name}.mp4" for name in accepted]
    storage.write_table(f"{tmp_path}/out/accepted/a.parquet", pa.table({"uri": uris}))
    storage.write_json(f"{tmp_path}/defects.json", DEFECTS)
    return tmp_path


def test_what_was_found_missed_and_wrongly_rejected(world: Path) -> None:
    scores = score_defects(f"{world}/defects.json", f"{world}/out")
    assert (scores["planted"], scores["found"], scores["recall"]) == (3, 2, 2 / 3)
    assert scores["precision"] == 2 / 4
    assert scores["false_rejects"] == [f"{world}/clips/{name}.mp4" for name in ("good", "rate")]
    assert scores["kinds"] == {
        "silent": {"planted": 2, "found": 1, "missed": [f"{world}/clips/quiet.mp4"], "precision": 1 / 3},
        "near": {"planted": 1, "found": 1, "missed": [], "precision": 1.0},
        "mono": {"planted": 1, "found": 1, "missed": []},
        "rate": {"planted": 1, "found": 0, "missed": [f"{world}/clips/rate.mp4"]},
    }
    assert scores["unseen"] == {"wrong_audio": {"planted": 1, "found": 0}}


def test_a_wrong_sound_counts_once_an_aligner_was_there(world: Path) -> None:
    storage.write_json(f"{world}/out/curate.json", {"correspondence": {"threshold": 0.1}})
    scores = score_defects(f"{world}/defects.json", f"{world}/out")
    assert (scores["planted"], scores["found"], scores["unseen"]) == (4, 2, {})
    assert scores["kinds"]["wrong_audio"]["missed"] == [f"{world}/clips/lie.mp4"]


def test_an_oddity_that_is_in_neither_table_is_not_found(world: Path) -> None:
    storage.write_json(f"{world}/defects.json", [{**DEFECTS[3], "uri": "clips/gone.mp4"}])
    assert score_defects(f"{world}/defects.json", f"{world}/out")["kinds"]["mono"]["found"] == 0
