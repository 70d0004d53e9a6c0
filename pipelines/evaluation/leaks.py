"""Whether training has seen a held-out clip in another form: the same video cut, scaled or encoded anew has another id
and another content, and still gives its answers away."""

import numpy as np
import pyarrow.compute as pc

from aai.media.duplicates import WholeConfig, hamming, words
from pipelines.evaluation.clips import EvaluatedClips, index

HASHES = ("video_hash", "audio_hash")


def near_overlap(clips: EvaluatedClips, table: str, cfg: WholeConfig) -> int | None:
    """How many held-out clips look and sound like a training clip, by the perceptual hashes of a ClipTable.

    table: the ClipTable that the features were made from. None where a clip of either side has no hashes there, or cfg
    says not to look: a gate on what was not looked at must not pass.
    """
    if not cfg.enabled:
        return None
    known = index(table, ["clip_id", *HASHES])
    for name in HASHES:
        known = known.filter(pc.is_valid(known[name]))
    sides: list[tuple[np.ndarray, np.ndarray]] = []
    for side in (clips.test, clips.train):
        rows = known.filter(pc.is_in(known["clip_id"], value_set=side["clip_id"].combine_chunks()))
        hashed = pc.is_in(side["clip_id"], value_set=rows["clip_id"].combine_chunks())
        if not len(side) or not pc.all(hashed).as_py():
            return None
        video, audio = (words(rows[name].to_pylist()) for name in HASHES)
        sides.append((video, audio))
    held_out, trained = sides
    found = 0
    for video, audio in zip(*held_out, strict=True):
        seen = np.flatnonzero(hamming(trained[0], video) <= cfg.max_video_bits)
        found += bool((hamming(trained[1][seen], audio) <= cfg.max_audio_bits).any())
    return found
