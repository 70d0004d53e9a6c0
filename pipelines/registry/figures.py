"""Figures: nested mappings of numbers, as evaluate.json holds them, by dotted name; and names and texts for MLflow."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names; lists stay as they are."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of nested figures by dotted name; lists, texts, booleans and NaN are left out."""
    flat = {k: v for k, v in flatten(values).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {k: float(v) for k, v in flat.items() if math.isfinite(v)}


def figure(evaluation: Mapping[str, Any], name: str) -> float | None:
    """A finite number by dotted name, else None."""
    value: Any = evaluation
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def clean_name(name: str) -> str:
    """A name MLflow takes: letters, digits and `_-. :/` only, 250 characters."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:250]


def as_text(value: object) -> str:
    """A text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
