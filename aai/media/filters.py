"""From measured signals to a verdict: the rules a clip breaks, in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pydantic

from aai.config import Config


class FilterConfig(Config):
    """Thresholds of the filters; every one acts on a signal that the tables keep."""

    min_duration_s: float = pydantic.Field(0.5, ge=0)
    """Shortest clip (TOO_SHORT)."""
    max_duration_s: float = pydantic.Field(60.0, gt=0)
    """Longest clip (TOO_LONG)."""
    min_size_px: int = pydantic.Field(48, ge=1)
    """Smallest width and height (TOO_SMALL)."""
    min_fps: float = pydantic.Field(0.5, ge=0)
    """Fewest pictures per second (LOW_FPS)."""
    max_av_gap_s: float = pydantic.Field(1.0, ge=0)
    """Largest difference of sound and picture length (AV_GAP)."""
    silent_rms_db: float = pydantic.Field(-60.0, le=0)
    """A clip below this level, in dB full scale, is SILENT."""
    max_silent_fraction: float = pydantic.Field(0.95, ge=0, le=1)
    """Largest share of silent 50 ms windows (MOSTLY_SILENT)."""
    max_clipped_fraction: float = pydantic.Field(0.05, ge=0, le=1)
    """Largest share of samples at full scale (CLIPPED)."""
    black_luma: float = pydantic.Field(8.0, ge=0, le=255)
    """Mean brightness below this, 0..255, is a BLACK_VIDEO."""
    min_luma_std: float = pydantic.Field(2.0, ge=0)
    """Brightness that varies less than this within the pictures, 0..255, is a BLANK_VIDEO."""
    min_motion: float = pydantic.Field(0.25, ge=0)
    """Mean change between kept frames below this, 0..255, is a FROZEN_VIDEO; 0 lets still pictures pass."""
    still_motion: float | None = pydantic.Field(None, ge=0)
    """Mean change between kept frames below this, 0..255, is a NEAR_STILL video; empty = no such rule."""
    min_caption_similarity: float | None = pydantic.Field(None, ge=-1, le=1)
    """Cosine of caption and pictures in CLIP space below this is an OFF_CAPTION clip; empty = no such rule."""


RULES: tuple[tuple[str, str, str, str, int], ...] = (
    # code, signal, threshold, unit, sign: +1 the signal must be at least the threshold, -1 at most
    ("TOO_SHORT", "duration_s", "min_duration_s", "s", +1),
    ("TOO_LONG", "duration_s", "max_duration_s", "s", -1),
    ("TOO_SMALL", "width", "min_size_px", "px", +1),
    ("TOO_SMALL", "height", "min_size_px", "px", +1),
    ("LOW_FPS", "fps", "min_fps", "frames/s", +1),
    ("SILENT", "rms_db", "silent_rms_db", "dBFS", +1),
    ("MOSTLY_SILENT", "silent_fraction", "max_silent_fraction", "of the time", -1),
    ("CLIPPED", "clipped_fraction", "max_clipped_fraction", "of the samples", -1),
    ("BLACK_VIDEO", "luma_mean", "black_luma", "of 255", +1),
    ("BLANK_VIDEO", "luma_std", "min_luma_std", "of 255", +1),
    ("FROZEN_VIDEO", "motion", "min_motion", "of 255", +1),
    ("NEAR_STILL", "motion", "still_motion", "of 255", +1),
    ("AV_GAP", "av_gap_s", "max_av_gap_s", "s", -1),
    ("OFF_CAPTION", "caption_similarity", "min_caption_similarity", "cosine", +1),
)
"""Every filter, in the order of judgement: a clip is rejected with the code of the first one that it breaks.

A rule without a threshold is off, a signal that was not measured breaks none.
"""


def may_break(signals: pa.Table, cfg: FilterConfig) -> pa.Array:
    """bool [N]: for which rows of a table of signals `broken_rules` names a rule; all at once."""
    broken = np.zeros(signals.num_rows, bool)
    for _, signal, threshold, _, sign in RULES:
        if (limit := getattr(cfg, threshold)) is not None:
            values = signals[signal].cast(pa.float64())
            good = sign * (values.to_numpy() - limit) >= 0
            broken |= np.asarray(values.is_valid()) & ~good
    return pa.array(broken)


def broken_rules(signals: Mapping[str, Any], cfg: FilterConfig) -> list[tuple[str, str]]:
    """(code, message) of every rule that the signals break, in the order of RULES; empty when the clip is good."""
    broken = []
    for code, signal, threshold, unit, sign in RULES:
        limit = getattr(cfg, threshold)
        if limit is None or signals.get(signal) is None:
            continue
        value = float(signals[signal])
        if not sign * (value - limit) >= 0:  # so that NaN fails
            word = "below" if sign > 0 else "above"
            broken.append((code, f"{signal} {value:.4g} {unit} is {word} {threshold} {float(limit):g}"))
    return broken
