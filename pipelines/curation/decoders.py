"""Which version of the decoder read the rows of a curation, and what reading them again may change."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from aai.media.measure import DECODER
from pipelines.curation.clip_keys import ClipKeys
from pipelines.curation.ledger import Ledger
from pipelines.curation.measured import MeasuredTables

log = logging.getLogger(__name__)

FIRST = "1"
"""Stands for rows that name no decoder."""
COLUMNS = ["decoder", "stage", "code"]
ReadBy = dict[str, dict[str, Any]]
"""By decoder: `rows`, and of these the `undecodable` ones by code."""


class DecoderCounts:
    """Counts rows, and codes of those that could not be decoded, by who decoded them; unread files are no one's."""

    def __init__(self) -> None:
        self._rows, self._codes = Counter[str](), Counter[tuple[str, str]]()

    def add(self, table: pa.Table) -> None:
        """Adds the clips of a measured table; it needs COLUMNS."""
        decoded = pc.fill_null(pc.equal(table["stage"], "decode"), True)
        table = table.select(COLUMNS).filter(decoded)
        named = table.set_column(0, "decoder", pc.fill_null(table["decoder"], FIRST))
        for found in named.group_by(["decoder", "code"]).aggregate([([], "count_all")]).to_pylist():
            self._rows[found["decoder"]] += found["count_all"]
            if found["code"]:
                self._codes[found["decoder"], found["code"]] += found["count_all"]

    def read_by(self) -> ReadBy:
        """What was counted."""
        return {
            name: {
                "rows": count,
                "undecodable": {code: n for (by, code), n in sorted(self._codes.items()) if by == name},
            }
            for name, count in sorted(self._rows.items())
        }


def current_decoders(out: str, earlier: Mapping[str, Any], keys: ClipKeys) -> None:
    """Tells of the rows of a finished curation that others than today's decoder read.

    earlier: its curate.json, which spares reading the tables where it knows of none but today's.
    """
    if earlier.get("decoders") == [DECODER]:
        return
    counts, shards = DecoderCounts(), Ledger(out).valid(keys)
    for _, table in MeasuredTables(out).wanted(shards):
        counts.add(table)
    tell_older(counts.read_by())


def tell_older(counted: Mapping[str, Mapping[str, Any]]) -> None:
    """Warns of rows that another decoder than this one read."""
    if told := older_rows(counted):
        log.warning("curate: %s", told)


def older_rows(counted: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What to say of rows that another decoder than this one read; None where there are none."""
    others = {name: found for name, found in counted.items() if name != DECODER}
    if not others:
        return None
    total = sum(found["rows"] for found in counted.values())
    names = ", ".join(f"{found['rows']:,} by {name}" for name, found in others.items())
    codes = Counter[str]()
    for found in others.values():
        codes.update(found["undecodable"])
    again = "none of them failed, so --retry changes nothing"
    if codes:
        again = f"--retry {','.join(sorted(codes))} tries the {codes.total():,} again that could not be decoded"
    return f"of {total:,} decoded rows {names} and not by {DECODER}; they stay; {again}; another out decodes all anew"
