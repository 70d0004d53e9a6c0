"""Grades the pictures of an evaluation: by the toy world's judge, and by the frozen CLIP (see docs/evaluation.md)."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from aai import grading, metrics, storage
from aai.align import embed_files, load_aligner
from aai.bundle import Bundle
from aai.foundation.clip import FrozenClip
from aai.foundation.identity import TOY_WEIGHTS
from aai.media.waveform import decode_flac
from aai.toy.grammar import AMBIENCES, MEDIA, OBJECTS
from aai.toy.judge import Judge

Rows = list[dict[str, Any]]


def grade(painted: pa.Table, test: pa.Table, bundle: Bundle, judged: bool) -> dict[str, Any]:
    """All figures of the painted pictures; those of the judge only when it read them."""
    by_condition: dict[str, Rows] = {}
    for row in painted.to_pylist():
        by_condition.setdefault(row["condition"], []).append(row)
    figures = {
        name: {"pictures": len(rows)} for name, rows in by_condition.items() if name not in ("loudness", "caption")
    }
    if judged:
        for name, found in judge_figures(by_condition, test).items():
            figures[name] = figures.get(name, {}) | found if isinstance(found, dict) else found
    return {"pictures": len(painted), **figures, "clip": clip_scores(by_condition, test, bundle)}


def judge_figures(by_condition: dict[str, Rows], test: pa.Table) -> dict[str, Any]:
    """What the judge read against the labels (object, ambience, medium, size) of the clips."""
    names = ("object", "ambience", "medium", "size")
    truth = [dict(zip(names, row, strict=False)) for row in test["labels"].to_pylist()]
    figures: dict[str, Any] = {
        "chance": {"object": 1 / len(OBJECTS), "ambience": 1 / len(AMBIENCES), "medium": 1 / len(MEDIA)}
    }
    for name, seen in by_condition.items():
        heard = [truth[row["row"]] for row in seen]
        if name == "caption":
            figures["foundation"] = {f"caption_{a}": grading.accuracy(seen, heard, a) for a in names[:3]}
            figures["foundation"]["caption_pictures"] = len(seen)
        elif name != "loudness":
            asked = {"edit": ("object",), "stylize": ("ambience",)}.get(name, ("object", "ambience"))
            figures[name] = {a: grading.accuracy(seen, heard, a) for a in asked}
    if "sketch" in figures:
        figures["sketch"]["medium"] = float(np.mean([row["medium"] == "sketch" for row in by_condition["sketch"]]))
    for name, attributes in (("edit", ("ambience", "medium")), ("stylize", ("object", "medium"))):
        if name in figures:
            seen = by_condition[name]
            given = [truth[row["picture_row"]] for row in seen]
            figures[name]["kept"] = grading.kept(seen, given, attributes)
            figures[name] |= {f"kept_{a}": grading.accuracy(seen, given, a) for a in attributes}
    if "sound" in figures:
        sound = by_condition["sound"]
        loudness = np.array([rms_db(decode_flac(test["audio"][row["row"]].as_py())) for row in sound])
        figures["loudness_size_spearman"] = metrics.spearman(loudness, np.array([row["size"] for row in sound]))
    return figures


def grade_foundation(clips: str, max_frames: int, bundle: Bundle, test: pa.Table) -> dict[str, Any]:
    """The judge and the CLIP on held-out frames with known truth, and the size of the toy world's weights."""
    frames = storage.read_table(clips, ["clip_id", "frames", "labels"])
    frames = frames.filter(pc.is_in(frames["clip_id"], test["clip_id"]))
    rows = [
        (data, labels) for row in frames.to_pylist() for data, labels in ((f, row["labels"]) for f in row["frames"])
    ]
    rows = rows[:: max(1, len(rows) // max_frames)]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data, _ in rows]
    truth = [labels[0] for _, labels in rows]
    read = [seen["object"] for seen in Judge.load().read(pictures)]
    clip = FrozenClip(bundle.config.foundation)
    classes = clip.texts([f"a photo of a {name}" for name in OBJECTS])
    return {
        "frames": len(rows),
        "judge_object": float(np.mean([a == b for a, b in zip(read, truth, strict=True)])),
        "clip_object": grading.zero_shot(clip.images(pictures), classes, [OBJECTS.index(name) for name in truth]),
        "weights_mb": sum(file.stat().st_size for file in TOY_WEIGHTS.rglob("*.safetensors")) / 1e6,
    }


def rms_db(audio: np.ndarray) -> float:
    """Loudness of a waveform in dB full scale."""
    return float(10 * np.log10(np.mean(np.square(audio)) + 1e-10))


def clip_scores(by_condition: dict[str, list[dict[str, Any]]], test: pa.Table, bundle: Bundle) -> dict[str, Any]:
    """AIC, AIS, IIS and CLIP-MMD of the pictures from sound and from the true caption."""
    clip = FrozenClip(bundle.config.foundation)
    audio = torch.from_numpy(embed_files(load_aligner(bundle), test["audio"].to_pylist()))
    image = torch.from_numpy(vectors(test, "image_features", clip.dim))
    names = sorted({labels[0] for labels in test["labels"].to_pylist() if labels})
    classes = clip.texts([f"a photo of a {name}" for name in names])
    out: dict[str, Any] = {}
    for condition in ("sound", "ceiling", "shuffled_audio"):
        rows = by_condition.get(condition, [])
        if not rows:
            continue
        painted = torch.tensor([row["clip_feature"] for row in rows])
        of = [row["row"] for row in rows]
        out[condition] = {
            "aic": grading.zero_shot(painted, classes, [names.index(test["labels"][i].as_py()[0]) for i in of]),
            "ais": grading.similarity_rank(painted, audio[of], audio),
            "iis": grading.similarity_rank(painted, image[of], image),
            "clip_mmd": grading.clip_mmd(painted, image),
        }
    return out


def vectors(table: pa.Table, column: str, dim: int) -> np.ndarray:
    """Mean unit feature [N, dim] of a flattened [N, K * dim] column."""
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    mean = flat.reshape(len(table), -1, dim).mean(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))
