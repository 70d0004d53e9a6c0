"""What tests of several commands need: fresh Python processes and an MLflow store."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *args: str) -> "subprocess.Popen[str]":
    """Starts a fresh Python process in the checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite store with MLflow's tables, made by two processes at once."""
    file = tmp_path_factory.mktemp("store") / "new" / "mlflow.db"
    code = """
        import sys
        from pipelines import tracking
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
