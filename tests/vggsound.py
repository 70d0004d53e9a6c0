"""A data set as VGGSound's downloads lie on disk: its list of YouTube ids, and files of toy scenes named by them."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from aai import storage
from aai.toy.grammar import OBJECTS, Scene
from aai.toy.roster import Clip
from aai.toy.writer import render_clip
from pipelines.manifests.row import ManifestRow
from pipelines.manifests.table import with_val_share

LABELS = dict(
    zip(
        OBJECTS,
        [
            "dog barking",
            "church bell ringing",
            "race car, auto racing",
            "bird chirping, tweeting",
            "alarm clock ringing",
            "playing acoustic guitar",
            "police car (siren)",
            "frog croaking",
            "playing drum kit",
            "train horning",
        ],
        strict=True,
    )
)
"""What VGGSound calls the toy world's objects: verbs and commas, no article, no "a photo of"."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
NAMES = ("{id}_{start:06d}.mp4", "{id}_{start}000_{end}000.mp4", "vggsound_{id}_{start:06d}.mp4", "{id}.mp4")
"""Names that downloaders give a clip; the last one is the whole video."""
DEFECTS = {"missing": "MISSING_FILE", "silent": "SILENT", "small": "TOO_SMALL"}
"""What is wrong with some clips, and the code that each must be rejected with."""
CLIP_S = 10
MOST_DRAWS = 10_000
"""Ids after which one with the wanted split is given up: val_share does not do what it says."""


@dataclass(frozen=True)
class Listed:
    """A clip of the list."""

    video_id: str
    start_s: int
    label: str
    split: str
    """As the list says it: train or test."""
    kept_as: str
    """The split that curate makes of it."""
    name: str
    """Of its file."""
    defect: str | None = None

    @property
    def uri(self) -> str:
        """Relative to the list's folder."""
        return f"vggsound/{self.name}"


def write_vggsound(folder: Path, train: int, val: int, test: int, val_share: float, seed: int = 0) -> list[Listed]:
    """Writes vggsound.csv and vggsound/*.mp4 (256 px, 10 s); some more clips, one of each defect, are to be rejected.

    The ids are drawn so that curate's `val_share` moves just `val` of the clips of train: of a list as short as this
    one it would else move none.
    """
    rng = np.random.default_rng(seed)
    kinds = ["train"] * (train + 1) + ["val"] * (val + 1) + ["test"] * (test + 1)
    defects = dict(zip((train, train + val + 1, len(kinds) - 1), DEFECTS, strict=True))
    rows = []
    for number, kept_as in enumerate(kinds):
        drawn = islice(_draw(rng, number, kept_as, defects.get(number)), MOST_DRAWS)
        rows.append(next(row for row in drawn if _split(folder / row.uri, row.split, val_share) == kept_as))
    for number, row in enumerate(rows):
        if row.defect != "missing":
            storage.write_bytes(str(folder / row.uri), render_clip(_clip(row, number, rng)))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([row.video_id, row.start_s, row.label, row.split] for row in rows)
    storage.write_bytes(str(folder / "vggsound.csv"), text.getvalue().encode())
    return rows


def _draw(rng: np.random.Generator, number: int, kept_as: str, defect: str | None) -> Iterator[Listed]:
    """Rows with one id after the other; the first ones have a file of each form of name."""
    label, split = list(LABELS.values())[number % len(LABELS)], "test" if kept_as == "test" else "train"
    name = NAMES[number if number < len(NAMES) else 0]
    while True:
        start_s = int(rng.integers(1, 400)) if name != "{id}.mp4" else 3
        video_id = "".join(rng.choice(list(LETTERS), 11))
        file = name.format(id=video_id, start=start_s, end=start_s + CLIP_S)
        yield Listed(video_id, start_s, label, split, kept_as, file, defect)


def _split(path: Path, split: str, val_share: float) -> str:
    """What becomes of a row's split."""
    return with_val_share([ManifestRow(uri=storage.absolute(str(path)), split=split)], val_share)[0].split


def _clip(row: Listed, number: int, rng: np.random.Generator) -> Clip:
    """A toy scene of the label, all of the ordinary world."""
    obj = next(name for name, label in LABELS.items() if label == row.label)
    scene = Scene(obj, ("clear", "rain", "night", "snow")[number % 4], "photo", float(rng.random()), number)
    return Clip(
        name=row.name,
        scene=scene,
        sound=scene,
        split=row.split,
        kind="silent" if row.defect == "silent" else "plain",
        duration_s=CLIP_S + (2 * row.start_s if row.name == f"{row.video_id}.mp4" else 0),
        fps=5,
        size_px=128 if row.defect == "small" else 256,
        sample_rate_hz=44_100,
    )
