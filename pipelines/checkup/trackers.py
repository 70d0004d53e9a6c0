"""MLflow: whether the tracking store answers, takes the account, and can be written as a run writes it."""

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aai.errors import UserError
from pipelines.checkup.doors import is_loopback
from pipelines.checkup.finding import Finding, failure, ok, warning
from pipelines.checkup.places import clock_finding, skew_of
from pipelines.registry import store, tracking
from pipelines.settings import TrackingConfig

TIMEOUT_S = 4.0
ACCOUNT = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) of an account"
WRITE = "give the account EDIT on the experiment, or name one that it may write: tracking.experiment"
ARTIFACTS = "let the server serve artifacts to a place that it can write, or give this machine the keys of that place"


def check_tracker(cfg: TrackingConfig, max_skew_s: float) -> list[Finding]:
    """Looks at a store. A server gets a run of one small file in the experiment, which is deleted again."""
    if cfg.uri.startswith("sqlite:///"):
        return [_check_sqlite(cfg)]
    try:
        store.check(cfg.model_copy(update={"wait_s": 0.0}))
    except UserError as error:
        where = "(hidden)" if error.value == "(hidden)" else cfg.uri
        return [failure("mlflow.reachable", where, error.rule, error.remedy)]
    found = [ok("mlflow.reachable", cfg.uri, "answers")]
    if store.is_server(cfg):
        found += _check_server(cfg.uri, max_skew_s)
    return found + _check_writing(cfg)


def _check_sqlite(cfg: TrackingConfig) -> Finding:
    """Looks without making the file."""
    file = Path(cfg.uri.removeprefix("sqlite:///").split("?")[0]).absolute()
    if not file.exists():
        return ok("mlflow.write", cfg.uri, "is made by the first run")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=rw", uri=True, timeout=TIMEOUT_S)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except sqlite3.Error as error:
        remedy = "give the user that runs this the right to write it, end what holds it, or restore it"
        return failure("mlflow.write", cfg.uri, f"cannot be written ({error})", remedy)
    return ok("mlflow.write", cfg.uri, "can be written")


def _check_server(uri: str, max_skew_s: float) -> list[Finding]:
    """Its clock and its version."""
    import requests

    with contextlib.suppress(requests.RequestException):  # that it answers was seen; this only tells more
        trusted: Any = os.environ.get(store.AUTHORITY) or True
        answer = requests.get(f"{uri.rstrip('/')}/version", timeout=TIMEOUT_S, verify=trusted)
        found = []
        if date := answer.headers.get("Date"):
            found.append(clock_finding(f"MLflow server {uri}", skew_of(date), max_skew_s))
        ours, theirs = tracking.mlflow().__version__, answer.text.strip()
        if answer.ok and theirs[:1].isdigit() and theirs.split(".")[0] != ours.split(".")[0]:
            remedy = "run the server in the version that constraints.txt names"
            found.append(warning("mlflow.version", uri, f"the server is {theirs[:20]}, the client {ours}", remedy))
        return found
    return []


def _check_writing(cfg: TrackingConfig) -> list[Finding]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", f"{TIMEOUT_S:g}")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    step, run_id = "mlflow.write", None
    try:
        client = tracking.connect(cfg)
        try:
            with tracking.run(cfg, "aai doctor") as run:
                run_id, step = run.run_id, "mlflow.artifacts"
                run.log_bytes("doctor.txt", b"written by aai doctor")
                place = tracking.attempt(cfg, client.get_run, run_id).info.artifact_uri
        finally:
            if run_id is not None:
                tracking.attempt(cfg, client.delete_run, run_id)
    except UserError as error:
        return [_refused(cfg, step, error.rule)]
    except OSError as error:  # of a client that stores artifacts itself
        return [_refused(cfg, step, str(error))]
    found = [ok("mlflow.write", cfg.uri, f"a run with a file was written to {cfg.experiment!r}, and deleted")]
    if not is_everybodys(place, cfg.uri):
        rule = f"files of {cfg.experiment!r} go to {place}: a folder of whichever machine writes them"
        remedy = "start the server with --artifacts-destination, and name another tracking.experiment"
        found.append(failure("mlflow.artifacts", cfg.uri, rule, remedy))
    return found


def is_everybodys(place: str, uri: str) -> bool:
    """Whether files that one machine logs to `place` are found by the others; a server on loopback has no others."""
    return not place.startswith(("/", "file:")) or is_loopback(urlsplit(uri).hostname or "")


def _refused(cfg: TrackingConfig, step: str, rule: str) -> Finding:
    said = rule.lower()
    if "401" in said or "unauthenticated" in said or "not authenticated" in said:
        return failure("mlflow.account", cfg.uri, rule, ACCOUNT)
    return failure(step, cfg.uri, rule, ARTIFACTS if step == "mlflow.artifacts" else WRITE)
