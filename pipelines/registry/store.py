"""Whether a tracking store can be used, found out without MLflow, whose import takes seconds."""

import contextlib
import functools
import logging
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from aai.errors import UserError
from pipelines.settings import StoreConfig

log = logging.getLogger(__name__)

AUTHORITY = "MLFLOW_TRACKING_SERVER_CERT_PATH"
"""MLflow's variable: a file of authorities that a server's certificate may be of. REQUESTS_CA_BUNDLE is heeded too."""
SERVER_TIMEOUT_S = 5
AGAIN_S = 1.0
"""Between two tries to reach a server that may be starting."""
STARTING = (502, 503, 504)
"""What a proxy answers as long as nothing behind it does."""


def check(cfg: StoreConfig) -> None:
    """Raises UserError when the store cannot be used; long work asks before it begins."""
    if cfg.uri.startswith("sqlite:///"):
        database(cfg)
    elif is_server(cfg):
        _server(cfg.uri, cfg.wait_s)
    elif not is_databricks(cfg):
        remedy = "use sqlite:///FILE, http(s)://SERVER or databricks"
        raise UserError("tracking.uri", cfg.uri, "is not supported", remedy)


def is_server(cfg: StoreConfig) -> bool:
    """Whether the store is a tracking server."""
    return cfg.uri.startswith(("http://", "https://"))


def is_databricks(cfg: StoreConfig) -> bool:
    """Whether MLflow's own client finds the store, and the account, in its profile or environment."""
    return cfg.uri == "databricks" or cfg.uri.startswith("databricks://")


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
    if not is_server(cfg):
        must_exist(cfg)
    elif reason := _silence(cfg.uri):
        raise _away(cfg.uri, reason)


@functools.cache
def _server(uri: str, wait_s: float) -> None:
    """Asks a server until it has answered once, or was waited for: MLflow's own retries would take minutes."""
    end_s, told = time.monotonic() + wait_s, False
    while reason := _silence(uri):
        if time.monotonic() + AGAIN_S > end_s:
            raise _away(uri, f"{reason}; waited for {wait_s:g} s" if wait_s else reason)
        if not told:
            log.warning("MLflow: %s does not answer yet, waiting up to %g s (%s)", uri, wait_s, reason)
            told = True
        time.sleep(AGAIN_S)


def _silence(uri: str) -> str:
    """Asks a server for a sign of life, with the certificates and proxies that MLflow itself would use.

    Returns why none came, or "". Raises UserError for what waiting does not mend.
    """
    import requests

    if "@" in uri.partition("://")[2].partition("/")[0]:
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
        raise UserError("tracking.uri", "(hidden)", "holds a password, which logs would show", remedy)
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    trusted = os.environ.get(AUTHORITY) or not insecure
    mine = os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH") or None
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=SERVER_TIMEOUT_S, verify=trusted, cert=mine)
    except requests.exceptions.SSLError as error:
        rule = f"its certificate is not trusted ({_reason(error)})"
        raise UserError("tracking.uri", uri, rule, f"name its authority's file in {AUTHORITY}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        return _reason(error)
    except (requests.RequestException, OSError, ValueError) as error:
        rule = f"cannot be asked ({_reason(error)})"
        raise UserError("tracking.uri", uri, rule, f"mend the address, or what {AUTHORITY} names") from error
    return f"status {answer.status_code}" if answer.status_code in STARTING else ""


def _away(uri: str, reason: str) -> UserError:
    rule = f"no tracking server answers ({reason})"
    return UserError("tracking.uri", uri, rule, "start it, mend the address, or use sqlite:///FILE")


def _reason(error: Exception) -> str:
    """What was wrong at the bottom of it, in one line."""
    cause: Any = error
    while (below := getattr(cause, "reason", None) or (cause.args and cause.args[0])) and isinstance(below, Exception):
        cause = below
    return str(cause).split("\n")[0].rsplit(": ", 1)[-1][:200] or type(cause).__name__
