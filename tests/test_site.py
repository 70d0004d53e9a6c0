"""The site of docs/ is built without a warning, loads nothing from elsewhere, and is searched without a server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LOADED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*\b(?:src|href|srcset)=[\"']?((?:https?:)?//[^\"' >]+)")
FETCHED = re.compile(r"(?:url\([\"']?|@import\s+[\"'])((?:https?:)?//[^\"') ]+)")


def build(source: Path, site: Path) -> str:
    """What a strict build complains of, "" where it succeeds. (With --quiet it would not be strict.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=120)
    found = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("INFO"))
    assert bool(done.returncode) == bool(found), done.stdout + done.stderr
    return found


def elsewhere(site: Path) -> list[str]:
    """What pages and their styles load from other hosts."""
    pages = [found for page in site.rglob("*.html") for found in LOADED.findall(page.read_text())]
    return pages + [found for style in site.rglob("*.css") for found in FETCHED.findall(style.read_text())]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    assert build(ROOT, place) == ""
    return place


def test_every_page_is_on_the_site_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in (site / "docs").glob("*.html")} == pages
    assert "sound into pictures" in (site / "index.html").read_text()
    assert elsewhere(site) == []
    assert [path for path in site.rglob("*") if path.name in ("hooks.py", "plots.py", "__pycache__")] == []


def test_what_is_loaded_from_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<script async src="https://a.example/x.js"></script><a href="https://b.example">')
    (tmp_path / "b.css").write_text("@font-face { src: url(//c.example/f.woff) }")
    assert elsewhere(tmp_path) == ["https://a.example/x.js", "//c.example/f.woff"]


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_search_works_where_a_page_is_opened_as_a_file(site: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{site}/docs/runbook.html")
        page.fill("input[name=query]", "s3.conditional")
        page.get_by_role("link", name=re.compile("S3 and folders")).first.wait_for(timeout=20_000)
        browser.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


PLANTED = {
    "docs/serving.md": {
        "[here](absent.md)": "'absent.md'",
        "[here](training.md#absent)": "'training.md#absent'",
        "[here](#absent)": "'#absent'",
        "[here](/docs/training.md)": "absolute link",
    },
    "docs/results.md": {"![plot](figures/absent.png)": "'figures/absent.png'"},
    "README.md": {"[here](docs/absent.md)": "'docs/absent.md'"},
    "docs/extra.md": {"# A page that the navigation does not name": "docs/extra.md"},
}
"""What is added to which page, and a word of what is then found."""


def test_planted_mistakes_stop_the_build_and_are_all_named(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__")
    for part in ("docs", "examples"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    for file in [*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "CITATION.cff"]:
        shutil.copy(file, tmp_path)
    for name, texts in PLANTED.items():
        with (tmp_path / name).open("a") as page:
            page.write("\n" + "\n\n".join(texts) + "\n")
    words = [word for texts in PLANTED.values() for word in texts.values()]
    found = build(tmp_path, tmp_path / "built")
    assert [word for word in words if word not in found] == []
    assert found.count("WARNING") == len(words)
