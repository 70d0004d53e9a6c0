import numpy as np
import pyarrow as pa
import pytest

from aai.media.filters import RULES, FilterConfig, broken_rules, may_break

GOOD = {
    "duration_s": 2.0, "width": 128, "height": 128, "fps": 8.0, "av_gap_s": 0.02, "rms_db": -25.0,
    "silent_fraction": 0.1, "clipped_fraction": 0.0, "luma_mean": 120.0, "luma_std": 40.0, "motion": 5.0,
}  # fmt: skip


def test_a_good_clip_passes() -> None:
    assert broken_rules(GOOD, FilterConfig()) == []


@pytest.mark.parametrize(
    ("signal", "value", "code"),
    [
        ("duration_s", 0.2, "TOO_SHORT"),
        ("duration_s", 100.0, "TOO_LONG"),
        ("height", 20, "TOO_SMALL"),
        ("fps", 0.1, "LOW_FPS"),
        ("rms_db", -90.0, "SILENT"),
        ("rms_db", float("nan"), "SILENT"),
        ("silent_fraction", 0.99, "MOSTLY_SILENT"),
        ("clipped_fraction", 0.4, "CLIPPED"),
        ("luma_mean", 1.0, "BLACK_VIDEO"),
        ("luma_std", 0.1, "BLANK_VIDEO"),
        ("motion", 0.01, "FROZEN_VIDEO"),
        ("av_gap_s", 3.0, "AV_GAP"),
    ],
)
def test_each_rule_names_signal_value_and_threshold(signal: str, value: float, code: str) -> None:
    ((code_found, message),) = broken_rules(GOOD | {signal: value}, FilterConfig())
    assert code_found == code
    assert signal in message
    assert f"{value:.4g}" in message


def test_thresholds_are_settings() -> None:
    assert broken_rules(GOOD | {"motion": 0.0}, FilterConfig(min_motion=0)) == []
    assert broken_rules(GOOD | {"motion": 0.6}, FilterConfig(still_motion=0.7))[0][0] == "NEAR_STILL"
    found = broken_rules(GOOD, FilterConfig(min_duration_s=3))
    assert found == [("TOO_SHORT", "duration_s 2 s is below min_duration_s 3")]


def test_every_broken_rule_is_told_in_order() -> None:
    found = broken_rules(GOOD | {"rms_db": -90.0, "silent_fraction": 1.0, "motion": 0.0}, FilterConfig())
    assert [code for code, _ in found] == ["SILENT", "MOSTLY_SILENT", "FROZEN_VIDEO"]
    order = [rule[0] for rule in RULES]
    assert [order.index(code) for code, _ in found] == sorted(order.index(code) for code, _ in found)


def test_all_rows_at_once_tell_the_same_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(500):
        row: dict[str, float | None] = {**GOOD, "caption_similarity": None}
        for name in rng.choice(list(row), 2):
            row[name] = rng.choice([None, 0.0, 1e9, float("nan"), -1e9])
        rows.append({name: None if value is None else float(value) for name, value in row.items()})
    signals = pa.Table.from_pylist(rows, pa.schema(dict.fromkeys(rows[0], pa.float64())))
    for cfg in (FilterConfig(), FilterConfig(min_caption_similarity=0.2, still_motion=0.7)):
        expected = [bool(broken_rules(row, cfg)) for row in rows]
        assert may_break(signals, cfg).to_pylist() == expected
        assert 50 < sum(expected) < 450
    assert may_break(signals.slice(0, 0), FilterConfig()).to_pylist() == []


def test_a_rule_without_threshold_or_signal_is_off() -> None:
    off = GOOD | {"caption_similarity": -0.5}
    assert broken_rules(off, FilterConfig()) == []
    assert broken_rules(GOOD | {"caption_similarity": None}, FilterConfig(min_caption_similarity=0.2)) == []
    assert broken_rules(off, FilterConfig(min_caption_similarity=0.2))[0][0] == "OFF_CAPTION"
