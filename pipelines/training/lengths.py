"""Does the encoder hear what the clips hold? The length it takes, and how much of the sound that cuts away."""

import logging
import math

import numpy as np

from aai import storage
from aai.errors import UserError
from pipelines.settings import Choice

log = logging.getLogger(__name__)

LONGEST_S = 10.0
"""Clips of the data sets that encoders are pretrained on have this length."""
WHOLE_SHARE = 0.95
"""Share of the clips that `auto` keeps whole: a few long ones must not make all others mostly silence."""


def clip_lengths_s(features: str) -> np.ndarray:
    """Durations [N] of a FeatureTable's clips. Raises UserError when it holds none."""
    return storage.read_table(features, ["duration_s"])["duration_s"].to_numpy()


def fitting_clip_s(lengths_s: np.ndarray) -> Choice:
    """The length that an encoder is best given for clips of these durations [N].

    Tenths of a second, rounded down: codecs append a few hundredths to a clip.
    """
    usual_s = float(np.quantile(lengths_s, WHOLE_SHARE, method="inverted_cdf"))
    clip_s = min(LONGEST_S, max(0.1, math.floor(usual_s * 10 + 1e-6) / 10))
    why = f"auto: {WHOLE_SHARE:.0%} of {len(lengths_s)} clips last {usual_s:.2f} s or less"
    return Choice(value=clip_s, why=f"{why}; {LONGEST_S:g} s at most" if usual_s > LONGEST_S else why)


def check_cut(stage: str, lengths_s: np.ndarray, clip_s: float, max_cut_share: float) -> None:
    """Tells how much of the sound is beyond the encoder's length; raises UserError when it is too much."""
    beyond_s = np.maximum(0, lengths_s - clip_s)
    share, longer = float(beyond_s.sum() / lengths_s.sum()), int((beyond_s > 0.1).sum())
    if share > max_cut_share:
        raise UserError(
            "encoder.clip_s",
            f"{clip_s:g}",
            f"cuts away {share:.0%} of the sound ({longer} of {len(lengths_s)} clips are longer, max_cut_share is "
            f"{max_cut_share:g})",
            "curate with cut.mode=windows, align with a longer encoder.clip_s, or raise max_cut_share",
        )
    if longer:
        said = "%s: %d of %d clips are longer than encoder.clip_s=%g: %.1f%% of the sound is cut away"
        log.warning(said, stage, longer, len(lengths_s), clip_s, 100 * share)
