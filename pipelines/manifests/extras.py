"""What a manifest says beyond what curate knows: licences, sources, scores. Such columns travel with their clips."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date

from aai.errors import UserError
from aai.schema import CLIP_TABLE, PICTURE, REJECT_TABLE

log = logging.getLogger(__name__)

MAX_COLUMNS, MAX_CHARS = 64, 4096
RESERVED = {*CLIP_TABLE.names, *REJECT_TABLE.names, PICTURE, "image_uri", "key", "extra", "signals", "reasons"}
"""Columns of the tables themselves; a manifest's own one of such a name becomes manifest_NAME."""
NUMBER, TEXT = "number", "text"
_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d+)?([eE][+-]?\d{1,3})?")
"""What a text file has for a number; ids such as 007, or longer than a float64 can hold, stay text."""
_MAX_WHOLE = 2**53

Extra = Mapping[str, str | float]
"""A row's further columns by name, without the empty ones."""


def kinds_of(manifest: str, rows: Iterable[Mapping[str, object]], wanted: Sequence[str] | None) -> dict[str, str]:
    """{column: NUMBER or TEXT} of the further columns that travel: all values of one are numbers, or all are text.

    rows: as they were read. wanted: the columns that are meant; None = all that hold numbers or text.
    Raises UserError for a column that is not there, and for too many.
    """
    found: dict[str, str | None] = {}  # in the order of the manifest
    for row in rows:
        for name, value in row.items():
            found[name] = _kind(found.get(name, NUMBER), value)
    if wanted is not None and (absent := [name for name in wanted if name not in found]):
        rule = f"is no further column of {manifest} (found: {', '.join(found) or 'none'})"
        raise UserError("manifest_columns", absent[0], rule, "name one of these")
    kinds: dict[str, str] = {}
    for name in found if wanted is None else wanted:
        if kind := found[name]:
            kinds[name] = kind
        elif wanted is not None:
            raise UserError("manifest_columns", name, f"holds neither numbers nor text in {manifest}", "leave it out")
        else:
            log.warning("manifest: column %s holds neither numbers nor text and is left out", name)
    if len(kinds) > MAX_COLUMNS:
        rule = f"has {len(kinds)} further columns, of which at most {MAX_COLUMNS} travel with the clips"
        raise UserError("manifest", manifest, rule, "name those that are meant in manifest_columns")
    if kinds:
        log.info("manifest: with each clip travels its %s", ", ".join(kinds))
    return kinds


def carried(manifest: str, number: int, row: Mapping[str, object], kinds: Mapping[str, str]) -> Extra:
    """What travels with the row of this number. Raises UserError for a text that is too long."""
    out: dict[str, str | float] = {}
    for name, kind in kinds.items():
        value = row.get(name)
        if _is_empty(value):
            continue
        if len(text := str(value)) > MAX_CHARS:
            rule = f"row {number}: {name} has {len(text)} characters, more than {MAX_CHARS}"
            raise UserError("manifest", manifest, rule, "shorten it, or leave the column out of manifest_columns")
        out[f"manifest_{name}" if name in RESERVED else name] = float(text) if kind == NUMBER else text
    return out


def columns(rows: Iterable[Extra]) -> dict[str, str]:
    """{column: NUMBER or TEXT} of all rows, sorted by name."""
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            found.setdefault(name, TEXT if isinstance(value, str) else NUMBER)
    return dict(sorted(found.items()))


def _kind(kind: str | None, value: object) -> str | None:
    """What a column of this kind is with one value more: NUMBER, TEXT, or None for other things (lists, bytes)."""
    if kind is None or _is_empty(value):
        return kind
    if not isinstance(value, str | int | float | date):
        return None
    return kind if kind == NUMBER and _is_number(value) else TEXT


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return _NUMBER.fullmatch(value.strip()) is not None
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) <= _MAX_WHOLE
    return isinstance(value, float)


def _is_empty(value: object) -> bool:
    """pandas writes NaN for an empty cell."""
    return value is None or value == "" or (isinstance(value, float) and not math.isfinite(value))
