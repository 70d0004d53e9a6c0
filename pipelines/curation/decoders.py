"""Which version of the decoder read the rows of a curation, and what reading them again may change."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aai import storage
from aai.media.measure import DECODER
from pipelines.curation.layout import MEASURED, shard_file
from pipelines.curation.ledger import Ledger

log = logging.getLogger(__name__)

FIRST = "1"
"""Stands for rows that name no decoder."""
_COLUMNS = ("key", "stage", "code", "decoder")
_THREADS = 16
ReadBy = dict[str, dict[str, Any]]
"""By decoder: `rows`, and of these the `undecodable` ones by code."""


def current_decoders(out: str, earlier: Mapping[str, Any] | None, keys: Sequence[str]) -> list[str]:
    """Who read the rows of a finished curation; rows of others than today's decoder are told of.

    earlier: what the run before told, which spares reading the tables where it knew of none but today's.
    """
    if earlier and earlier.get("decoders") == [DECODER]:
        return [DECODER]
    shards = {name: [entry.key for entry in entries] for name, entries in Ledger(out).valid(set(keys)).items()}
    counted = read_by(out, shards)
    if told := older_rows(counted):
        log.warning("curate: %s", told)
    return list(counted)


def read_by(out: str, shards: Mapping[str, Sequence[str]]) -> ReadBy:
    """Counts the wanted clips of the measured shards (shard -> keys) by who decoded them; unread files are no one's."""
    rows, codes = Counter[str](), Counter[tuple[str, str]]()
    with ThreadPoolExecutor(_THREADS) as pool:  # on S3 nearly all the time is waiting
        tables = pool.map(lambda name: _columns(shard_file(out, MEASURED, name)), shards)
        for table, keys in zip(tables, shards.values(), strict=True):
            wanted = pc.is_in(table["key"], pa.array(keys, pa.string()))
            decoded = pc.fill_null(pc.equal(table["stage"], "decode"), True)
            table = table.filter(pc.and_(wanted, decoded))
            names = [name or FIRST for name in table["decoder"].to_pylist()]
            rows.update(names)
            codes.update((name, code) for name, code in zip(names, table["code"].to_pylist(), strict=True) if code)
    return {
        name: {"rows": count, "undecodable": {code: n for (by, code), n in sorted(codes.items()) if by == name}}
        for name, count in sorted(rows.items())
    }


def _columns(file: str) -> pa.Table:
    fs, path = storage.filesystem(file)
    with pq.ParquetFile(path, filesystem=fs) as table:
        found = table.read([name for name in _COLUMNS if name in table.schema_arrow.names])
    return (
        found if "decoder" in found.column_names else found.append_column("decoder", pa.nulls(len(found), pa.string()))
    )


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
