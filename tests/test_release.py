"""What goes with a release names one version, and things that exist."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from pipelines.__main__ import VERBS

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_one_version_everywhere() -> None:
    assert re.search(
        rf"^## {re.escape(VERSION)} - \d{{4}}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    images = [path for path in (ROOT / "infra").rglob("*") if path.is_file()]
    tags = {tag for path in images for tag in re.findall(r"\baai(?:-mlflow)?:(\d[\w.]*)", path.read_text())}
    assert tags == {VERSION}


def test_the_citation_names_software_and_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2306.11504"}]
    assert len(paper["authors"]) == 7


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_read_only_pin_their_actions_and_run_what_exists(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])
                continue
            assert [name for name in re.findall(r"\bmake ([a-z]+)", step["run"]) if name not in TARGETS] == []
            named = re.findall(r"/aai ([a-z]+)", step["run"])
            assert [verb for verb in named if verb not in VERBS] == []


def test_there_are_workflows_for_lint_tests_and_wheel() -> None:
    assert {path.stem for path in WORKFLOWS} == {"lint", "test", "wheel"}


def test_hooks_use_the_tools_of_make_lint() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repo["repo"] == "local"
    assert [hook["entry"].split()[0] for hook in repo["hooks"]] == [".venv/bin/ruff"] * 2 + [".venv/bin/mypy"]


def test_make_fast_names_tests_that_exist() -> None:
    (line,) = re.findall(r"^FAST := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [name for name in line.split() if not (ROOT / name).exists()] == []
