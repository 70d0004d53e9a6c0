import pytest

from aai.media.filters import FilterConfig, verdict

GOOD = {
    "duration_s": 2.0, "width": 128, "height": 128, "fps": 8.0, "av_gap_s": 0.02, "rms_db": -25.0,
    "silent_fraction": 0.1, "clipped_fraction": 0.0, "luma_mean": 120.0, "luma_std": 40.0, "motion": 5.0,
}  # fmt: skip


def test_a_good_clip_passes() -> None:
    assert verdict(GOOD, FilterConfig()) is None


@pytest.mark.parametrize(
    ("signal", "value", "code"),
    [
        ("duration_s", 0.2, "TOO_SHORT"),
        ("duration_s", 100.0, "TOO_LONG"),
        ("height", 20, "TOO_SMALL"),
        ("fps", 0.1, "LOW_FPS"),
        ("rms_db", -90.0, "SILENT"),
        ("rms_db", float("nan"), "SILENT"),
        ("silent_fraction", 0.99, "SILENT"),
        ("clipped_fraction", 0.4, "CLIPPED"),
        ("luma_mean", 1.0, "BLACK_VIDEO"),
        ("luma_std", 0.1, "BLANK_VIDEO"),
        ("motion", 0.01, "FROZEN_VIDEO"),
        ("av_gap_s", 3.0, "AV_GAP"),
    ],
)
def test_each_rule_names_signal_value_and_threshold(signal: str, value: float, code: str) -> None:
    found = verdict(GOOD | {signal: value}, FilterConfig())
    assert found is not None
    assert found[0] == code
    assert signal in found[1]
    assert f"{value:.4g}" in found[1]


def test_thresholds_are_settings() -> None:
    assert verdict(GOOD | {"motion": 0.0}, FilterConfig(min_motion=0)) is None
    found = verdict(GOOD, FilterConfig(min_duration_s=3))
    assert found == ("TOO_SHORT", "duration_s 2 s is below min_duration_s 3")
