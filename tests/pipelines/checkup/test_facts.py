"""Facts of this machine, also where the package is not."""

import subprocess
import sys
from pathlib import Path

import torch

from aai.foundation.identity import FoundationSpec, pinned_by
from aai.version import code_version
from pipelines.checkup.facts import facts


def test_facts_are_of_this_machine(spec: FoundationSpec, tmp_path: Path) -> None:
    found = facts(("torch", "no-such-package"), ("PATH", "NOT_SET_HERE"), (str(tmp_path), "/nowhere"), {"m": spec.clip})
    assert found["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert found["packages"]["torch"] == torch.__version__.split("+")[0]
    assert found["packages"]["no-such-package"] is None
    assert found["packages"]["aai"] == code_version()
    assert found["variables"] == ["PATH"]
    assert found["paths"] == [str(tmp_path)]
    assert found["models"] == {"m": pinned_by(spec.clip, None, "clip")}
    assert found["torch_cuda"] == torch.version.cuda
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert all(total_bytes >= free_bytes > 0 for total_bytes, free_bytes in (found["disk_bytes"], found["shm_bytes"]))


def test_a_machine_without_the_package_answers(tmp_path: Path) -> None:
    source = Path(facts.__code__.co_filename).read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(f"{source}\nprint(facts((), (), (), {{'m': '/x'}}))\n")
    command = [sys.executable, "-S", "-E", str(tmp_path / "alone.py")]  # no site-packages, no PYTHONPATH
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "'aai': None" in done.stdout
    assert "cannot be read" in done.stdout
