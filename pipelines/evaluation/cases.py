"""The pictures of an evaluation: which are painted, and the worker that paints and reads them.

Each shard of cases becomes one Parquet file with the picture, what was read off it, and its CLIP feature.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aai import storage
from aai.addons import AddOns
from aai.bundle import BundleConfig, read_bundle
from aai.conditions import CONDITIONS, SKETCH, Conditions, HeldOutClip
from aai.errors import UserError
from aai.foundation.clip import FrozenClip
from aai.media.waveform import read_sound
from aai.painter import Painter
from aai.png import encode_png
from aai.sampling import PaintRequest
from pipelines.engine.shards import Result, Shard
from pipelines.evaluation.judges import ATTRIBUTES, JudgeConfig, known_objects, load_judge
from pipelines.evaluation.listening import HEARD, INPUTS

PICTURES = "pictures"
FROM_NOISE = "_from_noise"
REPAINTED = {"edit": 0, "stylize": 1, f"edit{FROM_NOISE}": 0, f"stylize{FROM_NOISE}": 1}
"""Conditions that change a given picture: the place of the label in which picture and sound differ. Those from noise
are told what the picture shows, and never see it: what they keep is no keeping."""
NEEDED = {
    "sketch": "medium",
    "edit": "object",
    "stylize": "ambience",
    "edit_from_noise": "object",
    "stylize_from_noise": "ambience",
    "loudness": "size",
    "full_caption": "colour",
}
"""Conditions whose figures only a judge can give, and what it must read."""
SEEDS_APART = 1_000_000
"""Between the pictures of two evaluations' seeds."""
PICTURE_TABLE = pa.schema(
    [
        ("case", pa.int32()),
        ("condition", pa.string()),
        ("row", pa.int32()),  # the test clip whose truth the picture is held against
        ("audio_row", pa.int32()),  # the test clip that is heard
        ("picture_row", pa.int32()),  # the test clip whose frame is edited; -1 = none
        ("seed", pa.int64()),
        ("gain_db", pa.float32()),
        ("object", pa.string()),  # as the judge reads the picture
        ("ambience", pa.string()),
        ("medium", pa.string()),
        ("size", pa.float32()),
        ("colour", pa.string()),
        ("count", pa.string()),
        ("place", pa.string()),
        ("second", pa.string()),
        ("clip_feature", pa.list_(pa.float32())),
        ("png", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Case:
    """One picture: a condition, the test clip it is about, whose sound is heard, maybe a given picture, a seed."""

    case: int
    condition: str
    row: int
    audio_row: int
    seed: int
    picture_row: int = -1
    gain_db: float = 0.0

    @property
    def rows(self) -> set[int]:
        """The test clips whose sound or frame the picture needs."""
        return {self.row, self.audio_row, self.picture_row} - {-1}


@dataclass(frozen=True, kw_only=True)
class PictureShard(Shard):
    """Pictures of one condition, and where the clips they need lie."""

    cases: list[Case]
    inputs: dict[str, list[int]]
    """{file: rows there}."""


def check_conditions(
    pictures: Mapping[str, int], labels: Sequence[Sequence[str]], judge: JudgeConfig, bundle: BundleConfig
) -> None:
    """Raises UserError for a condition that would be painted and yield no figure, with the reason."""
    words = [name for name in ATTRIBUTES[:3] if name in judge.attributes]
    if any(len(row) < len(words) for row in labels):
        rule = f"reads {', '.join(words)}, but clips have {min(map(len, labels))} labels"
        raise UserError("judge.model", judge.model, rule, "set judge.model=none, or label the clips")
    objects = {row[0] for row in labels} if words else set()
    known = known_objects(judge)
    if known is not None and (unknown := sorted(objects - known)):
        rule = f"does not know {unknown[0]!r} ({len(unknown)} of {len(objects)} labels)"
        raise UserError("judge.model", judge.model, rule, "map its classes with judge.names, or set judge.model=none")
    for name in pictures:
        key = f"pictures.{name}"
        if name not in (*CONDITIONS, *REPAINTED):
            raise UserError(key, pictures[name], "no such condition", f"one of {', '.join((*CONDITIONS, *REPAINTED))}")
        if name in NEEDED and NEEDED[name] not in judge.attributes:
            rule = f"is graded by the {NEEDED[name]} in the picture, which judge {judge.model} does not read"
            raise UserError(key, pictures[name], rule, "leave the condition out, or give another judge.model")
        if name == "sketch" and not re.match(bundle.head_pattern, SKETCH):
            rule = f"asks for {SKETCH!r}, a head that the bundle's head_pattern {bundle.head_pattern!r} does not know"
            raise UserError(key, pictures[name], rule, "leave the condition out")
        if name == "full_caption" and any(len(row) < len(ATTRIBUTES) for row in labels):
            rule = f"paints a text that names {', '.join(ATTRIBUTES)}, but clips have {min(map(len, labels))} labels"
            raise UserError(key, pictures[name], rule, "leave the condition out")
        if name in REPAINTED:
            place = REPAINTED[name]
            values = {row[place] for row in labels if len(row) > place}
            if len(values) < 2 or any(len(row) <= place for row in labels):
                rule = f"needs clips that differ in label {place + 1}; found {len(values)} values"
                raise UserError(key, pictures[name], rule, "leave the condition out, or label the clips")
            if bundle.vocabulary is None:
                rule = "needs the bundle's vocabulary, which is absent"
                raise UserError(key, pictures[name], rule, "leave it out, or give adapt a `vocabulary`")


def make_cases(labels: Sequence[Sequence[str]], counts: Mapping[str, int], seed: int = 0) -> list[Case]:
    """All cases of an evaluation, deterministic in the seed.

    labels: per test clip (object, ambience, medium, size) or any labels; counts: pictures per condition.
    Edits pair a sound with a picture of another object, stylizations with a picture of another ambience.
    """
    rng = np.random.default_rng(seed)
    rows = len(labels)
    order = rng.permutation(rows)
    cases: list[Case] = []
    for condition, count in counts.items():
        place = REPAINTED.get(condition)
        values = np.array([row[place] for row in labels]) if place is not None else None
        draw = np.random.default_rng((seed, place or 0))  # edit and edit_from_noise are given the same pictures
        for i in range(count):
            row = int(order[i % rows])
            heard, given = row, -1
            if condition == "shuffled_audio":
                heard = int(order[(i + rows // 2) % rows])
            if values is not None:
                given = int(draw.choice(np.flatnonzero(values != values[row])))
            cases.append(Case(len(cases), condition, row, heard, seed * SEEDS_APART + i, given))
    return cases


def loudness_cases(rows: Sequence[int], gains_db: Sequence[float], first: int, seed: int = 0) -> list[Case]:
    """One sound at several gains, painted from one seed: the loudness series of the report."""
    cases: list[Case] = []
    for row in rows:
        for gain_db in gains_db:
            noise = seed * SEEDS_APART + 7
            cases.append(Case(first + len(cases), "loudness", row, row, noise, gain_db=gain_db))
    return cases


def picture_shards(cases: Sequence[Case], cases_per_shard: int, out: str) -> list[PictureShard]:
    """Units of painting: cases of one condition each. The inputs in `out` must have been written."""
    places: dict[int, tuple[str, int]] = {}
    for file in storage.list_files(storage.join(out, INPUTS), ".parquet"):
        rows = storage.read_table(file, ["row"])["row"].to_pylist()
        places |= {row: (file, at) for at, row in enumerate(rows)}
    by_condition: dict[str, list[Case]] = {}
    for case in cases:
        by_condition.setdefault(case.condition, []).append(case)
    shards = []
    for condition, group in by_condition.items():
        for start in range(0, len(group), cases_per_shard):
            part = group[start : start + cases_per_shard]
            inputs: dict[str, list[int]] = {}
            for row in sorted(set().union(*(case.rows for case in part))):
                file, at = places[row]
                inputs.setdefault(file, []).append(at)
            shards.append(PictureShard(name=f"{condition}-{start:05d}", rows=len(part), cases=part, inputs=inputs))
    return shards


class PictureWorker:
    """Paints one shard of cases and reads the pictures (see pipelines.engine.shards.Worker)."""

    def __init__(
        self,
        bundle: str,
        out: str,
        judge: dict[str, Any],
        request: dict[str, Any],
        addons: dict[str, Any],
        device: str,
        dtype: str,
    ) -> None:
        """bundle: folder; out: of the evaluation, where the clips have been heard."""
        opened = read_bundle(bundle)
        self.out, self.request = out, PaintRequest.parse(request, "evaluate.request")
        self.painter = Painter.load(opened, device, dtype, AddOns.parse(addons, "evaluate.addons"))
        self.clip = FrozenClip(opened.config.foundation, device)
        self.judge = load_judge(JudgeConfig.parse(judge), device)
        files = [file for file in storage.list_files(storage.join(out, HEARD)) if "/train-" in file]
        train = pa.concat_tables([storage.read_table(file, ["caption", "audio"]) for file in files])
        audio_mean = torch.tensor(np.array(train["audio"].to_pylist(), np.float32).mean(0), device=device)
        self.conditions = Conditions(self.painter, self.clip, train["caption"].to_pylist(), audio_mean)

    def __call__(self, shard: PictureShard) -> Result:
        """Paints and reads the shard's pictures -> pictures/NAME.parquet."""
        clips: dict[int, dict[str, Any]] = {}
        for file, places in shard.inputs.items():
            clips |= {row["row"]: row for row in storage.read_rows(file, places).to_pylist()}
        cases = shard.cases
        condition = cases[0].condition
        heard = [_audio(clips[case.audio_row]["audio"], case.gain_db) for case in cases]
        seeds = [case.seed for case in cases]
        if condition in REPAINTED:
            images = [_picture(clips[case.picture_row]["frame"]) for case in cases]
            verb = condition.removesuffix(FROM_NOISE)
            target, source = self.painter.embed_repaint(verb, heard, images)
            if condition == verb:
                pictures = self.painter.repaint(verb, target, source, images, seeds, self.request)
            else:
                pictures = self.painter.paint(target, seeds, self.request)
        else:
            tests = [
                HeldOutClip(audio, clips[case.row]["caption"], case.seed, clips[case.row]["labels"])
                for audio, case in zip(heard, cases, strict=True)
            ]
            embeds = self.conditions.embed("sound" if condition == "loudness" else condition, tests)
            pictures = self.painter.paint(embeds, seeds, self.request)
        self._write(shard, pictures)
        return Result(rows=len(cases))

    def _write(self, shard: PictureShard, pictures: list[Image.Image]) -> None:
        features = self.clip.images(pictures).tolist()
        readings: Sequence[Mapping[str, Any]] = self.judge.read(pictures) if self.judge else [{}] * len(pictures)
        rows = []
        for case, picture, seen, feature in zip(shard.cases, pictures, readings, features, strict=True):
            rows.append({**asdict(case), **seen, "clip_feature": feature, "png": encode_png(picture)})
        table = pa.Table.from_pylist(rows, schema=PICTURE_TABLE)
        storage.write_table(storage.join(self.out, PICTURES, f"{shard.name}.parquet"), table)


def _audio(flac: bytes, gain_db: float) -> np.ndarray:
    """Waveform float32 [S], louder or quieter; what goes beyond full scale is clipped."""
    return np.clip(read_sound(flac) * 10 ** (gain_db / 20), -1, 1).astype(np.float32)


def _picture(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg)).convert("RGB")
