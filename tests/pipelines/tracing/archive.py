"""Tables, trainings and versions of a small project: three aligners and adapters on two FeatureTables.

Table one has the clips c0 to c29, table two (another curation) c30 to c59; of each three rows the last is of val. The
aligner learned from table two, and one of its adapters from table one: that has seen both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from aai import storage
from aai.features import FeatureManifest
from aai.schema import CLIP_TABLE
from pipelines.curation.measured import MEASURED_TABLE
from pipelines.registry import origins, tracking, versions
from pipelines.settings import TrackingConfig
from tests.aai import numbered


@dataclass(frozen=True)
class Archive:
    """Where it all lies."""

    folder: Path
    cfg: TrackingConfig
    runs: dict[str, str]
    """{bundle: run that made it}; `broken` made none."""

    def features(self, number: int) -> str:
        """A FeatureTable."""
        return f"{self.folder}/{number}/features"


def write_table(folder: Path, first: int, fingerprint: str) -> None:
    """A curation (accepted, rejected, _measured), and the features and embeddings of what it accepted."""
    rows = [numbered.row(n, "val" if n % 3 == 2 else "train") for n in range(first, first + 30)]
    features = f"{folder}/features"
    numbered.write(Path(features))
    table = storage.read_table(f"{features}/shard-00000.parquet")
    storage.remove(features)
    storage.write_table(f"{features}/shard-00000.parquet", pa.Table.from_pylist(rows, schema=table.schema))
    numbered.write(folder / "scratch")
    manifest = FeatureManifest.read(f"{folder}/scratch")
    storage.remove(f"{folder}/scratch")
    told = {"fingerprint": fingerprint, "input": f"{folder}/curated/accepted"}
    storage.write_json(f"{features}/manifest.json", manifest.model_copy(update=told).model_dump(mode="json"))
    clips = [{"frames": [], "frame_pts_s": [], "flags": [], **row} for row in rows]
    names = [name for name in CLIP_TABLE.names if name in clips[0]]
    accepted = pa.Table.from_pylist(clips, schema=pa.schema([CLIP_TABLE.field(name) for name in names]))
    storage.write_table(f"{folder}/curated/accepted/shard-00000.parquet", accepted)
    refused = {"clip_id": None, "content_hash": f"h{first}x", "uri": f"{first}-torn.mp4", "split": "train"}
    storage.write_table(f"{folder}/curated/rejected/shard-00000.parquet", pa.Table.from_pylist([refused]))
    measured = [{"key": row["uri"], "clip_id": row["clip_id"], "content_hash": row["content_hash"]} for row in rows]
    table = pa.Table.from_pylist(measured, schema=MEASURED_TABLE)
    storage.write_table(f"{folder}/curated/_measured/shard-00000.parquet", table)
    embedded = pa.table({"clip_id": [row["clip_id"] for row in rows], "aligned": [[0.0]] * len(rows)})
    storage.write_table(f"{folder}/features-aligned/ab12/shard-00000.parquet", embedded)


def train(
    cfg: TrackingConfig, stage: str, features: str, fingerprint: str, made: str, parents: Sequence[str] = ()
) -> str:
    """The run that a training leaves; `made` empty = it broke off."""
    params = {"features": features, "fingerprint": fingerprint}
    params |= {"aligned": f"{features}-aligned"} if stage == "adapt" else {}
    try:
        with tracking.run(cfg, stage, params) as run:
            if not made:
                raise KeyboardInterrupt
            run.set_tags({origins.MADE: made, origins.PARENTS: " ".join(parents)})
    except KeyboardInterrupt:
        pass
    return run.run_id


def register(cfg: TrackingConfig, bundle: Path, sha: str, fingerprint: str) -> int:
    """A version that says it is of this bundle."""
    number = versions.register(cfg, bundle, {}, {"data_fingerprint": fingerprint}, anew=True)
    versions.set_version_tags(cfg, number, {versions.SHA_TAG: sha})
    return number


def write_archive(folder: Path, cfg: TrackingConfig, bundle: Path) -> Archive:
    """Makes it all. Versions: 1 (both tables, champion), 2 (table two), 3 (table two, by a release that told less)."""
    archive = Archive(folder, cfg, {})
    for number, first in ((1, 0), (2, 30)):
        write_table(folder / str(number), first, f"f{number}")
    one, two = archive.features(1), archive.features(2)
    told = [
        ("align", two, "f2", "aligner2", ()),
        ("adapt", one, "f1", "both", ("aligner2",)),
        ("adapt", two, "f2", "second", ("aligner2",)),
        ("align", one, "f1", "", ()),
    ]
    for stage, features, fingerprint, made, parents in told:
        archive.runs[made or "broken"] = train(cfg, stage, features, fingerprint, made, parents)
    for sha, fingerprint in (("both", "f1"), ("second", "f2"), ("untold", "f2")):
        register(cfg, bundle, sha, fingerprint)
    versions.set_alias(cfg, "champion", 1)
    return archive
