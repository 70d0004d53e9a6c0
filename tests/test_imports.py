"""Importing does no work: no Ray, no files, no threads, no network; aai needs neither Ray nor MLflow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PREPARE = """
import importlib.machinery, os, sys, threading
class Block:  # a library may ask whether another is there; who imports it fails
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "mlflow", "pipelines"}:
            return importlib.machinery.ModuleSpec(name, self)
    def create_module(self, spec):
        raise ImportError("blocked: " + spec.name)
    def exec_module(self, module):
        pass
block = Block()
sys.meta_path.insert(0, block)
watching = False
def watch(event, args):
    if not watching:
        return
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event in ("socket.connect", "subprocess.Popen", "os.mkdir"):
        print("did", event, args, file=sys.stderr)
        os._exit(3)
sys.addaudithook(watch)
"""
# What third-party libraries do when they are imported is theirs: they come first, unwatched.
THIRD_PARTY = "import torch, torchaudio, diffusers, transformers, s3fs, scipy.signal, pyarrow.parquet\n"
CLUSTER = "import ray, ray.data, ray.train.torch, ray.serve, mlflow, fastapi, matplotlib.pyplot, jinja2\n"
WATCH = "watching, threads = True, threading.active_count()\n"
CHECK = "assert threading.active_count() == threads, threading.enumerate()\nwatching = False\n"
UNBLOCK = "sys.meta_path.remove(block)\n"
AFTER = "assert not ray.is_initialized()\nassert os.listdir('.') == [], os.listdir('.')\n"


def modules(package: str) -> list[str]:
    """Dotted names of every module of a package."""
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run_python(code: str, cwd: Path) -> None:
    """Runs code in a fresh process with this checkout on its path, in an empty folder."""
    home = cwd.parent / "home"
    home.mkdir()
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MPLCONFIGDIR": str(home),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_importing_does_no_work_and_aai_needs_no_cluster(tmp_path: Path) -> None:
    """One process for both checks: loading torch takes longer than everything else here."""
    empty = tmp_path / "cwd"
    empty.mkdir()
    aai = "".join(f"import {name}\n" for name in modules("aai"))
    pipelines = "".join(f"import {name}\n" for name in modules("pipelines"))
    alone = PREPARE + THIRD_PARTY + WATCH + aai + CHECK
    run_python(alone + UNBLOCK + CLUSTER + WATCH + pipelines + CHECK + AFTER, empty)


def test_help_needs_no_heavy_library(tmp_path: Path) -> None:
    empty = tmp_path / "cwd"
    empty.mkdir()
    code = (
        "import sys\nfrom pipelines.__main__ import main\nassert main(['--help']) == 0\n"
        "heavy = {'torch', 'ray', 'mlflow', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    run_python(code, empty)


def test_what_a_command_imports_is_no_model_library(tmp_path: Path) -> None:
    """Every --help, every dry run, and the driver of every stage wait for its imports; serve has Ray's besides."""
    empty = tmp_path / "cwd"
    empty.mkdir()
    commands = "".join(f"import pipelines.{name}\n" for name in ("align", "adapt", "featurize", "evaluate", "generate"))
    check = "assert not (heavy := {'ray', 'mlflow', 'diffusers', 'transformers'} & set(sys.modules)), heavy\n"
    models = "import pipelines.serve, pipelines.training.stage\n"
    check_all = "assert not (heavy := {'diffusers', 'transformers'} & set(sys.modules)), heavy\n"
    run_python("import sys\n" + commands + check + models + check_all, empty)
