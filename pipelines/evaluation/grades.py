"""The figures of an evaluation, from the tables that its workers wrote (see docs/evaluation.md). Loads no model."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from aai import grading, keeping, metrics, storage
from aai.disturbances import DISTURBANCES
from aai.foundation.identity import TOY_WEIGHTS
from aai.toy.grammar import OBJECTS
from pipelines.evaluation.cases import FROM_NOISE, PICTURES, REPAINTED
from pipelines.evaluation.clips import EvaluatedClips
from pipelines.evaluation.judges import ATTRIBUTES, NOVELTY, REGION, UNCAPTIONED
from pipelines.evaluation.listening import DISTURBED, FRAMES, HEARD, INPUTS, TEXTS

Rows = list[dict[str, Any]]
KEPT = {"edit": ("ambience", "medium"), "stylize": ("object", "medium")}
"""What of a given picture must stay."""
KEPT |= {f"{name}{FROM_NOISE}": kept for name, kept in KEPT.items()}
NAMED, AUDIBLE = (0, 1, 3, 7), (0, 1, 3, 4, 5, 6, 7)
"""Places of the labels that can be heard: those that captions of clips name, and all of them."""


class Heard:
    """What listening found: embeddings of the held-out clips by row, all of unit norm."""

    def __init__(self, out: str) -> None:
        files = [file for file in storage.list_files(storage.join(out, HEARD)) if "/test-" in file]
        columns = ["row", "audio", "image", "text", "rms_db", "alone_max_abs"]
        table = pa.concat_tables([storage.read_table(file, columns) for file in files]).sort_by("row")
        self.audio, self.image, self.text = (_matrix(table[name]) for name in ("audio", "image", "text"))
        self.rms_db = table["rms_db"].to_numpy()
        gaps = [gap for gap in table["alone_max_abs"].to_pylist() if gap is not None]
        self.batch_invariance_max_abs = max(gaps)


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """float32 [N, D] of a column of lists of one length."""
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.array(flat, np.float32).reshape(len(column), -1)


def retrieval_figures(clips: EvaluatedClips, heard: Heard) -> dict[str, Any]:
    """Retrieval in all four directions, audited for overlap with training and for batch invariance."""
    objects = np.array([labels[0] if labels else "" for labels in clips.labels])
    nearest = metrics.nearest(heard.audio, heard.image)
    captions = np.array(clips.test["caption"].to_pylist())
    more: dict[str, Any] = {}
    if all(len(labels) > 1 for labels in clips.labels):
        known = {"captions": NAMED, "all": AUDIBLE}
        more["oracle"] = {
            name: metrics.label_oracle([tuple(labels[i] for i in places if i < len(labels)) for labels in clips.labels])
            for name, places in known.items()
        }
        more["own_above_same_label"] = metrics.own_above_same_label(heard.audio, heard.image, objects)
    _, counts = np.unique(objects, return_counts=True)
    return {
        "gallery": len(objects),
        "overlap": clips.overlap(),
        "batch_invariance_max_abs": heard.batch_invariance_max_abs,
        "same_object_r1": float((objects[nearest] == objects).mean()),
        "same_object_by_caption": float((objects[metrics.nearest(heard.text, heard.image)] == objects).mean()),
        "same_object_chance": float(np.square(counts / len(objects)).sum()),
        **more,
        "a2v": metrics.retrieval(heard.audio, heard.image),
        "v2a": metrics.retrieval(heard.image, heard.audio),
        "a2t": metrics.retrieval(heard.audio, heard.text, captions, captions),
        "t2a": metrics.retrieval(heard.text, heard.audio, captions, captions),
    }


def robustness_figures(out: str, clips: EvaluatedClips, heard: Heard) -> dict[str, Any]:
    """Retrieval by sounds as worse recordings have them, beside the same sounds as they are; nothing where none were.

    {kind: {level: {same_object_r1, a2v_r10}}}, and `clean` of the same clips; all pictures are the gallery.
    """
    files = storage.list_files(storage.join(out, DISTURBED), ".parquet")
    tables = [table for file in files if len(table := storage.read_table(file))]
    if not tables:
        return {}
    table = pa.concat_tables(tables)
    objects = np.array([labels[0] if labels else "" for labels in clips.labels])
    keys = np.arange(len(objects))

    def found(audio: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        nearest = metrics.nearest(audio, heard.image)
        own = metrics.retrieval(audio, heard.image, keys[rows], keys, ks=(10,), draws=0)
        return {"same_object_r1": float((objects[nearest] == objects[rows]).mean()), "a2v_r10": own["r10"]}

    rows = np.unique(table["row"].to_numpy())
    figures: dict[str, Any] = {"clips": len(rows), "clean": found(heard.audio[rows], rows)}
    for kind, levels in DISTURBANCES.items():
        figures[kind] = {}
        for level in levels:
            part = table.filter((pc.field("kind") == kind) & (pc.field("level") == level)).sort_by("row")
            figures[kind][f"{level:g}"] = found(_matrix(part["audio"]), part["row"].to_numpy())
    return figures


def picture_figures(out: str, clips: EvaluatedClips, heard: Heard, attributes: Sequence[str]) -> dict[str, Any]:
    """All figures of the painted pictures; attributes: what the judge has read."""
    columns = ["case", "condition", "row", "picture_row", *ATTRIBUTES, "clip_feature"]
    by_condition: dict[str, Rows] = {}
    painted = storage.read_table(storage.join(out, PICTURES), columns).sort_by("case")
    for row in painted.to_pylist():
        by_condition.setdefault(row["condition"], []).append(row)
    figures: dict[str, Any] = {
        name: {"pictures": len(rows)} for name, rows in by_condition.items() if name not in ("loudness", "caption")
    }
    if attributes:
        for name, found in judge_figures(by_condition, clips.labels, heard.rms_db, attributes).items():
            figures[name] = figures.get(name, {}) | found if isinstance(found, dict) else found
    for name, found in keeping_figures(out, by_condition, clips.labels).items():
        figures[name] |= found
    for name in ("edit", "stylize"):
        if (noise := figures.pop(f"{name}{FROM_NOISE}", None)) is not None:
            figures.setdefault(name, {})["from_noise"] = noise
    return {"pictures": len(painted), **figures, "clip": clip_figures(by_condition, clips.labels, heard, out)}


def keeping_figures(
    out: str, by_condition: Mapping[str, Rows], labels: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """given_nearer and outside_distance of the conditions that change a given picture (see aai.keeping)."""
    names = [name for name in REPAINTED if name in by_condition]
    if not names:
        return {}
    table = storage.read_table(storage.join(out, PICTURES), ["case", "png"])
    painted = dict(zip(table["case"].to_pylist(), table["png"].to_pylist(), strict=True))
    files = storage.list_files(storage.join(out, INPUTS), ".parquet")
    shown = pa.concat_tables([storage.read_table(file, ["row", "frame"]) for file in files])
    frames = dict(zip(shown["row"].to_pylist(), shown["frame"].to_pylist(), strict=True))
    figures: dict[str, dict[str, float]] = {}
    for name in names:
        rows = by_condition[name]
        of = [row["picture_row"] for row in rows]
        ours = np.stack([_pixels(painted[row["case"]]) for row in rows])
        given = np.stack([_pixels(frames[row]) for row in of])
        places = [ATTRIBUTES.index(attribute) for attribute in KEPT[name]]
        kept = [tuple(labels[row][place] for place in places if place < len(labels[row])) for row in of]
        place = REPAINTED[name]
        changes, wanted = [labels[row][place] for row in of], [labels[row["row"]][place] for row in rows]
        by = keeping.contours if name.startswith("stylize") else keeping.colours
        found = {"given_nearer": keeping.given_nearer(ours, given, of, kept, changes, wanted, by)}
        if name == "edit" and all(len(labels[row]) > REGION for row in of):
            found["outside_distance"] = keeping.outside_distance(ours, given, [labels[row][REGION] for row in of])
        figures[name] = {key: value for key, value in found.items() if value is not None}
    return figures


def _pixels(data: bytes) -> np.ndarray:
    return keeping.as_pixels(Image.open(io.BytesIO(data)))


def judge_figures(
    by_condition: Mapping[str, Rows], labels: Sequence[Sequence[str]], rms_db: np.ndarray, attributes: Sequence[str]
) -> dict[str, Any]:
    """What the judge read against the labels (object, ambience, medium, size) of the clips. rms_db: of the clips."""
    truth = [dict(zip(ATTRIBUTES, row, strict=False)) for row in labels]
    figures: dict[str, Any] = {"chance": _chance(truth, attributes)}
    for name, seen in by_condition.items():
        heard = [truth[row["row"]] for row in seen]
        if name == "caption":
            words = [a for a in ATTRIBUTES[:3] if a in attributes]
            figures["foundation"] = {f"caption_{a}": grading.accuracy(seen, heard, a) for a in words}
            figures["foundation"]["caption_pictures"] = len(seen)
        elif name != "loudness":
            asked = (ATTRIBUTES[REPAINTED[name]],) if name in REPAINTED else ("object", "ambience", *UNCAPTIONED)
            labelled = [a for a in asked if a in attributes and all(a in row for row in truth)]
            figures[name] = {a: grading.accuracy(seen, heard, a) for a in labelled}
    if "sketch" in figures:
        figures["sketch"]["medium"] = float(np.mean([row["medium"] == "sketch" for row in by_condition["sketch"]]))
    for name, kept in KEPT.items():
        if name in figures and set(kept) <= set(attributes):
            seen = by_condition[name]
            given = [truth[row["picture_row"]] for row in seen]
            figures[name]["kept"] = grading.kept(seen, given, kept)
            figures[name] |= {f"kept_{a}": grading.accuracy(seen, given, a) for a in kept}
    figures |= beyond_captions(by_condition, labels, truth, attributes)
    if "sound" in figures and "size" in attributes:
        sound = by_condition["sound"]
        loudness_db, sizes = rms_db[[row["row"] for row in sound]], np.array([row["size"] for row in sound])
        if len(sound) > 2 and np.ptp(sizes) > 0 and np.ptp(loudness_db) > 0:  # else no figure: a gate on it fails
            figures["loudness_size_spearman"] = metrics.spearman(loudness_db, sizes)
    return figures


def beyond_captions(
    by_condition: Mapping[str, Rows],
    labels: Sequence[Sequence[str]],
    truth: Sequence[Mapping[str, str]],
    attributes: Sequence[str],
) -> dict[str, Any]:
    """Of the toy world: what captions do not name, two objects, and what no training clip has."""
    if "second" not in attributes or any(len(row) <= NOVELTY for row in labels) or "sound" not in by_condition:
        return {}
    rows = {"sound": "sound", "nearest_caption": "nearest_caption", "ceiling": "full_caption"}
    seen = {name: by_condition[condition] for name, condition in rows.items() if condition in by_condition}
    alone = {name: [row for row in found if truth[row["row"]]["second"] == "none"] for name, found in seen.items()}
    uncaptioned: dict[str, dict[str, Any]] = {}
    for attribute in UNCAPTIONED:
        true = [truth[row["row"]] for row in alone["sound"]]
        uncaptioned[attribute] = {"chance": _commonest(true, attribute)} if true else {}
        for name, found in alone.items():
            if found:
                right = grading.accuracy(found, [truth[row["row"]] for row in found], attribute)
                uncaptioned[attribute][name] = right
    if "nearest_caption" in alone:
        uncaptioned["above_nearest_caption"] = _above(alone["sound"], alone["nearest_caption"], truth)
    both = {name: share for name, found in seen.items() if (share := _both_seen(found, truth)) is not None}
    return {"uncaptioned": uncaptioned, "two_objects": both, "unseen": _unseen(alone["sound"], labels, truth)}


def _above(ours: Rows, theirs: Rows, truth: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Paired difference of the shares of UNCAPTIONED attributes that pictures show; low: of its interval."""
    shares: list[dict[int, float]] = []
    for found in (ours, theirs):
        of = [truth[row["row"]] for row in found]
        right = np.mean([grading.hits(found, of, name) for name in UNCAPTIONED], axis=0)
        shares.append({row["row"]: float(share) for row, share in zip(found, right, strict=True)})
    clips = sorted(shares[0].keys() & shares[1].keys())
    if not clips:
        return {}
    mine, others = (np.array([side[clip] for clip in clips]) for side in shares)
    paired = metrics.paired_difference(mine, others)
    return {**paired, "low": paired["ci95"][0]}


def _both_seen(found: Rows, truth: Sequence[Mapping[str, str]]) -> float | None:
    """Share of pictures of two-object clips that show both, in whatever order."""
    hits = []
    for row in found:
        true = truth[row["row"]]
        if true["second"] != "none":
            hits.append({row["object"], row["second"]} == {true["object"], true["second"]})
    return float(np.mean(hits)) if hits else None


def _unseen(
    found: Rows, labels: Sequence[Sequence[str]], truth: Sequence[Mapping[str, str]]
) -> dict[str, dict[str, float]]:
    """What is right of clips of one object that are new in one way, beside those that are not."""
    groups: dict[str, Rows] = {}
    for row in found:
        groups.setdefault(labels[row["row"]][NOVELTY], []).append(row)
    figures: dict[str, dict[str, float]] = {}
    for name, rows in sorted(groups.items()):
        true = [truth[row["row"]] for row in rows]
        shares = {a: grading.accuracy(rows, true, a) for a in ("object", "ambience", *UNCAPTIONED)}
        figures[name] = {**shares, "pictures": len(rows)}
    return figures


def _chance(truth: Sequence[Mapping[str, str]], attributes: Sequence[str]) -> dict[str, float]:
    """What naming the commonest value for every picture reaches, of each attribute that is labelled and read."""
    labelled = [row for row in truth if "object" in row]
    chance = {}
    for name in ("object", "ambience", "medium", *UNCAPTIONED):
        if name in attributes and labelled and all(name in row for row in labelled):
            chance[name] = _commonest(labelled, name)
    return chance


def _commonest(truth: Sequence[Mapping[str, str]], attribute: str) -> float:
    """Share of the clips that have the value that most of them have."""
    shares = []
    for value in {row[attribute] for row in truth}:
        shares.append(grading.accuracy([{attribute: value}] * len(truth), truth, attribute))
    return max(shares)


def class_features(labels: Sequence[Sequence[str]], out: str) -> tuple[list[str], torch.Tensor]:
    """The classes and the CLIP features [C, D] of their prompts."""
    names, features = class_names(labels), {}
    if names:
        texts = storage.read_table(storage.join(out, TEXTS)).to_pylist()
        features = {row["text"]: row["feature"] for row in texts}
    return names, torch.tensor([features[grading.class_prompt(name)] for name in names])


def clip_figures(
    by_condition: Mapping[str, Rows], labels: Sequence[Sequence[str]], heard: Heard, out: str
) -> dict[str, Any]:
    """AIC, AIS, IIS and CLIP-MMD of the pictures under every condition that fills one prompt."""
    names, classes = class_features(labels, out)
    audio, image = torch.from_numpy(heard.audio), torch.from_numpy(heard.image)
    found: dict[str, Any] = {}
    for condition, rows in by_condition.items():
        if condition == "loudness" or condition in REPAINTED:
            continue
        painted = torch.tensor([row["clip_feature"] for row in rows])
        of = [row["row"] for row in rows]
        found[condition] = {
            "ais": grading.similarity_rank(painted, audio[of], audio),
            "iis": grading.similarity_rank(painted, image[of], image),
            "clip_mmd": grading.clip_mmd(painted, image),
        }
        labelled = [i for i, row in enumerate(of) if labels[row]]
        if labelled:
            wanted = [names.index(labels[of[i]][0]) for i in labelled]
            found[condition] = {"aic": grading.zero_shot(painted[labelled], classes, wanted), **found[condition]}
    return found


def class_names(labels: Sequence[Sequence[str]]) -> list[str]:
    """The first labels that occur, sorted."""
    return sorted({row[0] for row in labels if row})


def foundation_figures(out: str, labels: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Judge and CLIP on true held-out frames of the toy world, and the size of its weights."""
    rows = storage.read_table(storage.join(out, FRAMES)).to_pylist()
    truth = [labels[row["row"]][0] for row in rows]
    return {
        "frames": len(rows),
        "judge_object": float(np.mean([row["object"] == name for row, name in zip(rows, truth, strict=True)])),
        "clip_object": float(
            np.mean([OBJECTS[row["clip_class"]] == name for row, name in zip(rows, truth, strict=True)])
        ),
        "weights_mb": sum(file.stat().st_size for file in TOY_WEIGHTS.rglob("*.safetensors")) / 1e6,
    }
