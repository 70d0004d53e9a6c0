"""Pages: the template engine with everything escaped, and figures as they are printed for people."""

import posixpath
from typing import Any

import jinja2


def environment() -> jinja2.Environment:
    """Jinja with everything escaped, an error on a misspelt name, and the page's number formats."""
    env = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.pages"), autoescape=True, undefined=jinja2.StrictUndefined,
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
