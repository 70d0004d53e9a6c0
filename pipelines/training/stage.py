"""What `aai align` and `aai adapt` share: skip what is done, refuse what does not fit, train, keep the result.

OUT holds the bundle, history.jsonl and, written last, NAME.json; a folder with NAME.json is finished.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from typing import Any

import pydantic

from aai import storage
from aai.bundle import Bundle
from aai.errors import UserError
from aai.features import FeatureManifest
from aai.fit import FitConfig, State, local_batch_size
from aai.foundation.identity import FoundationSpec, identity
from pipelines.registry import tracking
from pipelines.settings import Plan, TrackingConfig, VerbConfig
from pipelines.training import ray_train

log = logging.getLogger(__name__)


class StageConfig(VerbConfig):
    """Settings of every training stage."""

    features: str
    """Folder or s3:// prefix of the FeatureTable."""
    out: str
    """Folder or s3:// prefix for the bundle, the history and the figures."""
    fit: FitConfig = FitConfig()
    tracking: TrackingConfig = TrackingConfig()
    cache_mb: int = pydantic.Field(1024, ge=1)
    """Memory of each worker for decoded clips."""

    def plan_stage(self, name: str, **inputs: str) -> Plan:
        """The plan of the stage `name`; `inputs` besides the features."""
        outputs = {"bundle": bundle_dir(self.out), "figures": storage.join(self.out, f"{name}.json")}
        return Plan(inputs={"features": self.features, **inputs}, outputs=outputs, resources=self.resources())

    def content_digest(self, fields: set[str], **data: str) -> str:
        """Of everything that determines the weights: the settings `fields`, the number of workers, and the data."""
        settings = {**self.model_dump(mode="json", include=fields), "workers": self.cluster.num_workers, **data}
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def bundle_dir(out: str) -> str:
    """Where a stage with output `out` puts its bundle."""
    return storage.join(out, "bundle")


def run_stage(
    name: str,
    config: StageConfig,
    manifest: FeatureManifest,
    digest: str,
    worker_fn: ray_train.WorkerFn,
    settings_for: Callable[[], dict[str, Any]],
    write: Callable[[State, dict[str, Any], dict[str, float]], Bundle],
) -> dict[str, Any]:
    """Trains, writes the bundle with `write(state, settings, metrics)`, and returns what NAME.json holds.

    settings_for: gives what `worker_fn` needs, "config" among it; called only when there is something to train. A
    finished run with the same digest is returned as it is. Raises UserError when OUT holds one with another.
    """
    begin = time.monotonic()
    local_batch_size(config.fit, config.cluster.num_workers)
    if not validates(config.fit, manifest):
        log.warning("%s: no validation: the features have no clips of the split val", name)
    where = storage.join(config.out, f"{name}.json")
    if (found := up_to_date(where, digest, name)) is not None:
        return found
    settings = settings_for()
    params = {"fingerprint": manifest.fingerprint, **settings["config"]}
    with tracking.run(config.tracking, name, params, {"digest": digest}) as run:
        state = ray_train.train(name, worker_fn, settings, config.cluster, config.out, digest, config.fit.steps)
        entries = ray_train.history(config.out)
        for entry in entries:
            run.log_metrics({k: v for k, v in entry.items() if k != "step"}, step=int(entry["step"]))
        metrics = {k: v for k, v in entries[-1].items() if k != "step"}
        bundle = write(state, settings, metrics)
        result = {
            "digest": digest,
            "seconds": round(time.monotonic() - begin, 1),
            "steps": state.step,
            "precision": state.precision,
            "workers": config.cluster.num_workers,
            "metrics": metrics,
            "data_fingerprint": manifest.fingerprint,
            "bundle": bundle_dir(config.out),
            "sha": bundle.sha,
        }
        storage.write_json(where, result)
        storage.remove(ray_train.checkpoints(config.out))
    shown = " ".join(f"{key} {value:.3f}" for key, value in metrics.items())
    log.info(
        "%s: %d steps in %s, %.0f s, %s -> %s",
        name,
        state.step,
        state.precision,
        result["seconds"],
        shown,
        result["bundle"],
    )
    return result


def validates(fit: FitConfig, manifest: FeatureManifest) -> bool:
    """Whether there are clips to validate on. Raises UserError when validations are asked for and there are none."""
    if manifest.rows.get("val", 0) > 1:
        return True
    if fit.eval_every:
        raise UserError(
            "fit.eval_every",
            fit.eval_every,
            "the features have no clips of the split val to validate on",
            "curate with val_share=0.02, or set fit.eval_every=0 to train without validation",
        )
    return False


def up_to_date(result: str, digest: str, verb: str) -> dict[str, Any] | None:
    """The stored result when it was made with the same settings and data. Raises UserError when it was not."""
    if not storage.exists(result):
        return None
    found: dict[str, Any] = storage.read_json(result)
    if found.get("digest") != digest:
        raise UserError("out", result, "was made with other settings or data", "give another --out, or delete it")
    log.info("%s: up to date -> %s", verb, result)
    return found


def check_foundation(spec: FoundationSpec, manifest: FeatureManifest) -> None:
    """Raises UserError when the features were made with another foundation than the bundle would name."""
    found = identity(spec)
    for key in ("clip_revision", "diffusion_revision"):
        if found[key] != manifest.foundation[key]:
            raise UserError(
                f"foundation.{key.removesuffix('_revision')}",
                found[key],
                f"the features were made with {manifest.foundation[key]}",
                "set the foundation that `aai featurize` used, or featurize again",
            )
