"""MLflow: runs, metrics, and the registry of bundles. The only module that imports mlflow.

A registered version is an MLflow model whose data is the bundle folder, loaded by `pipelines.pyfunc_model`: it works
with `mlflow.pyfunc.load_model` and holds no pickle. Aliases: see docs/promotion.md.
"""

import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from aai import storage
from aai.bundle import read_bundle
from aai.errors import UserError
from aai.version import code_version
from pipelines.registry.figures import as_text, clean_name, flatten, numbers
from pipelines.registry.store import check, database
from pipelines.settings import RunsConfig, StoreConfig, TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

log = logging.getLogger(__name__)
T = TypeVar("T")

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
SHA_TAG = "bundle_sha"
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@functools.cache
def _mlflow() -> ModuleType:
    """Imports mlflow (seconds), quiet and without pickle: it reads these variables once."""
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow


def connect(cfg: StoreConfig) -> "MlflowClient":
    """A client of the tracking server and registry. Raises UserError when it cannot be reached."""
    check(cfg)
    uri: str = cfg.uri
    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if uri.startswith("sqlite:///"):
        file = database(cfg)
        uri, lock = f"sqlite:///{file}?timeout=30", _lock(file)  # seconds to wait for another process's write
    mlflow = _mlflow()
    # Loading a registered model goes through MLflow's global settings: they must name the client's store.
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    with lock:
        return attempt(cfg, mlflow.MlflowClient, tracking_uri=uri, registry_uri=uri)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time: MLflow makes its tables step by step, and two at once fail half-way."""
    with file.with_name(f".{file.name}.lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        yield


def attempt(cfg: StoreConfig, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls MLflow; tries once more when sqlite is locked; its refusals become UserErrors."""
    refusal = _mlflow().exceptions.MlflowException
    try:
        try:
            return call(*args, **kwargs)
        except refusal as error:
            if "database is locked" not in str(error):
                raise
            time.sleep(1)
            return call(*args, **kwargs)
    except refusal as error:
        reason = str(error).split("\n")[0][:300]
        remedy = "check the tracking server, the names and your credentials"
        raise UserError("tracking.uri", cfg.uri, f"MLflow refuses: {reason}", remedy) from error


def _unless(code: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """Calls MLflow; None when it answers with this error code."""
    try:
        return call(*args, **kwargs)
    except _mlflow().exceptions.MlflowException as error:
        if error.error_code == code:
            return None
        raise


def _experiment(client: "MlflowClient", cfg: RunsConfig) -> str:
    """The experiment's id; it is made on first use, which two processes may try at once."""
    if (found := client.get_experiment_by_name(cfg.experiment)) is not None:
        return str(found.experiment_id)
    where = cfg.artifacts
    if where is None and cfg.uri.startswith("sqlite:///"):
        where = str(database(cfg).parent / "mlartifacts")
    where = storage.absolute(where) if where else None
    made = _unless("RESOURCE_ALREADY_EXISTS", client.create_experiment, cfg.experiment, where)
    return str(made or client.get_experiment_by_name(cfg.experiment).experiment_id)


@dataclass(frozen=True)
class OpenRun:
    """An MLflow run that is open."""

    client: "MlflowClient"
    cfg: RunsConfig
    run_id: str

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers (nested names become dotted); what is not a finite number is left out."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        rows = [Metric(clean_name(k), v, now_ms, step or 0) for k, v in numbers(metrics).items()]
        for i in range(0, len(rows), 1000):
            attempt(self.cfg, self.client.log_batch, self.run_id, metrics=rows[i : i + 1000])

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs nested settings under dotted names, cut at 6,000 characters; a param that is there cannot change."""
        from mlflow.entities import Param

        rows = [Param(clean_name(key), as_text(value)[:6000]) for key, value in flatten(params).items()]
        for i in range(0, len(rows), 100):
            attempt(self.cfg, self.client.log_batch, self.run_id, params=rows[i : i + 100])

    def log_artifact(self, uri: str | Path, folder: str | None = None) -> None:
        """Copies a file (local or s3://) into the run's artifacts."""
        with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
            local = Path(str(uri))
            if str(uri).startswith("s3://"):
                local = Path(scratch) / str(uri).rsplit("/", 1)[-1]
                local.write_bytes(storage.read_bytes(str(uri)))
            attempt(self.cfg, self.client.log_artifact, self.run_id, str(local), folder)

    def log_bytes(self, name: str, data: bytes) -> None:
        """Writes an artifact, e.g. a PNG picture, named like `plots/loss.png`."""
        folder, _, file = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
            (Path(scratch) / file).write_bytes(data)
            self.log_artifact(Path(scratch) / file, folder or None)

    def log_json(self, name: str, value: object) -> None:
        """Writes a JSON artifact."""
        self.log_bytes(name, json.dumps(value, indent=1, default=str).encode())

    def log_image(self, name: str, png: bytes, step: int) -> None:
        """Logs a picture of a step: MLflow's UI shows those of one name by step."""
        with Image.open(io.BytesIO(png)) as image:
            attempt(self.cfg, self.client.log_image, self.run_id, image, key=name, step=step, synchronous=True)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags (texts up to 8,000 characters)."""
        for key, value in tags.items():
            attempt(self.cfg, self.client.set_tag, self.run_id, clean_name(key), as_text(value)[:8000])


@contextlib.contextmanager
def run(
    cfg: RunsConfig,
    name: str,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    again: str | None = None,
) -> Iterator[OpenRun]:
    """Opens a run; an exception marks it FAILED and goes on its way.

    params: nested settings, logged under dotted names, cut at 6,000 characters. again: the id of an earlier run, which
    goes on with the params that it has if the store still knows it. Raises UserError when the tracking server cannot be
    reached, before any work is done.
    """
    client = connect(cfg)
    experiment = attempt(cfg, _experiment, client, cfg)
    goes_on = again is not None and _reopened(client, cfg, again)
    run_id = again if goes_on else attempt(cfg, client.create_run, experiment, run_name=name).info.run_id
    opened = OpenRun(client, cfg, str(run_id))
    status = "FAILED"
    try:
        opened.set_tags({"written_by": code_version(), **(tags or {})})
        if not goes_on:
            opened.log_params(params or {})
        yield opened
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        try:
            attempt(cfg, client.set_terminated, opened.run_id, status)
        except UserError as error:  # the work is done, or has an error of its own that must be seen
            log.warning("MLflow was not told that the run %s is %s (%s)", opened.run_id, status, error)


def _reopened(client: "MlflowClient", cfg: RunsConfig, run_id: str) -> bool:
    """Marks an earlier run as running; False when the store has it no more."""
    if attempt(cfg, _unless, "RESOURCE_DOES_NOT_EXIST", client.get_run, run_id) is None:
        return False
    attempt(cfg, client.update_run, run_id, status="RUNNING")
    return True


def register(
    cfg: TrackingConfig,
    bundle_folder: str | Path,
    metrics: Mapping[str, Any],
    tags: Mapping[str, Any],
    anew: bool = False,
) -> int:
    """Registers a bundle and returns its version; a bundle of the same content keeps the version it has, unless `anew`.

    The files are copied into the artifact store. `tags` and the metrics come with a new version; one that exists keeps
    its own. Raises UserError for a broken bundle or an unreachable server.
    """
    bundle = read_bundle(bundle_folder)
    client = connect(cfg)
    version = None if anew else find_version(cfg, bundle.sha)
    if version is None:
        with run(cfg, "register", {"bundle": str(bundle_folder)}, {SHA_TAG: bundle.sha}) as opened:
            opened.log_metrics(metrics)
            model_id = _log_model(opened, bundle.folder)
            exists = "RESOURCE_ALREADY_EXISTS"
            attempt(cfg, _unless, exists, client.create_registered_model, cfg.model_name)
            # The tags are part of the creation: a version without them cannot be left behind by a kill.
            described = {**tags, "metrics": numbers(metrics), SHA_TAG: bundle.sha}
            made = attempt(
                cfg,
                client.create_model_version,
                cfg.model_name,
                f"models:/{model_id}",
                opened.run_id,
                tags={key: as_text(value) for key, value in described.items()},
                await_creation_for=60,
                model_id=model_id,
            )
            version = int(made.version)
    return version


def _log_model(opened: OpenRun, folder: Path) -> str:
    """Stores the bundle as an MLflow model of the run; returns the model's id."""
    mlflow = _mlflow()
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    inputs = [ColSpec("binary", "audio"), ColSpec("string", "prompt", False), ColSpec("long", "seed", False)]
    signature = ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec("binary", "png")]))
    with warnings.catch_warnings(), mlflow.start_run(run_id=opened.run_id):
        warnings.filterwarnings("ignore", message=".*input example.*")  # the signature says it all
        info = mlflow.pyfunc.log_model(
            name="bundle",
            loader_module="pipelines.pyfunc_model",
            data_path=str(folder),
            signature=signature,
            pip_requirements=["aai"],
        )
    return str(info.model_id)


def find_version(cfg: TrackingConfig, sha: str) -> int | None:
    """The newest registered version of a bundle by its content, or None."""
    client = connect(cfg)
    query = f"name = '{cfg.model_name}'"
    found: list[int] = []
    token: str | None = ""
    while token is not None:
        page = attempt(cfg, client.search_model_versions, query, 1000, page_token=token or None)
        found += [int(version.version) for version in page if version.tags.get(SHA_TAG) == sha]
        token = page.token or None
    return max(found, default=None)


def set_version_tags(cfg: TrackingConfig, version: int, tags: Mapping[str, Any]) -> None:
    """Writes tags on a registered version; structures become JSON."""
    client = connect(cfg)
    for key, value in tags.items():
        attempt(cfg, client.set_model_version_tag, cfg.model_name, str(version), key, as_text(value)[:100_000])


def version_tags(cfg: TrackingConfig, version: int) -> dict[str, str]:
    """The tags of a registered version."""
    return dict(_version(connect(cfg), cfg, cfg.model_name, str(version)).tags)


def _version(client: "MlflowClient", cfg: StoreConfig, name: str, version: str) -> "ModelVersion":
    found = attempt(cfg, _unless, "RESOURCE_DOES_NOT_EXIST", client.get_model_version, name, version)
    if found is None:
        uri = f"models:/{name}/{version}"
        raise UserError("bundle", uri, f"no such version in {cfg.uri}", "see the versions in `mlflow ui`")
    return found


def _model(cfg: StoreConfig, name: str) -> "RegisteredModel | None":
    return attempt(cfg, _unless, "RESOURCE_DOES_NOT_EXIST", connect(cfg).get_registered_model, name)


def model_tags(cfg: TrackingConfig) -> dict[str, str]:
    """The tags of the registered model; empty when there is no such model."""
    model = _model(cfg, cfg.model_name)
    return dict(model.tags) if model else {}


def set_model_tag(cfg: TrackingConfig, key: str, value: str) -> None:
    """Writes a tag on the registered model (up to 100,000 characters)."""
    attempt(cfg, connect(cfg).set_registered_model_tag, cfg.model_name, key, value)


def delete_model_tag(cfg: TrackingConfig, key: str) -> None:
    """Removes a tag from the registered model; it may be absent."""
    attempt(cfg, connect(cfg).delete_registered_model_tag, cfg.model_name, key)


def aliases(cfg: StoreConfig, name: str) -> dict[str, int]:
    """All aliases of a registered model and their versions; empty when there is no such model."""
    model = _model(cfg, name)
    return {alias: int(version) for alias, version in model.aliases.items()} if model else {}


def get_alias(cfg: TrackingConfig, alias: str) -> int | None:
    """The version an alias names, or None."""
    return aliases(cfg, cfg.model_name).get(alias)


def set_alias(cfg: TrackingConfig, alias: str, version: int) -> None:
    """Points an alias at a version, in one step."""
    attempt(cfg, connect(cfg).set_registered_model_alias, cfg.model_name, alias, str(version))


def delete_alias(cfg: TrackingConfig, alias: str) -> None:
    """Removes an alias; it may be absent."""
    attempt(cfg, connect(cfg).delete_registered_model_alias, cfg.model_name, alias)


def pin_bundle(uri: str, cfg: StoreConfig) -> tuple[str, str, str, str]:
    """A bundle's URI that cannot move, with model name, version and alias ("" where there is none).

    `models:/NAME@ALIAS` becomes `models:/NAME/VERSION`; a folder or s3:// prefix is returned as it is. Raises UserError
    when there is no such model, version or alias; the aliases that exist are named.
    """
    if not uri.startswith("models:"):
        return uri, "", "", ""
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise UserError("bundle", uri, "is not a registry URI", "write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, version = match["name"], match["alias"] or "", match["version"] or ""
    if alias:
        known = aliases(cfg, name)
        if alias not in known:
            shown = ", ".join(f"{a} (version {v})" for a, v in sorted(known.items())) or "none"
            remedy = f"aliases of {name}: {shown}; promote a bundle first, or check tracking.uri"
            raise UserError("bundle", uri, f"no alias {alias!r} of model {name!r} in {cfg.uri}", remedy)
        version = str(known[alias])
    return f"models:/{name}/{version}", name, version, alias


def resolve_bundle(uri: str, cfg: StoreConfig) -> str:
    """The local folder of a bundle given as models:/NAME@ALIAS, models:/NAME/VERSION, folder or s3:// prefix.

    A registered bundle's content is compared with what was registered. Raises UserError.
    """
    pinned, name, number, _ = pin_bundle(uri, cfg)
    if not name:
        return storage.local_folder(uri)
    version = _version(connect(cfg), cfg, name, number)
    folder = attempt(cfg, _mlflow().artifacts.download_artifacts, artifact_uri=pinned)
    found = list(Path(folder).glob("data/*/meta.json"))
    if len(found) != 1:
        raise UserError("bundle", uri, "the registered version holds no bundle", "register it with `aai promote`")
    bundle = read_bundle(found[0].parent)
    if bundle.sha != (expected := version.tags.get(SHA_TAG)):
        rule = f"its files have the identity {bundle.sha}, registered was {expected}"
        raise UserError("bundle", uri, rule, "the artifact store was changed: promote the bundle again")
    return str(bundle.folder)
