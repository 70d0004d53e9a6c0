"""Connects to Ray: the cluster at an address, or a small quiet one on this machine."""

import contextlib
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from aai.errors import UserError
from pipelines.settings import ClusterConfig

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 512 * 2**20
"""Of a local cluster: only names and counts travel through Ray."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}


def _ensure_token() -> None:
    """Ray guards even a local cluster with a token in the home folder; where that cannot be written, a private file."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    home = Path.home() / ".ray"
    if (home / "auth_token").is_file() or os.access(home if home.is_dir() else home.parent, os.W_OK):
        return
    handle, path = tempfile.mkstemp(prefix="aai-ray-token-")
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = path


def _link_logs(log_dir: str | None, session: str) -> None:
    """Ray's own logs stay in its session folder; the run's folder points there."""
    if log_dir is None or log_dir.startswith("s3://"):
        return
    link = Path(log_dir) / "ray-logs"
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(session) / "logs")
    except OSError as error:  # a file system without links: only the convenience is lost
        log.debug("no link to Ray's logs: %s", error)


def is_connected() -> bool:
    """Whether this process has started or joined Ray; asking does not even import it."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def connect(cluster: ClusterConfig, log_dir: str | None = None, metrics_port: int = 0) -> None:
    """Starts Ray here or joins the cluster at `cluster.address`; does nothing when already connected.

    A local Ray has at least the CPUs that the stage's workers ask for. Its logs are linked as `log_dir/ray-logs`.
    metrics_port: of its Prometheus endpoint; 0 = one that is free.
    Raises UserError when the address does not answer.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.address:
        try:
            ray.init(address=cluster.address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).split("\n")[0][:200]
            raise UserError(
                "cluster.address",
                cluster.address,
                f"no Ray cluster to connect to ({reason})",
                "start one, mend the address, or leave it empty for this machine",
            ) from error
        return
    _ensure_token()
    # Ray's default of 15 would let its workers starve beside anything else that runs here.
    os.environ.setdefault("RAY_worker_niceness", "0")
    needed = int(cluster.most_workers * cluster.cpus_per_worker + 0.999)
    context = ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, needed),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _metrics_export_port=metrics_port or None,
        **options,
    )
    _link_logs(log_dir, context.address_info["session_dir"])


@contextlib.contextmanager
def native_stderr_held() -> Iterator[TextIO]:
    """Holds back what Ray's C++ core writes past Python to the terminal; shows it only when the block fails.

    Yields the terminal, for a progress line.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with os.fdopen(saved, "w") as terminal, tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield terminal
        except UserError:  # needs no more words than its own
            raise
        except Exception:
            held.seek(0)
            terminal.write(held.read().decode(errors="replace"))
            raise
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)


def shutdown() -> None:
    """Leaves the cluster; ends a local one."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def worker_dtype(dtype: str, device: str, cluster: ClusterConfig, log_dir: str) -> str:
    """What a `dtype` setting stands for where the workers run: `auto` is asked of one of them, for all alike."""
    if dtype != "auto":
        return dtype
    from aai import precision  # only here: torch takes seconds to import

    if cluster.address is None:
        return precision.resolve(dtype, device)
    import ray

    connect(cluster, log_dir)
    ask = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)(precision.resolve)
    return str(ray.get(ask.remote(dtype, device)))
