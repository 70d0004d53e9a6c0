"""The first half of an evaluation: every held-out clip is heard once, on the workers' device.

heard/NAME.parquet   embeddings of the shard's clips
disturbed/NAME.parquet   of some of them, as worse recordings have them
inputs/NAME.parquet  sound and picture of those that are painted
frames/NAME.parquet  what judge and CLIP see in true frames
texts/NAME.parquet   embedded texts
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.disturbances import DISTURBANCES, disturbed
from aai.encoders.aligner import embed, embed_files, load_aligner
from aai.encoders.audio import fit_length
from aai.foundation.clip import FrozenClip
from aai.grading import class_prompt
from aai.media.waveform import read_sound
from aai.toy.grammar import OBJECTS
from pipelines.engine.shards import Result
from pipelines.evaluation.clips import ClipPlace, ListenShard
from pipelines.evaluation.judges import JudgeConfig, load_judge

HEARD, DISTURBED, INPUTS, FRAMES, TEXTS = "heard", "disturbed", "inputs", "frames", "texts"
AT_ONCE = 64
"""Clips that are disturbed together."""
_VECTOR = pa.list_(pa.float32())
HEARD_TABLE = pa.schema(
    [
        ("row", pa.int32()),
        ("caption", pa.string()),
        ("audio", _VECTOR),  # aligned embedding of the sound, unit norm
        ("image", _VECTOR),  # mean CLIP feature of the pictures, unit norm
        ("text", _VECTOR),  # mean CLIP feature of the captions, unit norm
        ("rms_db", pa.float64()),
        ("alone_max_abs", pa.float64()),  # difference to the embedding computed alone; null = not tried
    ]
)
DISTURBED_TABLE = pa.schema([("row", pa.int32()), ("kind", pa.string()), ("level", pa.float64()), ("audio", _VECTOR)])
INPUT_TABLE = pa.schema(
    [
        ("row", pa.int32()),
        ("clip_id", pa.string()),
        ("caption", pa.string()),
        ("labels", pa.list_(pa.string())),
        ("audio", pa.binary()),
        ("frame", pa.binary()),
    ]
)
FRAME_TABLE = pa.schema(
    [("row", pa.int32()), ("frame", pa.int32()), ("object", pa.string()), ("clip_class", pa.int32())]
)
TEXT_TABLE = pa.schema([("text", pa.string()), ("feature", _VECTOR)])


class ListenWorker:
    """Holds aligner, CLIP and judge; hears one shard of clips."""

    def __init__(
        self,
        bundle: str,
        out: str,
        judge: dict[str, Any],
        device: str,
        graded_frames_every: int,
        disturbed_every: int = 0,
    ) -> None:
        """graded_frames_every: one true frame in so many is shown to judge and CLIP; disturbed_every: one held-out clip
        in so many is also heard disturbed; 0 = none."""
        opened = read_bundle(bundle)
        self.out, self.every, self.disturbed_every = out, graded_frames_every, disturbed_every
        self.aligner = load_aligner(opened).to(device)
        self.clip = FrozenClip(opened.config.foundation, device)
        self.judge = load_judge(JudgeConfig.parse(judge), device)
        self.classes = self.clip.texts([class_prompt(name) for name in OBJECTS]).cpu()

    def __call__(self, shard: ListenShard) -> Result:
        """Writes the shard's tables; heard/ comes last, when it is there all are."""
        table = storage.read_rows(
            shard.features,
            [place.at for place in shard.clips],
            ["clip_id", "caption", "labels", "audio", "image_features", "text_features"],
        )
        if shard.clips[0].clips_file:
            frames = self._frames(shard.clips)
            self._write_inputs(shard, table, frames)
            if self.every:
                self._write_frames(shard, frames)
            if self.disturbed_every:
                self._write_disturbed(shard, table)
        if shard.texts:
            features = self.clip.texts(shard.texts).cpu().tolist()
            rows = [{"text": text, "feature": feature} for text, feature in zip(shard.texts, features, strict=True)]
            self._write(TEXTS, shard, rows, TEXT_TABLE)
        self._write_heard(shard, table)
        return Result(rows=len(shard.clips))

    def _write(self, folder: str, shard: ListenShard, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
        table = pa.Table.from_pylist(rows, schema=schema)
        # Small row groups: painting reads single clips.
        storage.write_table(storage.join(self.out, folder, f"{shard.name}.parquet"), table, row_group_size=16)

    def _frames(self, places: list[ClipPlace]) -> list[list[bytes]]:
        """The pictures of each clip, read by file."""
        found: dict[int, list[bytes]] = {}
        for file in sorted({str(place.clips_file) for place in places}):
            here = [place for place in places if place.clips_file == file]
            rows = storage.read_rows(file, [place.clips_at for place in here], ["frames"])["frames"].to_pylist()
            found |= dict(zip([place.row for place in here], rows, strict=True))
        return [found[place.row] for place in places]

    def _write_inputs(self, shard: ListenShard, table: pa.Table, frames: list[list[bytes]]) -> None:
        rows = []
        for number, (place, pictures) in enumerate(zip(shard.clips, frames, strict=True)):
            if place.painted:
                clip = table.select(["clip_id", "caption", "labels", "audio"]).slice(number, 1).to_pylist()[0]
                rows.append(clip | {"row": place.row, "frame": pictures[len(pictures) // 2]})
        self._write(INPUTS, shard, rows, INPUT_TABLE)

    def _write_frames(self, shard: ListenShard, frames: list[list[bytes]]) -> None:
        """Shows an even sample of true frames to the judge and the CLIP."""
        rows, pictures = [], []
        for place, data in zip(shard.clips, frames, strict=True):
            for number in range(len(data)):
                if (place.row * len(data) + number) % self.every == 0:
                    rows.append({"row": place.row, "frame": number})
                    pictures.append(Image.open(io.BytesIO(data[number])).convert("RGB"))
        if rows and self.judge is not None:
            nearest = (self.clip.images(pictures).cpu() @ self.classes.T).argmax(-1).tolist()
            for row, seen, found in zip(rows, self.judge.read(pictures), nearest, strict=True):
                row |= {"object": seen["object"], "clip_class": found}
        self._write(FRAMES, shard, rows, FRAME_TABLE)

    def _write_disturbed(self, shard: ListenShard, table: pa.Table) -> None:
        """Hears some clips again under every disturbance; the first clip's number is the seed."""
        chosen = [i for i, place in enumerate(shard.clips) if place.row % self.disturbed_every == 0]
        config, device = self.aligner.config, next(self.aligner.parameters()).device
        rows: list[dict[str, Any]] = []
        for at in range(0, len(chosen), AT_ONCE):
            some = chosen[at : at + AT_ONCE]
            waves = [torch.from_numpy(read_sound(table["audio"][i].as_py())) for i in some]
            batch = torch.stack([fit_length(wave, config.clip_samples) for wave in waves]).to(device)
            for kind, levels in DISTURBANCES.items():
                for level in levels:
                    changed = disturbed(batch, kind, level, config.sample_rate_hz, shard.clips[some[0]].row)
                    for i, vector in zip(some, embed(self.aligner, changed).tolist(), strict=True):
                        rows.append({"row": shard.clips[i].row, "kind": kind, "level": level, "audio": vector})
        self._write(DISTURBED, shard, rows, DISTURBED_TABLE)

    def _write_heard(self, shard: ListenShard, table: pa.Table) -> None:
        sounds = table["audio"].to_pylist()
        audio = embed_files(self.aligner, sounds)
        gaps: list[float | None] = [None] * len(sounds)
        if shard.alone:
            alone = embed_files(self.aligner, sounds[: shard.alone], batch_size=1)
            gaps[: len(alone)] = np.abs(alone - audio[: len(alone)]).max(1).tolist()
        image, text = (mean_vectors(table, name, self.clip.dim) for name in ("image_features", "text_features"))
        rows = []
        for i, place in enumerate(shard.clips):
            vectors = {"audio": audio[i].tolist(), "image": image[i].tolist(), "text": text[i].tolist()}
            loudness_db = rms_db(read_sound(sounds[i]))
            caption = table["caption"][i].as_py()
            rows.append(
                {"row": place.row, "caption": caption, **vectors, "rms_db": loudness_db, "alone_max_abs": gaps[i]}
            )
        self._write(HEARD, shard, rows, HEARD_TABLE)


def rms_db(audio: np.ndarray) -> float:
    """Loudness of a waveform in dB full scale."""
    return float(10 * np.log10(np.mean(np.square(audio)) + 1e-10))


def mean_vectors(table: pa.Table, column: str, dim: int) -> np.ndarray:
    """Mean unit feature [N, dim] of a flattened [N, K * dim] column."""
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    mean = flat.reshape(len(table), -1, dim).mean(1)
    norm = np.linalg.norm(mean, axis=1, keepdims=True)
    return np.asarray(mean / np.where(norm > 0, norm, 1))  # 0 where a clip has no picture
