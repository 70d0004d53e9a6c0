"""A wheel runs outside the repository: configs, page, templates and toy weights are in it, and the commit."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from aai.version import commit

ROOT = Path(__file__).resolve().parent.parent
DATA = {
    "configs": "pipelines/configs",
    "pipelines/service/static": "pipelines/service/static",
    "pipelines/pages/templates": "pipelines/pages/templates",
    "aai/toy/weights": "aai/toy/weights",
}
"""What is not code: folder of the repository -> of the wheel."""
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of this checkout installed, without what it depends on."""
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"
    for name in ("aai", "pipelines", "configs"):  # not build/, whose old files would help the wheel
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "aai" / "COMMIT").write_text("abcdef1\n")
    # No build isolation and no index: a test needs no network.
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(root)]
    run([*build, str(source)], root)
    (wheel,) = root.glob("aai-*.whl")
    run([*PIP, "install", "--no-deps", "--no-index", "--target", str(root / "site"), str(wheel)], root)
    return root / "site"


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Runs a command that must succeed; its output."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_commands_run_outside_the_repository(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, aai, pipelines\n"
        "from pipelines.__main__ import main\n"
        "print(aai.__file__, pipelines.__file__)\n"
        "for line in sys.argv[1:]:\n"
        "    print('#', line, flush=True)\n"
        "    try:\n"
        "        assert main(line.split()) == 0, line\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, line\n"
    )
    lines = [
        "--help", "--version", "serve --dry-run", "demo --dry-run", "generate --help", "promote --dry-run",
        "align --config configs/align/vggsound_vitl14_gpu8.yaml --dry-run",
    ]  # fmt: skip
    out = run([sys.executable, "-c", code, *lines], tmp_path, PYTHONPATH=str(installed))
    assert out.startswith(f"{installed}/aai/__init__.py {installed}/pipelines/__init__.py")
    assert re.search(r"^aai \d+\.\d+\.\d+ \(commit abcdef1\)$", out, re.MULTILINE), out
    assert "runs/demo" in out
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_not_code_is_in_it(installed: Path) -> None:
    for part, folder in DATA.items():
        wanted = [path.relative_to(ROOT / part) for path in (ROOT / part).rglob("*") if path.is_file()]
        assert wanted
        for name in wanted:
            assert (installed / folder / name).read_bytes() == (ROOT / part / name).read_bytes()


def test_the_toy_world_is_painted_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from aai.foundation.loaders import load_diffusion\nfrom aai.foundation.identity import FoundationSpec\n"
        "from aai.toy.judge import ToyJudge\nfrom pipelines.pages.page import environment\n"
        "load_diffusion(FoundationSpec())\nToyJudge.load()\nenvironment().get_template('report.html.jinja')\n"
    )
    run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(installed))


def test_a_build_in_the_checkout_stamps_its_commit(tmp_path: Path) -> None:
    run([sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)], ROOT)
    assert (tmp_path / "aai" / "COMMIT").read_text().strip() == commit(ROOT)
