"""Signals that are not measured here: where their values are from, what they speak against, what the card shows."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai import storage
from aai.errors import UserError
from pipelines.__main__ import load_config
from pipelines.curate import CurateConfig, run
from pipelines.curation.own_signals import SignalConfig, check_signals, join_signals, signal_reasons
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.row import ManifestRow
from tests.clips import make_clip

PAGE = Path(__file__).resolve().parents[3] / "docs/curation.md"
KEYS = ["a", "b", "c"]
ROWS = {key: ManifestRow(uri=f"/data/{key}.mp4", split="train", extra={"given": i + 0.5}) for i, key in enumerate(KEYS)}


def measured() -> TableSlices:
    """Two shards; the clip c could not be decoded."""
    shards = TableSlices()
    for name, keys in (("0", KEYS[:2]), ("1", KEYS[2:])):
        ids, codes = [f"id-{k}" if k != "c" else None for k in keys], [None if k != "c" else "TORN" for k in keys]
        columns = {"key": keys, "clip_id": pa.array(ids, pa.string()), "code": pa.array(codes, pa.string())}
        shards.add(name, pa.table(columns))
    return shards


def values(tmp_path: Path, signal: dict[str, Any], table: dict[str, Any] | None = None) -> list[float | None]:
    """What the three clips get of a signal `x`."""
    if table:
        pq.write_table(pa.table(table), tmp_path / "x.parquet")
        signal = {"table": str(tmp_path / "x.parquet"), **signal}
    signals = {"x": SignalConfig.parse(signal)}
    check_signals(signals, list(ROWS.values()), ())
    joined = join_signals(measured(), ROWS, signals, "/data/clips.csv")
    return [value for table in joined.values() for value in table["x"].to_pylist()]


def test_values_are_joined_by_id_or_by_uri(tmp_path: Path) -> None:
    by_id = {"clip_id": ["id-b", "id-z", "id-a", None], "x": [2, 9, 1, 7]}
    assert values(tmp_path, {}, by_id) == [1.0, 2.0, None]
    by_uri = {"uri": ["b.mp4", "/data/c.mp4", "b.mp4", "http://x/a.mp4"], "score": [0.5, np.nan, 0.5, 1.0]}
    assert values(tmp_path, {"column": "score"}, by_uri) == [None, 0.5, None]
    assert values(tmp_path, {}, {"uri": ["a.mp4"], "x": [True]}) == [1.0, None, None]


def test_a_folder_of_tables_is_one_table(tmp_path: Path) -> None:
    for name, key in (("0", "a"), ("1", "b")):
        storage.write_table(f"{tmp_path}/x/{name}.parquet", pa.table({"clip_id": [f"id-{key}"], "x": [float(name)]}))
    assert values(tmp_path, {"table": f"{tmp_path}/x"}) == [0.0, 1.0, None]


def test_a_signal_without_a_table_is_a_column_of_the_manifest() -> None:
    signals = {"given": SignalConfig(min=1)}
    check_signals(signals, list(ROWS.values()), ())
    joined = join_signals(measured(), ROWS, signals, "m.csv")
    assert joined["0"]["given"].to_pylist() == [0.5, 1.5]
    assert signal_reasons(joined["0"], signals) == [(0, "LOW_GIVEN", "given 0.5 is below signals.given.min 1")]


def test_thresholds_and_missing_values_speak_against_clips(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([1.0, 2.0, 3.0, None], pa.float64())})
    kept = SignalConfig(min=2, max=2)
    assert [found[:2] for found in signal_reasons(table, {"x": kept})] == [(0, "LOW_X"), (2, "HIGH_X")]
    strict = SignalConfig(table="t.parquet", missing="reject")
    assert signal_reasons(table, {"x": strict}) == [(3, "NO_X", "x has no value for it in t.parquet")]


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        ({"clip_id": ["a"], "y": [1.0]}, r"signals\.x\.table=.*: has no column x \(found: clip_id, y\)"),
        ({"id": ["a"], "x": [1.0]}, "has no column clip_id or uri"),
        ({"clip_id": ["a"], "x": ["high"]}, "column x holds string, no numbers"),
        ({"clip_id": ["id-a", "id-a"], "x": [1.0, 2.0]}, "has several values for clip_id id-a: 1 and 2"),
    ],
)
def test_tables_that_cannot_be_joined_are_refused(table: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rule):
        values(tmp_path, {}, table)


def test_what_nothing_has_values_for_is_refused(tmp_path: Path) -> None:
    rows = [ManifestRow(uri="/a", split="train", extra={"license": "CC0", "score": 1.0})]
    with pytest.raises(UserError, match=r"signals=quality: has neither a table nor a column.*numbers are in: score"):
        check_signals({"quality": SignalConfig()}, rows, ())
    with pytest.raises(UserError, match="is text in the manifest"):
        check_signals({"license": SignalConfig()}, rows, ())
    with pytest.raises(UserError, match="holds no Parquet files"):
        check_signals({"x": SignalConfig(table=f"{tmp_path}/none.parquet")}, rows, ())
    pq.write_table(pa.table({"clip_id": ["a"], "score": [1.0]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="is told by the manifest or by scores, too"):
        check_signals({"score": SignalConfig(table=f"{tmp_path}/x.parquet")}, rows, ())


@pytest.mark.parametrize(
    ("signals", "rule"),
    [
        ({"Aesthetic": {}}, "pattern"),
        ({"rms_db": {}}, "rms_db stands for something else"),
        ({"x": {"min": 2, "max": 1}}, "min 2 is above max 1"),
        ({"x": {"column": "y"}}, "column is one of a table"),
        ({"x": {"least": 1}}, "unknown key"),
    ],
)
def test_settings_that_cannot_act_are_refused(signals: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        CurateConfig.parse({"manifest": "m", "out": "o", "signals": signals})


# ---------------------------------------------------------------- the example of the documentation


@pytest.mark.usefixtures("shards_here")
def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    world = tmp_path / "runs/demo/world"
    for i, caption in enumerate(("a bell", "a dog barks at the rain", "")):
        clip = make_clip(list(np.round(np.linspace(0, 1.9, 20) ** (1 + i / 5), 3)))
        storage.write_bytes(str(world / f"{i}.mp4"), clip)
        with (world / "manifest.csv").open("a") as manifest:
            manifest.write(f"uri,caption,license\n{i}.mp4,{caption},CC0\n" if i == 0 else f"{i}.mp4,{caption},CC-BY\n")
    section = PAGE.read_text().split("## Signals of your own")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    (command,) = re.findall(r"^aai curate (.*)$", section, re.MULTILINE)
    settings = re.findall(r"'(.*?)'", command)
    usual = ["--set", "tracking=null", "--set", "max_reject_ratio=1", "--set", "duplicates.enabled=false"]
    config, _ = load_config("curate", usual)
    assert run(config)["accepted"] == 3
    exec(code, {})  # writes words.parquet
    config, _ = load_config("curate", [*usual, "--rejudge", *(word for text in settings for word in ("--set", text))])
    result = run(config)
    assert result["by_code"] == {"LOW_WORDS": 2}
    (kept,) = storage.read_table("runs/demo/curated/accepted").to_pylist()
    assert (kept["caption"], kept["words"], kept["license"]) == ("a dog barks at the rain", 6.0, "CC-BY")
    rejected = storage.read_table("runs/demo/curated/rejected").to_pylist()
    assert {row["message"] for row in rejected} == {
        "words 2 is below signals.words.min 3", "words 0 is below signals.words.min 3",
    }  # fmt: skip
    check_card(storage.read_json("runs/demo/curated/card.json"), Path("runs/demo/curated/card.html").read_text())
    assert run(config) == result, "up to date"
    pq.write_table(pa.table({"clip_id": [kept["clip_id"]], "words": [1]}), "words.parquet")
    assert run(config)["by_code"] == {"LOW_WORDS": 1}, "the tables follow; two clips have no value now"


def check_card(card: dict[str, Any], page: str) -> None:
    (mark,) = card["signals"]["words"]["thresholds"]
    assert (mark["setting"], mark["limit"], sum(card["signals"]["words"]["this"])) == ("signals.words.min", 3, 2)
    lower = {tried["limit"]: tried["gained"] for tried in card["thresholds"]["signals.words.min"]["tried"]}
    assert lower[2.0] == 1 if 2.0 in lower else lower
    assert card["own_signals"]["words"] == {"source": "words.parquet", "min": 3, "missing": "keep", "missing_rows": 0}
    (licences,) = card["columns"]
    assert licences["values"] == [
        {"value": "CC-BY", "accepted": 1, "rejected": 1}, {"value": "CC0", "accepted": 0, "rejected": 1},
    ]  # fmt: skip
    assert '<section id="signals">' in page
    assert "CC-BY" in page
