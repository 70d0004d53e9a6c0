"""Bundles of meaningless weights, their evaluations, and a registry to promote them in."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from mlflow import MlflowClient
from mlflow.entities import Run

from aai.bundle import Bundle, read_bundle, sign_bundle
from aai.signatures import SigningConfig
from pipelines import promote
from pipelines.__main__ import CONFIGS
from pipelines.evaluation.paired import SCHEMA, as_bytes
from pipelines.promote import PromoteConfig
from pipelines.registry import tracking, versions
from pipelines.registry.evaluations import sealed, tags_of
from pipelines.registry.figures import figure
from pipelines.settings import TrackingConfig
from tests.pipelines.registry.test_versions import make_bundle

GOOD: dict[str, Any] = {
    "retrieval": {
        "overlap": 0,
        "near_overlap": 0,
        "batch_invariance_max_abs": 1e-6,
        "same_object_r1": 0.9,
        "same_object_by_caption": 0.95,
        "a2v": {"ci95": [0.1, 0.2]},
    },
    "generation": {
        "sound": {"object": 0.8, "ambience": 0.8},
        "ceiling": {"object": 0.95, "ambience": 0.95},
        "random_token": {"object": 0.1},
        "uncaptioned": {"above_nearest_caption": {"low": 0.1}},
        "edit": {"given_nearer": 0.9, "from_noise": {"given_nearer": 0.5}},
    },
    "data_fingerprint": "d",
    "config": "c",
}
CLIPS = 200
"""Held-out clips of every evaluation."""


def changed(figures: dict[str, Any]) -> dict[str, Any]:
    """GOOD with some figures changed (None removes one); "__" stands for the dot of their names."""
    evaluation: dict[str, Any] = json.loads(json.dumps(GOOD))
    for name, value in figures.items():
        *path, last = name.split("__")
        place = evaluation
        for part in path:
            place = place[part]
        place[last] = value
        if value is None:
            del place[last]
    return evaluation


def marks_of(evaluation: dict[str, Any]) -> pa.Table:
    """Marks whose means are an evaluation's shares: the first clips are right."""
    shares = {name: figure(evaluation, name) for name in ("retrieval.same_object_r1", "generation.sound.object")}
    rows = []
    for name, share in shares.items():
        if share is not None:
            rows += [{"figure": name, "clip": i, "value": float(i < share * CLIPS)} for i in range(CLIPS)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


class Workshop:
    """A run folder with bundles, their evaluations and a registry."""

    def __init__(self, folder: Path, store: Path) -> None:
        self.folder = folder
        shutil.copy(store, folder / "mlflow.db")
        self.cfg = self.config_of(folder)

    @staticmethod
    def config_of(folder: Path) -> TrackingConfig:
        """The registry in a folder."""
        return TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="promotions", model_name="aai-demo")

    def bundle(self, seed: int, **figures: Any) -> Bundle:
        """A bundle and its evaluation, see `changed`."""
        made = make_bundle(self.folder / str(seed), seed)
        self.sign(seed)
        self.evaluate(seed, **figures)
        return made

    def sign(self, seed: int, key: str = "keys/signing.pem") -> None:
        """Signs a bundle, by default with the key that the demo's settings trust."""
        signing = SigningConfig(private_key=str(self.folder / key), make_key=True)
        sign_bundle(str(self.folder / str(seed) / "bundle"), signing)

    def config(self, seed: int, **settings: Any) -> PromoteConfig:
        """The demo's gates on one of the bundles."""
        places = {
            "run_dir": str(self.folder),
            "bundle": str(self.folder / str(seed) / "bundle"),
            "evaluation": str(self.folder / str(seed) / "evaluate.json"),
            "out": str(self.folder / "promote"),
            "tracking": self.cfg.model_dump(),
        }
        return PromoteConfig.load(CONFIGS / "demo" / "promote.yaml", values=places | settings)

    def promote(self, seed: int, **settings: Any) -> dict[str, Any]:
        """Runs the verb."""
        return promote.run(self.config(seed, **settings))

    def fork(self, name: str) -> "Workshop":
        """The same bundles, with a registry of their own that goes on from here."""
        (self.folder / name).mkdir()
        other = Workshop(self.folder / name, self.folder / "mlflow.db")
        other.folder = self.folder
        return other

    def evaluate(self, seed: int, record: bool = True, **figures: Any) -> dict[str, Any]:
        """An evaluation of a bundle, see `changed`, on record in MLflow."""
        sha = read_bundle(self.folder / str(seed) / "bundle").sha
        found = as_bytes(marks_of(changed(figures)))
        result = sealed(changed(figures) | {"bundle": sha}, found)
        file = self.folder / str(seed) / "evaluate.json"
        file.write_text(json.dumps(result))
        if record:
            with tracking.run(self.cfg, "evaluate", tags=tags_of(result)) as run:
                run.log_bytes("marks.parquet", found)
                run.log_artifact(file)
        return result

    def figure(self, version: int, alias: str = "champion") -> float:
        """The figure a version was promoted by."""
        recorded = json.loads(versions.version_tags(self.cfg, version)[f"metrics-{alias}"])
        return float(recorded["generation.sound.object"])

    def aliases(self) -> dict[str, int]:
        """All aliases now."""
        return versions.aliases(self.cfg, self.cfg.model_name)

    def audits(self) -> list[Run]:
        """The audit runs, oldest first."""
        client = MlflowClient(self.cfg.uri)
        experiment = client.get_experiment_by_name("promotions")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
        return [run for run in runs if run.info.run_name == "promotion"]
