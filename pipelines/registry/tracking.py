"""MLflow: how it is reached, and runs with their metrics and files. The registry is in `versions`."""

import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from aai import storage
from aai.errors import UserError
from aai.version import code_version
from pipelines.registry.figures import as_text, clean_name, flatten, numbers
from pipelines.registry.store import check, database, is_databricks
from pipelines.settings import RunsConfig, StoreConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
T = TypeVar("T")


@functools.cache
def mlflow() -> ModuleType:
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
    import mlflow as imported

    logging.getLogger("alembic").setLevel(logging.WARNING)
    return imported


def connect(cfg: StoreConfig) -> "MlflowClient":
    """A client of the tracking server and registry. Raises UserError when it cannot be reached."""
    check(cfg)
    uri: str = cfg.uri
    # Databricks keeps models that have aliases in its Unity Catalog.
    registry = uri.replace("databricks", "databricks-uc", 1) if is_databricks(cfg) else ""
    lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if uri.startswith("sqlite:///"):
        file = database(cfg)
        uri, lock = f"sqlite:///{file}?timeout=30", _lock(file)  # seconds to wait for another process's write
    library = mlflow()
    # Loading a registered model goes through MLflow's global settings: they must name the client's store.
    library.set_tracking_uri(uri)
    library.set_registry_uri(registry or uri)
    with lock:
        return attempt(cfg, library.MlflowClient, tracking_uri=uri, registry_uri=registry or uri)


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time: MLflow makes its tables step by step, and two at once fail half-way."""
    try:
        holder = file.with_name(f".{file.name}.lock").open("w")
    except OSError:  # who cannot write here makes no tables
        yield
        return
    with holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        yield


def attempt(cfg: StoreConfig, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls MLflow; tries once more when sqlite is locked; its refusals become UserErrors."""
    refusal = mlflow().exceptions.MlflowException
    from requests import RequestException

    try:
        try:
            return call(*args, **kwargs)
        except refusal as error:
            if "database is locked" not in str(error):
                raise
            time.sleep(1)
            return call(*args, **kwargs)
    except (refusal, RequestException) as error:  # uploads to a server raise the second
        reason = str(error).split("\n")[0][:300]
        remedy = "check the tracking server, the names and your credentials"
        raise UserError("tracking.uri", cfg.uri, f"MLflow refuses: {reason}", remedy) from error


def unless(code: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """Calls MLflow; None when it answers with this error code."""
    try:
        return call(*args, **kwargs)
    except mlflow().exceptions.MlflowException as error:
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
    made = unless("RESOURCE_ALREADY_EXISTS", client.create_experiment, cfg.experiment, where)
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

    def tag(self, key: str) -> str | None:
        """A tag as the store has it."""
        found: str | None = attempt(self.cfg, self.client.get_run, self.run_id).data.tags.get(key)
        return found

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
    if attempt(cfg, unless, "RESOURCE_DOES_NOT_EXIST", client.get_run, run_id) is None:
        return False
    attempt(cfg, client.update_run, run_id, status="RUNNING")
    return True
