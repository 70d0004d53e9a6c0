import re
import subprocess
from pathlib import Path

import pytest

from aai.version import commit


def git(folder: Path, *command: str) -> str:
    """Runs git in a folder, as nobody in particular."""
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.com")
    return subprocess.run(["git", *who, *command], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with a package aai, not under git."""
    (tmp_path / "aai").mkdir()
    (tmp_path / "aai" / "__init__.py").touch()
    return tmp_path


def test_a_checkout_names_its_commit_and_whether_it_was_changed(root: Path) -> None:
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    git(root, "tag", "v9")  # a tag is no commit
    short = git(root, "rev-parse", "--short=7", "HEAD").strip()
    assert re.fullmatch(r"[0-9a-f]{7}", short)
    assert commit(root) == short
    (root / "new").touch()  # not tracked, so not of the code
    assert commit(root) == short
    (root / "aai" / "__init__.py").write_text("x = 1\n")
    assert commit(root) == f"{short}+dirty"


def test_a_stamp_counts_before_git(root: Path) -> None:
    git(root, "init", "--quiet")
    (root / "aai" / "COMMIT").write_text("abcdef1\n")
    assert commit(root) == "abcdef1"
    (root / "aai" / "COMMIT").write_text("\n")
    assert commit(root) == "unknown"


def test_without_stamp_and_repository_it_is_unknown(root: Path) -> None:
    assert commit(root) == "unknown"
    (root / ".git").write_text("broken\n")
    assert commit(root) == "unknown"


def test_another_projects_repository_around_it_does_not_count(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    inner = tmp_path / "venv"
    (inner / "aai").mkdir(parents=True)
    assert commit(inner) == "unknown"
