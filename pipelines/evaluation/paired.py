"""Two bundles on the same held-out clips: how far apart they are, and whether that can be chance.

They are compared by their marks, what each got right of each single clip: what both find easy or hard cancels out, so
that the paired interval is much narrower than those of two figures. Loads no model.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import metrics, storage
from aai.errors import UserError

RESULT, MARKS = "evaluate.json", "marks.parquet"
"""The marks have a row for each clip and each figure of evaluate.json that is a plain mean over clips: recalls, AIC,
what the judge read and what was kept under every condition."""
SCHEMA = pa.schema([("figure", pa.string()), ("clip", pa.int32()), ("value", pa.float32())])
"""figure: its dotted name."""
SAME = ("config", "data_fingerprint")
"""What two evaluations must share to be compared."""


def compare(ours: str, ours_result: Mapping[str, Any], theirs: str) -> dict[str, Any]:
    """{bundle, figures{NAME{difference, ci95, pairs}}} of two finished evaluations; above 0 ours is better.

    ours, theirs: their folders. Raises UserError where there is no finished evaluation, or one of other settings or
    clips.
    """
    check_finished(theirs)
    result = storage.read_json(storage.join(theirs, RESULT))
    for name in SAME:
        if result.get(name) != ours_result.get(name):
            rule = f"is an evaluation of other {'settings' if name == 'config' else 'clips'}"
            raise UserError("against", theirs, rule, "evaluate both bundles with the same settings and features")
    mine, others = (read_marks(storage.read_bytes(storage.join(out, MARKS))) for out in (ours, theirs))
    figures = {name: paired(name, mine, others) for name in pc.unique(mine["figure"]).to_pylist()}
    return {"bundle": result["bundle"], "figures": {name: found for name, found in figures.items() if found}}


def check_finished(folder: str) -> None:
    """Raises UserError for a folder that holds no evaluation to be compared with."""
    if not storage.exists(storage.join(folder, RESULT)):
        raise UserError("against", folder, "holds no finished evaluation", "give the --out of an `aai evaluate`")
    if not storage.exists(storage.join(folder, MARKS)):
        rule = f"was written by an older release, without {MARKS}"
        raise UserError("against", folder, rule, "run its `aai evaluate` once more: nothing is painted again")


def as_bytes(marks: pa.Table) -> bytes:
    """Marks as a Parquet file."""
    file = io.BytesIO()
    pq.write_table(marks, file, compression="zstd")
    return file.getvalue()


def read_marks(data: bytes) -> pa.Table:
    """The marks of a Parquet file."""
    return pq.read_table(io.BytesIO(data))


def paired(name: str, ours: pa.Table, theirs: pa.Table) -> dict[str, Any] | None:
    """{difference, ci95, pairs} of a figure by two tables of marks, above 0 where ours is better.

    None where a table has no marks of it, or the marks are not of the same clips.
    """
    mine, others = _by_clip(ours, name), _by_clip(theirs, name)
    if not mine or mine.keys() != others.keys():
        return None
    clips = sorted(mine)
    return metrics.paired_difference(np.array([mine[c] for c in clips]), np.array([others[c] for c in clips]))


def _by_clip(marks: pa.Table, name: str) -> dict[int, float]:
    """The mean over the pictures of each clip: those of one clip are not drawn independently."""
    found = marks.filter(pc.field("figure") == name).group_by("clip").aggregate([("value", "mean")])
    return dict(zip(found["clip"].to_pylist(), found["value_mean"].to_pylist(), strict=True))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison as a table for people."""
    return [_line(name, figure) for name, figure in found["figures"].items()]


def _line(name: str, figure: Mapping[str, Any]) -> str:
    low, high = figure["ci95"]
    sure = "better" if low > 0 else "worse" if high < 0 else "may be chance"
    return f"{name:<40} {figure['difference']:+.3f}  [{low:+.3f}, {high:+.3f}]  {figure['pairs']} pairs  {sure}"
