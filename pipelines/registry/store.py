"""Whether a tracking store can be used, found out without MLflow, whose import takes seconds."""

import contextlib
import functools
import http.client
import os
import sqlite3
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from aai.errors import UserError
from pipelines.settings import StoreConfig

SERVER_TIMEOUT_S = 5


def check(cfg: StoreConfig) -> None:
    """Raises UserError when the store cannot be used; long work asks before it begins."""
    if cfg.uri.startswith("sqlite:///"):
        database(cfg)
    elif cfg.uri.startswith(("http://", "https://")):
        _server(cfg.uri)
    else:
        raise UserError("tracking.uri", cfg.uri, "is not supported", "use sqlite:///FILE or http(s)://SERVER")


def database(cfg: StoreConfig) -> Path:
    """The absolute path of a usable sqlite file; its folder is made."""
    path = cfg.uri.removeprefix("sqlite:///").split("?")[0]
    if not path or "://" in path:
        rule = "sqlite needs a file on this machine"
        raise UserError("tracking.uri", cfg.uri, rule, "use sqlite:////folder/mlflow.db or a tracking server")
    file = Path(os.path.abspath(path))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(file, timeout=30)) as database:
            database.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise UserError("tracking.uri", cfg.uri, f"cannot be opened ({error})", "give another file") from error
    return file


def must_exist(cfg: StoreConfig) -> None:
    """For commands that only read. Raises UserError for a sqlite file that is not there, which MLflow would make."""
    path = cfg.uri.removeprefix("sqlite:///").split("?")[0]
    if cfg.uri.startswith("sqlite:///") and not Path(path).exists():
        raise UserError("tracking.uri", cfg.uri, "no such file", "give the store that trainings and promotions used")


def alive(cfg: StoreConfig) -> None:
    """As `check`, asking a server anew: for who goes on asking. Raises UserError within SERVER_TIMEOUT_S."""
    if cfg.uri.startswith(("http://", "https://")):
        _ask(cfg.uri)
    else:
        must_exist(cfg)


@functools.cache
def _server(uri: str) -> None:
    """Asks a server once: MLflow's own retries would take minutes."""
    _ask(uri)


def _ask(uri: str) -> None:
    """Asks a server for a sign of life."""
    if "@" in urlsplit(uri).netloc:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise UserError("tracking.uri", "(hidden)", "holds a password, which logs would show", remedy)
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=SERVER_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        rule = f"no tracking server answers ({error})"
        raise UserError("tracking.uri", uri, rule, "start it, mend the address, or use sqlite:///FILE") from error
