"""The commands that write tables, in a simulated world: curate, featurize, data compact, data export, evaluate."""

import csv
import hashlib
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from aai import storage
from aai.features import METADATA_KEY, SHAPES_KEY
from aai.media.duplicates import hamming
from aai.schema import CLIP_TABLE
from pipelines import curate, data, evaluate, featurize
from pipelines.curation import measuring, near
from pipelines.engine import columns
from pipelines.engine.shards import Result
from pipelines.evaluation.clips import EvaluatedClips, ListenShard
from pipelines.tables import compact, webdataset
from tests.protocols import OUT, NoBar, Protocol, json_of, rows_of
from tests.simulation import World

# ---------------------------------------------------------------- curate


class StillChild:
    """Decodes nothing: a media file says in JSON what is measured of it."""

    def __init__(self, *_: Any) -> None:
        pass

    def measure(self, content: bytes, *_: Any) -> dict[str, Any]:
        said = json.loads(content)
        sha = hashlib.sha256(content).hexdigest()
        if "code" in said:
            return {"clip_id": sha[:24], "content_hash": sha, "stage": "decode", "message": "torn", "transient": False,
                    **said}  # fmt: skip
        look = hashlib.sha256(str(said["look"]).encode()).digest()
        return {
            "clip_id": sha[:24], "content_hash": sha, "duration_s": said["duration_s"], "width": 64, "height": 64,
            "fps": 8.0, "source_sample_rate_hz": 16_000, "channels": 1, "av_gap_s": 0.0, "rms_db": -20.0,
            "silent_fraction": 0.0, "clipped_fraction": 0.0, "luma_mean": 100.0, "luma_std": 40.0, "motion": 5.0,
            "video_hash": look, "audio_hash": look, "audio": b"flac", "frames": [b"jpeg"], "frame_pts_s": [0.5],
        }  # fmt: skip


def all_near_pairs(prints: Any, cfg: Any) -> np.ndarray:
    """What the search by bands finds, for a handful of clips."""
    video, audio = prints.video, prints.audio
    left, right = np.triu_indices(len(video), 1)
    near_ones = (hamming(video[left], video[right]) <= cfg.max_video_bits) & (
        hamming(audio[left], audio[right]) <= cfg.max_audio_bits
    )
    return np.stack([left, right], axis=1)[near_ones]


class CurateProtocol(Protocol):
    """`curate.run`: the first manifest, a grown one, a shrunk one, other captions, other filters."""

    name = "curate"
    variants = 4

    def __init__(self) -> None:
        settings: dict[str, Any] = {
            "out": OUT, "rows_per_shard": 2, "max_reject_ratio": 1, "decode": {"num_frames": 1, "frame_size_px": 32},
            "rejudge": True, "filters": {"min_size_px": 16},
        }  # fmt: skip
        self.configs = []
        for manifest, shortest_s in (("first", 0.5), ("grown", 0.5), ("shrunk", 0.5), ("first", 1.5)):
            filters = {"min_size_px": 16, "min_duration_s": shortest_s}
            self.configs.append(
                curate.CurateConfig.parse({**settings, "manifest": f"s3://sim/{manifest}.csv", "filters": filters})
            )

    def prepare(self, world: World) -> None:
        clips = {
            "a": {"look": 1, "duration_s": 1.0},
            "b": {"look": 2, "duration_s": 2.0},
            "c": {"look": 1, "duration_s": 3.0},  # a duplicate of a, in another shard
            "d": {"code": "UNREADABLE"},
            "e": {"look": 2, "duration_s": 2.5},  # only in the grown one: a duplicate of b
        }
        for name, said in clips.items():
            storage.write_bytes(f"s3://sim/media/{name}.mp4", json.dumps(said).encode())
        for manifest, names in (("first", "abcd"), ("grown", "abcde"), ("shrunk", "cd")):
            sink = io.StringIO()
            writer = csv.writer(sink)
            writer.writerow(["uri", "caption"])
            writer.writerows([f"s3://sim/media/{name}.mp4", f"{name} of {manifest}"] for name in names)
            storage.write_bytes(f"s3://sim/{manifest}.csv", sink.getvalue().encode())

    def drive(self, variant: int) -> None:
        curate.run(self.configs[variant])

    def marker(self) -> Any:
        return json_of("curate.json", "input", "judge", "rows_in", "accepted", "rejected")

    def state(self) -> Any:
        accepted = rows_of("accepted", "uri", "caption", "clip_id")
        return accepted, rows_of("rejected", "uri", "caption", "code")


# ---------------------------------------------------------------- featurize


class StillFeaturizer:
    """Holds no models; writes what FeaturizeWorker writes, at one stroke as that does."""

    def __init__(self, config: dict[str, Any], digest: str, **_: Any) -> None:
        self.digest = digest

    def __call__(self, shard: featurize.FeaturizeShard) -> Result:
        """Writes the shard's file."""
        clips = storage.read_table(shard.input, ["clip_id", "caption", "split"])
        splits = {split: clips["split"].to_pylist().count(split) for split in set(clips["split"].to_pylist())}
        shapes = {
            "input": shard.fingerprint, "num_frames": 1, "image_dim": 1, "num_texts": 1, "text_dim": 1,
            "latent_shape": [1, 1, 1], "latent_frame": 0, "sample_rate_hz": 16_000, "processor": "none",
            "dtype": "float32", "splits": splits, "enlarged": {},
        }  # fmt: skip
        footer = {METADATA_KEY: self.digest.encode(), SHAPES_KEY: json.dumps(shapes).encode()}
        storage.write_table(shard.output, clips.replace_schema_metadata(footer), compressed=False)
        return Result(rows=len(clips))


class FeaturizeProtocol(Protocol):
    """`featurize.run`, on one table, on one that has grown and on one whose captions have changed."""

    name = "featurize"
    variants = 3

    def __init__(self) -> None:
        self.configs = []
        for number in range(3):
            settings = {"input": f"s3://sim/in-{number}", "out": OUT, "foundation": {"clip": "c", "diffusion": "d"}}
            self.configs.append(featurize.FeaturizeConfig.parse(settings))

    def prepare(self, world: World) -> None:
        for number, clips in enumerate((("ab", "c"), ("ab", "cd", "e"), ("AB", "c"))):
            for shard, names in enumerate(clips):
                table = pa.table(
                    {
                        "clip_id": [name.lower() for name in names],
                        "caption": [f"a {name}" for name in names],
                        "split": ["train"] * len(names),
                        **{name: [1] * len(names) for name in ("frames", "width", "height")},
                    }
                )
                storage.write_table(f"s3://sim/in-{number}/shard-{shard:05d}.parquet", table)

    def drive(self, variant: int) -> None:
        featurize.run(self.configs[variant])

    def marker(self) -> Any:
        return json_of("manifest.json", "input_fingerprint", "rows", "input")

    def state(self) -> Any:
        return rows_of("", "clip_id", "caption")


# ---------------------------------------------------------------- data compact, data export


class CompactProtocol(Protocol):
    """`aai data compact`."""

    name = "compact"

    def __init__(self) -> None:
        self.config = data.DataConfig.parse(
            {"action": "compact", "input": "s3://sim/in", "out": OUT, "rows_per_file": 2}
        )

    def prepare(self, world: World) -> None:
        for shard in range(5):
            storage.write_table(f"s3://sim/in/shard-{shard:05d}.parquet", pa.table({"clip_id": [f"c{shard}"]}))

    def drive(self, variant: int) -> None:
        data.run(self.config)

    def marker(self) -> Any:
        return json_of("compact.json", "rows", "files")

    def state(self) -> Any:
        return rows_of("", "clip_id")


class ExportProtocol(Protocol):
    """`aai data export`."""

    name = "export"

    def __init__(self) -> None:
        settings = {"action": "export", "input": "s3://sim/in", "out": OUT, "shard_mb": 0.012}
        self.config = data.DataConfig.parse(settings)

    def prepare(self, world: World) -> None:
        rows = []
        for number in range(3):
            row = StillChild().measure(json.dumps({"look": number, "duration_s": 1.0}).encode(), None, None)
            rows.append(row | {"uri": f"{number}.mp4", "caption": "", "labels": [], "split": "train", "flags": []})
        storage.write_table("s3://sim/in/shard-00000.parquet", pa.Table.from_pylist(rows, schema=CLIP_TABLE))

    def drive(self, variant: int) -> None:
        data.run(self.config)

    def marker(self) -> Any:
        return json_of("export.json", "clips", "shards")

    def state(self) -> Any:
        return [(file, storage.read_bytes(file)) for file in storage.list_files(OUT, ".tar")]


# ---------------------------------------------------------------- evaluate


class StillListener:
    """Hears nothing; writes the rows of a shard, at one stroke as ListenWorker does."""

    def __init__(self, out: str, **_: Any) -> None:
        self.out = out

    def __call__(self, shard: ListenShard) -> Result:
        """Writes the shard's file."""
        table = pa.table({"row": [clip.row for clip in shard.clips]})
        storage.write_table(f"{self.out}/heard/{shard.name}.parquet", table)
        return Result(rows=shard.rows)


class EvaluateProtocol(Protocol):
    """`evaluate.run`, which listens; with shards of another size every time."""

    name = "evaluate"
    variants = 2

    def __init__(self) -> None:
        self.configs = []
        for size in (2, 3):
            places = {"features": "s3://sim/in", "clips": "s3://sim/in", "bundle": "s3://sim/b", "out": OUT}
            self.configs.append(evaluate.EvaluateConfig.parse({**places, "clips_per_shard": size}))

    def drive(self, variant: int) -> None:
        evaluate.run(self.configs[variant])

    def marker(self) -> Any:
        return json_of("evaluate.json", "retrieval")

    def state(self) -> Any:
        return rows_of("heard", "row")


def _clips(*_: Any) -> EvaluatedClips:
    rows = list(range(5))
    places = {"file": ["f"] * 5, "at": rows, "clips_file": ["f"] * 5, "clips_at": rows, "labels": [["dog"]] * 5}
    return EvaluatedClips(pa.table(places), pa.table({"file": ["f"], "at": [9]}))


def _figures(config: evaluate.EvaluateConfig, clips: EvaluatedClips) -> dict[str, Any]:
    """Of an evaluation that only counts its rows."""
    rows = rows_of("heard", "row")
    storage.write_bytes(f"{config.out}/{evaluate.MARKS}", json.dumps(rows).encode())
    return {"retrieval": {"rows": rows, "same_object_r1": 1, "gallery": 5}, "generation": {"pictures": 0}}


# ---------------------------------------------------------------- what a clip costs


class Inline:
    """A thread pool without threads."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    map = staticmethod(map)

    def submit(self, call: Any, *args: Any) -> Any:
        result = call(*args)
        return SimpleNamespace(result=lambda: result)


class ReadWhole:
    """pyarrow.parquet for files of a SimulatedS3: read in one request, in the thread that asks."""

    ParquetWriter, FileMetaData, write_table = pq.ParquetWriter, pq.FileMetaData, staticmethod(pq.write_table)

    @staticmethod
    def ParquetFile(where: Any, filesystem: Any = None, **_: Any) -> pq.ParquetFile:
        return pq.ParquetFile(pa.BufferReader(filesystem.cat_file(where)) if filesystem else where)

    @classmethod
    def read_table(cls, where: str, columns: list[str] | None = None, filesystem: Any = None, **_: Any) -> pa.Table:
        return cls.ParquetFile(where, filesystem).read(columns, use_threads=False)

    @classmethod
    def read_schema(cls, where: str, filesystem: Any = None) -> pa.Schema:
        return cls.ParquetFile(where, filesystem).schema_arrow

    @classmethod
    def read_metadata(cls, where: str, filesystem: Any = None) -> pq.FileMetaData:
        return cls.ParquetFile(where, filesystem).metadata


def clips_cost_nothing(patch: pytest.MonkeyPatch) -> None:
    """Nothing is decoded, no model is loaded, no card is drawn."""
    for module in (compact, webdataset):
        patch.setattr(module, "tqdm", NoBar)
    for module in (storage, columns, compact, webdataset):
        patch.setattr(module, "pq", ReadWhole)
    for module in (columns, measuring):
        patch.setattr(module, "ThreadPoolExecutor", Inline)
    patch.setattr(measuring, "MediaChild", StillChild)
    patch.setattr(near, "near_pairs", all_near_pairs)
    patch.setattr(curate, "_write_card", lambda *_: None)
    patch.setattr(featurize, "FeaturizeWorker", StillFeaturizer)
    patch.setattr(featurize, "identity", lambda *_: {"clip": "c"})
    patch.setattr(featurize, "picture_sizes", lambda *_: None)
    patch.setattr(featurize, "count_enlarged", lambda *_: None)
    patch.setattr(featurize, "worker_dtype", lambda dtype, *_: dtype)
    manifest = SimpleNamespace(check_sample_rate=lambda *_: None, fingerprint="f", num_frames=1)
    replaced = {
        "read_bundle": lambda *_: SimpleNamespace(sha="b", config=None),
        "FeatureManifest": SimpleNamespace(read=lambda *_: manifest),
        "encoder_config": lambda *_: SimpleNamespace(sample_rate_hz=16_000),
        "find_clips": _clips,
        "check_conditions": lambda *_: None,
        "plan_pictures": lambda *_: ([], {}),
        "paint": lambda *_: None,
        "ListenWorker": StillListener,
        "figures": _figures,
        "headline": lambda *_: "",
        "is_recorded": lambda *_: True,
        "store": SimpleNamespace(check=lambda *_: None),
    }
    for name, value in replaced.items():
        patch.setattr(evaluate, name, value)
