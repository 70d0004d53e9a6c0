"""What an evaluation found right of each single clip: its marks, see `pipelines.evaluation.paired`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from aai import grading, metrics, storage
from pipelines.evaluation.cases import FROM_NOISE, PICTURES, REPAINTED
from pipelines.evaluation.clips import EvaluatedClips
from pipelines.evaluation.grades import KEPT, Heard, class_features
from pipelines.evaluation.judges import ATTRIBUTES, UNCAPTIONED
from pipelines.evaluation.paired import SCHEMA

RECALLS = (1, 5, 10)
Mark = tuple[str, Sequence[int] | np.ndarray, Sequence[float] | Sequence[bool] | np.ndarray]
"""A figure's dotted name, clips, and what each got."""


def marks(out: str, clips: EvaluatedClips, heard: Heard, attributes: Sequence[str]) -> pa.Table:
    """The marks of a finished evaluation, one row a clip and figure. attributes: what its judge reads."""
    parts = []
    for name, of, values in (*_retrieval(clips, heard), *_pictures(out, clips, attributes)):
        columns = [[name] * len(of), np.asarray(of, np.int32), np.asarray(values, np.float32)]
        parts.append(pa.table([pa.array(column) for column in columns], schema=SCHEMA))
    return pa.concat_tables(parts)


def _retrieval(clips: EvaluatedClips, heard: Heard) -> Iterator[Mark]:
    rows = np.arange(len(heard.audio))
    captions = np.array(clips.test["caption"].to_pylist())
    ways = {
        "a2v": (heard.audio, heard.image, rows),
        "v2a": (heard.image, heard.audio, rows),
        "a2t": (heard.audio, heard.text, captions),
        "t2a": (heard.text, heard.audio, captions),
    }
    for way, (queries, gallery, keys) in ways.items():
        ranks = metrics.first_hit_ranks(queries, gallery, keys, keys)
        for k in RECALLS:
            yield f"retrieval.{way}.r{k}", rows, ranks <= k
    objects = np.array([labels[0] if labels else "" for labels in clips.labels])
    for name, queries in {"same_object_r1": heard.audio, "same_object_by_caption": heard.text}.items():
        yield f"retrieval.{name}", rows, objects[metrics.nearest(queries, heard.image)] == objects


def _pictures(out: str, clips: EvaluatedClips, attributes: Sequence[str]) -> Iterator[Mark]:
    truth = [dict(zip(ATTRIBUTES, row, strict=False)) for row in clips.labels]
    columns = ["case", "condition", "row", "picture_row", *ATTRIBUTES, "clip_feature"]
    table = storage.read_table(storage.join(out, PICTURES), columns).sort_by("case")
    by_condition: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_condition.setdefault(row["condition"], []).append(row)
    names, classes = class_features(clips.labels, out)
    for name, seen in by_condition.items():
        if name in ("caption", "loudness"):
            continue  # about the foundation, not the bundle; a series for the eye
        labelled = [row for row in seen if clips.labels[row["row"]]] if name not in REPAINTED else []
        if labelled:
            painted = torch.tensor([row["clip_feature"] for row in labelled])
            wanted = [names.index(clips.labels[row["row"]][0]) for row in labelled]
            right = grading.zero_shot_hits(painted, classes, wanted).tolist()
            yield f"generation.clip.{name}.aic", [row["row"] for row in labelled], right
        asked = (ATTRIBUTES[REPAINTED[name]],) if name in REPAINTED else ("object", "ambience", *UNCAPTIONED)
        yield from _read(name, seen, truth, "row", [a for a in asked if a in attributes])
        kept = KEPT.get(name, ())
        yield from _read(name, seen, truth, "picture_row", [a for a in kept if a in attributes])
        if kept and set(kept) <= set(attributes):
            given = [truth[row["picture_row"]] for row in seen]
            yield f"generation.{_where(name)}.kept", [row["row"] for row in seen], grading.all_hits(seen, given, kept)
        if name == "sketch" and "medium" in attributes:
            yield "generation.sketch.medium", [row["row"] for row in seen], [r["medium"] == "sketch" for r in seen]


def _read(
    name: str, seen: Sequence[Mapping[str, Any]], truth: Sequence[Mapping[str, str]], whose: str, asked: Sequence[str]
) -> Iterator[Mark]:
    """What the judge read of a condition's pictures, as it should be of the clip that is heard, or of the given one."""
    of = [truth[row[whose]] for row in seen]
    for attribute in asked:
        if all(attribute in row for row in truth):
            prefix = "kept_" if whose == "picture_row" else ""
            right = grading.hits(seen, of, attribute)
            yield f"generation.{_where(name)}.{prefix}{attribute}", [row["row"] for row in seen], right


def _where(condition: str) -> str:
    """The place of a condition's figures in evaluate.json."""
    return condition.replace(FROM_NOISE, ".from_noise")
