"""The report of a run: one HTML page that holds its pictures, sounds, plots and tables, and needs nothing else.

What the run does not have is left out with a note; every number on the page is read from the run's files.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from aai import storage
from pipelines.pages import sections
from pipelines.pages.page import environment
from pipelines.pages.run_files import Missing, Row, RunFiles

log = logging.getLogger(__name__)

PAGE = "report.html"
SECTIONS: dict[str, tuple[str, Callable[[RunFiles], Row]]] = {
    "head": ("Figures", sections.head),
    "hero": ("From sound to picture", sections.hero),
    "loudness": ("Louder is bigger", sections.loudness),
    "repaint": ("Edit and stylize", sections.repaint),
    "figures": ("Every condition", sections.figures),
    "retrieval": ("Retrieval", sections.retrieval),
    "training": ("Training", sections.training),
    "curation": ("Curation", sections.curation),
    "stages": ("Time", sections.stages),
    "reproduce": ("Do it again", sections.reproduce),
}
"""Sections in order: title, and what gathers their content."""


def write_report(run_dir: str, summary: Mapping[str, Any]) -> str:
    """Writes RUN_DIR/report.html about the files of a run and its summary (summary.json); returns its path."""
    page = storage.join(run_dir, PAGE)
    storage.write_bytes(page, render(RunFiles(run_dir, summary)).encode())
    return page


def render(run: RunFiles) -> str:
    """The page as HTML."""
    parts = {key: _part(run, key, title, build) for key, (title, build) in SECTIONS.items()}
    return environment().get_template("report.html.jinja").render(parts=parts, run_dir=run.run_dir).lstrip()


def _part(run: RunFiles, key: str, title: str, build: Callable[[RunFiles], Row]) -> Row:
    try:
        return {"key": key, "title": title, "note": "", "body": build(run)}
    except Missing as missing:
        log.warning("report: section %r is left out: %s", title, missing)
        return {"key": key, "title": title, "note": str(missing), "body": None}
