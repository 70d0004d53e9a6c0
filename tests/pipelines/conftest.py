"""What tests of several commands need: fresh Python processes, an MLflow store, and shards without Ray."""

import importlib
import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import pytest

if TYPE_CHECKING:
    from aai.foundation.identity import FoundationSpec
    from tests.pipelines.tracing.archive import Archive

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *args: str, stdin: int | None = None) -> "subprocess.Popen[str]":
    """Starts a fresh Python process in the checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        cwd=ROOT,
        text=True,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite store with MLflow's tables, made by two processes at once."""
    file = tmp_path_factory.mktemp("store") / "new" / "mlflow.db"
    code = """
        import sys
        from pipelines.registry import tracking
        from pipelines.settings import TrackingConfig
        with tracking.run(TrackingConfig(uri=sys.argv[1]), "first"):
            pass
    """
    both = [python(code, f"sqlite:///{file}") for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out == ""
        assert not [line for line in err.splitlines() if "INFO" in line or "alembic" in line], err
    return file


@pytest.fixture(scope="session")
def tiny_bundle(spec: "FoundationSpec", tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of random weights that paints; tests leave it as it is."""
    from tests.tiny import write_bundle_of

    return str(write_bundle_of(tmp_path_factory.mktemp("bundle") / "tiny", spec))


@pytest.fixture
def tone(tmp_path: Path) -> str:
    """A sound file of half a second."""
    from aai.media.waveform import write_wav

    samples = np.sin(np.arange(8000) / 5).astype(np.float32) / 2
    write_wav(str(tmp_path / "tone.wav"), samples, 16_000)
    return str(tmp_path / "tone.wav")


def run_shards_here(
    name: str,
    shards: Iterable[Any],
    worker_cls: Callable[..., Any],
    worker_args: Mapping[str, Any],
    cluster: Any,
    done: Callable[[Any], bool] = lambda shard: False,
    log_dir: str | None = None,
    stateful: bool = True,
    unit: str = "clip",
    on_result: Callable[[Any], None] = lambda result: None,
    waiting: str | None = None,
    alone_up_to: int = 0,
) -> list[Any]:
    """`run_shards` in this process, one shard after the other; records travel as JSON text as they do there."""
    worker, results = worker_cls(**worker_args), []
    for shard in shards:
        if not done(shard):
            kind = pydantic.TypeAdapter(type(shard))
            results.append(worker(kind.validate_python(json.loads(json.dumps(kind.dump_python(shard, mode="json"))))))
            on_result(results[-1])
    return results


def run_here(patch: pytest.MonkeyPatch) -> None:
    """Shards of curate and featurize run in this process; the engine has its own tests, and so have they on it."""
    for module in ("curate", "curation.measuring", "curation.cut", "featurize", "curation.near", "evaluate"):
        patch.setattr(importlib.import_module(f"pipelines.{module}"), "run_shards", run_shards_here)


@pytest.fixture
def shards_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """See run_here."""
    run_here(monkeypatch)


@contextmanager
def no_models_here() -> Iterator[None]:
    """This process builds and loads no model while the body runs; workers are other processes."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the driver builds a model")

    with pytest.MonkeyPatch.context() as patch:
        loaders = "adapt.load_clip", "adapt.load_diffusion", "training.embedding.load_aligner"
        for name in [f"pipelines.{loader}" for loader in loaders]:
            patch.setattr(name, refuse)
        for name in ("aai.encoders.audio.AudioEncoder", "aai.adapt.AudioAdapter"):
            patch.setattr(f"{name}.__init__", refuse)
        yield


@pytest.fixture
def archive(tmp_path: Path, empty_store: Path) -> "Archive":
    """See tests.pipelines.tracing.archive."""
    from pipelines.settings import TrackingConfig
    from tests.pipelines.registry.test_versions import make_bundle
    from tests.pipelines.tracing.archive import write_archive

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    cfg = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", model_name="aai-demo")
    return write_archive(tmp_path, cfg, Path(make_bundle(tmp_path / "b", 1).folder))
