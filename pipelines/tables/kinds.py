"""Clips of several kinds in one table: those of a video have K pictures, a still stands for all K, others have none."""

from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from aai import storage
from aai.errors import UserError
from aai.schema import NO_PICTURE, PICTURE, STILL_PICTURE, VIDEO_PICTURES


def kinds_in(clips: pa.Table) -> frozenset[str]:
    """What the column `picture` says of some clips of a ClipTable; nothing where there is no such column."""
    return frozenset(clips[PICTURE].to_pylist()) if PICTURE in clips.column_names else frozenset()


def shared_count(kinds: Mapping[str, Collection[str]]) -> int:
    """K of the videos in a ClipTable that has clips of other kinds, too; 0 where it has none of these.

    kinds: see `kinds_in`, by file. 1 where there is no video. Raises UserError where only some files tell.
    """
    if not frozenset[str]().union(*kinds.values()) - {VIDEO_PICTURES}:
        return 0
    if bare := [file for file, found in kinds.items() if not found]:
        raise UserError("input", bare[0], f"has no column {PICTURE}, as other files have", "curate them again")
    for file, found in kinds.items():
        if VIDEO_PICTURES in found:
            row = storage.read_table(file, [PICTURE])[PICTURE].to_pylist().index(VIDEO_PICTURES)
            return len(storage.read_rows(file, [row], ["frames"])["frames"][0])
    return 1


def picture_counts(file: str, clips: pa.Table, shared: int) -> tuple[np.ndarray, int]:
    """Pictures of each clip of a file, int64 [N], and K. shared: see `shared_count`; 0: the first clip's number.

    Raises UserError where a clip has another number than its kind.
    """
    counts = np.array([len(frames) for frames in clips["frames"].to_pylist()], np.int64)
    usual, wanted = shared or int(counts[0]), np.full(len(counts), shared or int(counts[0]))
    if shared:
        of_kind = {VIDEO_PICTURES: shared, STILL_PICTURE: 1, NO_PICTURE: 0}
        wanted = np.array([of_kind[kind] for kind in clips[PICTURE].to_pylist()])
    if not usual or (counts != wanted).any():
        found = sorted(set(counts.tolist()))
        raise UserError("input", file, f"clips have {found} pictures, not equally many", "curate them again")
    return counts, usual


def spread(features: np.ndarray, counts: np.ndarray, shared: int) -> np.ndarray:
    """[N, K, ...] for the clips of features [M, ...] of their pictures, one clip's after the other's.

    Where a clip has one picture it stands K times; where it has none there are zeros.
    """
    out = np.zeros((len(counts), shared, *features.shape[1:]), features.dtype)
    seen = counts > 0
    first = (np.cumsum(counts) - counts)[seen, None]
    out[seen] = features[first + np.minimum(np.arange(shared), counts[seen, None] - 1)]
    return out
