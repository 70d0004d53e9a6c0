"""The pictures of an evaluation: which are painted, and the worker that paints and reads them.

A case is one picture: a condition, the test clip it is about, whose sound is heard, maybe a given picture, a seed.
Each shard of cases becomes one Parquet file with the picture, what was read off it, and its CLIP feature.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.conditions import Conditions, HeldOutClip
from aai.foundation.clip import FrozenClip
from aai.media.waveform import decode_flac
from aai.painter import Painter, PaintRequest
from aai.png import encode_png
from aai.toy.judge import Judge

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
        ("clip_feature", pa.list_(pa.float32())),
        ("png", pa.binary()),
    ]
)
Case = dict[str, Any]


def make_cases(labels: list[list[str]], counts: dict[str, int], seed: int = 0) -> list[Case]:
    """All cases of an evaluation, deterministic in the seed.

    labels: per test clip (object, ambience, medium, size) or any labels; counts: pictures per condition.
    Edits pair a sound with a picture of another object, stylizations with a picture of another ambience.
    """
    rng = np.random.default_rng(seed)
    rows = len(labels)
    order = rng.permutation(rows)
    cases: list[Case] = []
    for condition, count in counts.items():
        for i in range(count):
            row = int(order[i % rows])
            case = {"condition": condition, "row": row, "audio_row": row, "picture_row": -1, "seed": i, "gain_db": 0.0}
            if condition == "shuffled_audio":
                case["audio_row"] = int(order[(i + rows // 2) % rows])
            if condition in ("edit", "stylize"):
                attribute = 0 if condition == "edit" else 1
                others = [r for r in range(rows) if labels[r][attribute] != labels[row][attribute]]
                case["picture_row"] = int(rng.choice(others))
            cases.append(case)
    return [{"case": i, **case} for i, case in enumerate(cases)]


def loudness_cases(rows: list[int], gains_db: list[float], first: int) -> list[Case]:
    """One sound at several gains, painted from one seed: the loudness series of the report."""
    cases: list[Case] = []
    for row in rows:
        for gain in gains_db:
            base = {"condition": "loudness", "row": row, "audio_row": row, "picture_row": -1, "seed": 7}
            cases.append({"case": first + len(cases), **base, "gain_db": gain})
    return cases


class PictureWorker:
    """Paints one shard of cases and reads the pictures (see pipelines.engine.shards.Worker)."""

    def __init__(
        self, bundle: str, clips: str, train: str, request: dict[str, Any], device: str, dtype: str, judged: bool
    ) -> None:
        """bundle: folder; clips: Parquet file of the test clips (audio, frame, caption); train: of training samples."""
        self.bundle = read_bundle(bundle)
        self.painter = Painter.load(self.bundle, device, dtype)
        self.clip = FrozenClip(self.bundle.config.foundation, device)
        self.judge = Judge.load() if judged else None
        self.request = PaintRequest.parse(request, "evaluate.request")
        self.clips = storage.read_table(clips).to_pylist()
        samples = storage.read_table(train).to_pylist()
        audio = [decode_flac(row["audio"]) for row in samples if row["audio"]]
        self.conditions = Conditions(self.painter, self.clip, [row["caption"] for row in samples], audio)

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        cases = shard["cases"]
        condition = cases[0]["condition"]
        heard = [self._audio(case) for case in cases]
        images = None
        strength = 1.0
        if condition in ("edit", "stylize"):
            images = [self._frame(case["picture_row"]) for case in cases]
            embeds, strength = self.painter.embed_repaint(condition, heard, images)
        else:
            rows = [self.clips[case["row"]] for case in cases]
            tests = [HeldOutClip(a, r["caption"], c["seed"]) for a, r, c in zip(heard, rows, cases, strict=True)]
            embeds = self.conditions.embed("sound" if condition == "loudness" else condition, tests)
        pictures = self.painter.paint(embeds, [c["seed"] for c in cases], self.request, images, strength)
        self._write(shard["out"], cases, pictures)
        return {"rows": len(cases)}

    def _audio(self, case: Case) -> np.ndarray:
        audio = decode_flac(self.clips[case["audio_row"]]["audio"])
        return np.clip(audio * 10 ** (case["gain_db"] / 20), -1, 1).astype(np.float32)

    def _frame(self, row: int) -> Image.Image:
        return Image.open(io.BytesIO(self.clips[row]["frame"])).convert("RGB")

    def _write(self, out: str, cases: list[Case], pictures: list[Image.Image]) -> None:
        features = self.clip.images(pictures).tolist()
        readings = self.judge.read(pictures) if self.judge else [{}] * len(pictures)
        rows = []
        for case, picture, seen, feature in zip(cases, pictures, readings, features, strict=True):
            rows.append({**case, **seen, "clip_feature": feature, "png": encode_png(picture)})
        storage.write_table(out, pa.Table.from_pylist(rows, schema=PICTURE_TABLE))
