"""Two bundles on the same held-out clips: how far apart they are, and whether that can be chance.

Every figure is a mean over clips of what one bundle got right less what the other one did, with a paired bootstrap
interval: what both find easy or hard cancels out, so that it is much narrower than the intervals of two figures.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from aai import grading, metrics, storage
from aai.errors import UserError
from pipelines.evaluation.cases import PICTURES, REPAINTED
from pipelines.evaluation.grades import KEPT, Heard
from pipelines.evaluation.judges import ATTRIBUTES
from pipelines.evaluation.listening import INPUTS

SAME = ("config", "data_fingerprint")
"""What two evaluations must share to be compared."""
HEARD_OF = ("object", "ambience")
"""What a sound says of its picture."""
KEY = ("condition", "row", "audio_row", "picture_row", "seed")
Rows = dict[tuple[Any, ...], dict[str, Any]]


def compare(ours: str, ours_result: Mapping[str, Any], theirs: str) -> dict[str, Any]:
    """{bundle, retrieval{a2v_r1, v2a_r1}, generation{CONDITION{ATTRIBUTE}}} of two finished evaluations.

    ours, theirs: their folders. Each figure is {difference, ci95, pairs}: above 0 ours is better. Raises UserError
    where there is no finished evaluation, or one of other settings or clips.
    """
    done = storage.join(theirs, "evaluate.json")
    if not storage.exists(done):
        raise UserError("against", theirs, "holds no finished evaluation", "give the --out of an `aai evaluate`")
    result = storage.read_json(done)
    for name in SAME:
        if result.get(name) != ours_result.get(name):
            rule = f"is an evaluation of other {'settings' if name == 'config' else 'clips'}"
            raise UserError("against", theirs, rule, "evaluate both bundles with the same settings and features")
    return {
        "bundle": result["bundle"],
        "retrieval": _retrieval(Heard(ours), Heard(theirs)),
        "generation": _generation(ours, theirs),
    }


def _retrieval(ours: Heard, theirs: Heard) -> dict[str, Any]:
    rows = np.arange(len(ours.audio))
    hits = []
    for heard in (ours, theirs):
        pairs = (heard.audio, heard.image), (heard.image, heard.audio)
        hits.append([metrics.first_hit_ranks(*pair, rows, rows) <= 1 for pair in pairs])
    names = ("a2v_r1", "v2a_r1")
    return {name: metrics.paired_difference(a, b) for name, a, b in zip(names, *hits, strict=True)}


def _generation(ours: str, theirs: str) -> dict[str, Any]:
    labels = _labels(ours)
    mine, others = _pictures(ours), _pictures(theirs)
    figures: dict[str, Any] = {}
    for condition in ("sound", *REPAINTED):
        keys = [key for key in mine if key[0] == condition and key in others]
        kept = KEPT.get(condition, ())
        heard = (ATTRIBUTES[REPAINTED[condition]],) if condition in REPAINTED else HEARD_OF
        for name in (*heard, *kept):
            whose = "picture_row" if name in kept else "row"
            of = [labels[mine[key][whose]] for key in keys]
            if not keys or any(name not in row for row in of) or any(mine[key][name] is None for key in keys):
                continue  # nobody read it, or nobody knows what is right
            clips = np.array([mine[key]["row"] for key in keys])
            ours_right, theirs_right = (
                _by_clip(clips, grading.hits([side[key] for key in keys], of, name)) for side in (mine, others)
            )
            figures.setdefault(condition, {})[name] = metrics.paired_difference(ours_right, theirs_right)
    return figures


def _by_clip(clips: np.ndarray, right: Sequence[bool]) -> np.ndarray:
    """The mean over the pictures of each clip: those of one clip are not drawn independently."""
    return np.array([np.mean(np.array(right)[clips == clip]) for clip in np.unique(clips)])


def _labels(out: str) -> dict[int, dict[str, str]]:
    """The labels of each test clip by what they name."""
    files = storage.list_files(storage.join(out, INPUTS), ".parquet")
    table = pa.concat_tables([storage.read_table(file, ["row", "labels"]) for file in files])
    named = [dict(zip(ATTRIBUTES, row, strict=False)) for row in table["labels"].to_pylist()]
    return dict(zip(table["row"].to_pylist(), named, strict=True))


def _pictures(out: str) -> Rows:
    """What was read off each picture, by what it is a picture of."""
    table = storage.read_table(storage.join(out, PICTURES), [*KEY, *ATTRIBUTES])
    return {tuple(row[name] for name in KEY): row for row in table.to_pylist()}


def lines(found: Mapping[str, Any]) -> list[str]:
    """The comparison as a table for people."""
    rows: list[tuple[str, Mapping[str, Any]]] = [*found["retrieval"].items()]
    for condition, figures in found["generation"].items():
        rows += [(f"{condition}.{name}", figure) for name, figure in figures.items()]
    return [_line(name, figure) for name, figure in rows]


def _line(name: str, figure: Mapping[str, Any]) -> str:
    low, high = figure["ci95"]
    sure = "better" if low > 0 else "worse" if high < 0 else "may be chance"
    return f"{name:<20} {figure['difference']:+.3f}  [{low:+.3f}, {high:+.3f}]  {figure['pairs']} pairs  {sure}"
