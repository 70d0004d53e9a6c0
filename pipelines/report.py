"""The report of a run: one HTML page that holds its pictures, sounds, plots and tables, and needs nothing else.

What the run does not have is left out with a note; every number on the page is read from the run's files.
"""

import logging
import posixpath
from collections.abc import Callable, Mapping
from typing import Any

import jinja2

from aai import storage
from pipelines import report_sections as sections
from pipelines.report_run import Missing, Row, Run

log = logging.getLogger(__name__)

PAGE = "report.html"
SECTIONS: dict[str, tuple[str, Callable[[Run], Row]]] = {
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
    storage.write_bytes(page, render(Run(run_dir, summary)).encode())
    return page


def render(run: Run) -> str:
    """The page as HTML."""
    parts = {key: _part(run, key, title, build) for key, (title, build) in SECTIONS.items()}
    return environment().get_template("report.html.jinja").render(parts=parts, run_dir=run.run_dir).lstrip()


def _part(run: Run, key: str, title: str, build: Callable[[Run], Row]) -> Row:
    try:
        return {"key": key, "title": title, "note": "", "body": build(run)}
    except Missing as missing:
        log.warning("report: section %r is left out: %s", title, missing)
        return {"key": key, "title": title, "note": str(missing), "body": None}


def environment() -> jinja2.Environment:
    """Jinja with everything escaped, an error on a misspelt name, and the page's number formats."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    env.filters |= {f.__name__: f for f in (share, number, seconds, gb, words, posixpath.basename)}
    return env


def share(value: float | None) -> str:
    """0.934 -> 93.4 %; an absent figure is a dash."""
    return "–" if value is None else f"{100 * value:.1f}\u00a0%"


def number(value: Any) -> str:
    """A number with its thousands set apart, or three digits after the point; anything else as it is."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.1e}"


def seconds(value: float | None) -> str:
    """93.2 -> 1 min 33 s."""
    if value is None:
        return "–"
    if value < 59.95:
        return f"{value:.1f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}\u00a0min {rest:02d}\u00a0s"


def gb(value: float | None) -> str:
    """2.314 -> 2.3 GB."""
    return "–" if value is None else f"{value:.1f}\u00a0GB"


def words(value: str) -> str:
    """NEAR_DUPLICATE, near_duplicate -> near duplicate."""
    return value.replace("_", " ").lower()
