"""Signals that are not measured here: from tables, columns of the manifest, or models; and their thresholds.

Such a signal has a number for each clip, is a column of both tables, and is judged by `signals` of the settings.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pydantic

from aai import storage
from aai.config import Config
from aai.digest import digest
from aai.errors import UserError
from aai.schema import CLIP_TABLE, REJECT_TABLE
from pipelines.curation.stamps import stamps_of
from pipelines.curation.table_slices import TableSlices
from pipelines.manifests.extras import NUMBER, columns
from pipelines.manifests.row import ManifestRow, absolute_uri

log = logging.getLogger(__name__)

IDS = ("clip_id", "uri")
"""What a table of signals names clips by; the first one that it has counts."""
Measured = Mapping[str, pa.Table]
"""By shard: the small columns of its wanted clips, one row a clip."""


def _is_free(name: str) -> str:
    if name in {*CLIP_TABLE.names, *REJECT_TABLE.names, "video"}:  # NO_VIDEO is a code of decoding
        raise ValueError(f"{name} stands for something else in the tables: give the signal another name")
    return name


SignalName = Annotated[
    str, pydantic.StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,39}$"), pydantic.AfterValidator(_is_free)
]
"""Small letters, digits and _; none of the tables' own columns."""


class SignalConfig(Config):
    """Where a signal's values are from, and which clips are taken."""

    table: str | None = None
    """Parquet file, or folder of such, with `clip_id` or `uri` and the value; empty = the manifest's column, or what
    `scores` tells, of the signal's name."""
    column: str | None = None
    """Column of the table that holds the value; empty = the signal's name."""
    min: float | None = None
    """Clips below it are LOW_NAME; empty = no such rule."""
    max: float | None = None
    """Clips above it are HIGH_NAME; empty = no such rule."""
    missing: Literal["keep", "reject"] = "keep"
    """What becomes of clips that have no value; rejected ones are NO_NAME."""

    @pydantic.model_validator(mode="after")
    def _can_act(self) -> Self:
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}: no clip would be left")
        if self.column is not None and self.table is None:
            raise ValueError("column is one of a table: give table, or name the signal as the manifest's column")
        return self


class SignalRule(NamedTuple):
    """A threshold as those of aai.media.filters.RULES, with its limit."""

    code: str
    signal: str
    setting: str
    unit: str
    sign: int
    limit: float


def signal_rules(signals: Mapping[str, SignalConfig]) -> list[SignalRule]:
    """Every threshold in force, in the order of the settings."""
    rules = []
    for name, signal in signals.items():
        for side, word, sign, limit in (("min", "LOW", +1, signal.min), ("max", "HIGH", -1, signal.max)):
            if limit is not None:
                rules.append(SignalRule(f"{word}_{name.upper()}", name, f"signals.{name}.{side}", "", sign, limit))
    return rules


def check_signals(signals: Mapping[str, SignalConfig], rows: Sequence[ManifestRow], told: Sequence[str]) -> str | None:
    """A digest of where the values are from, before anything is decoded; None without signals.

    told: the names that `scores` has values for. Raises UserError for a signal that nothing has values for.
    """
    listed = columns(row.extra for row in rows) if signals or told else {}
    for name in told:
        if name in listed:
            rule = "is a column of the manifest and a signal of scores"
            raise UserError("manifest_columns", name, rule, "name the columns that are meant, without it")
    stamps = {}
    for name, signal in signals.items():
        if signal.table is not None:
            if name in {*listed, *told}:
                rule = "is told by the manifest or by scores, too"
                raise UserError(f"signals.{name}.table", signal.table, rule, "give the signal another name")
            stamps[name] = _stamps(name, signal, signal.table)
        elif name not in told and listed.get(name) != NUMBER:
            kind = "is text in the manifest" if name in listed else "has neither a table nor a column of the manifest"
            numbers = ", ".join([*told, *(column for column in listed if listed[column] == NUMBER)]) or "none"
            raise UserError("signals", name, kind, f"give signals.{name}.table; numbers are in: {numbers}")
    return digest(stamps) if signals else None


def _stamps(name: str, signal: SignalConfig, table: str) -> list[str]:
    """What tells the table's present content from another. Raises UserError for a table without what is needed."""
    files = [table] if table.endswith(".parquet") else storage.list_files(table, ".parquet")
    setting, remedy = f"signals.{name}.table", f"give a Parquet table with {' or '.join(IDS)} and the value"
    if not files or not storage.exists(files[0]):
        raise UserError(setting, table, "holds no Parquet files", remedy)
    fs, path = storage.filesystem(files[0])
    try:
        schema = pq.read_schema(path, filesystem=fs)
    except pa.ArrowInvalid as error:
        raise UserError(setting, files[0], f"is not Parquet ({error})", remedy) from error
    column = signal.column or name
    if column not in schema.names or not set(IDS) & set(schema.names):
        rule = f"has no column {column if column not in schema.names else ' or '.join(IDS)}"
        raise UserError(setting, files[0], f"{rule} (found: {', '.join(schema.names)})", remedy)
    kind = schema.field(column).type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(setting, files[0], f"column {column} holds {kind}, no numbers", remedy)
    return [f"{file} {stamp}" for file, stamp in stamps_of(files).items()]


# ---------------------------------------------------------------- their values


def join_signals(
    measured: TableSlices, rows: Mapping[str, ManifestRow], signals: Mapping[str, SignalConfig], manifest: str
) -> TableSlices:
    """`measured`, which is let go, with a float64 column for each signal that it does not have yet; null where a clip
    has no value.

    rows: by key. Relative URIs of a table count from the manifest, as its own do. Raises UserError for a table that has
    two values for one clip.
    """
    if not signals or not measured:
        return measured
    clips = pa.concat_tables([table.select(["key", "clip_id"]) for table in measured.values()])
    clips = clips.append_column("uri", pa.array((row.uri for row in _in_order(clips, rows)), pa.string()))
    columns: dict[str, pa.ChunkedArray] = {}
    for name, signal in signals.items():
        if name in next(iter(measured.values())).column_names:  # a model told it
            continue
        if signal.table is None:
            values = pa.array((row.extra.get(name) for row in _in_order(clips, rows)), pa.float64())
            columns[name] = pa.chunked_array([values])
        else:
            columns[name] = _from_table(name, signal, signal.table, clips, manifest)
        log.info("curate: %s: %d of %d rows have no value", name, columns[name].null_count, len(clips))
    joined, first = TableSlices(), 0
    for shard, table in measured.items():
        rows_here = len(table)
        for name, values in columns.items():
            table = table.append_column(name, values.slice(first, rows_here))
        first += rows_here
        joined.add(shard, table)
        measured.drop_before(shard)
    return joined


def _in_order(clips: pa.Table, rows: Mapping[str, ManifestRow]) -> Iterator[ManifestRow]:
    """The rows of the clips; not all at once."""
    for part in clips.select(["key"]).to_batches(max_chunksize=4096):
        for key in part.column(0).to_pylist():
            yield rows[key]


def _from_table(name: str, signal: SignalConfig, table: str, clips: pa.Table, manifest: str) -> pa.ChunkedArray:
    """float64 [N]: the table's value of each clip; null where it has none, or none that is a number."""
    files = [table] if table.endswith(".parquet") else storage.list_files(table, ".parquet")
    fs, path = storage.filesystem(files[0])
    names = pq.read_schema(path, filesystem=fs).names
    by = next(column for column in IDS if column in names)
    try:
        given = storage.read_table(table, [by, signal.column or name]).rename_columns(["id", "value"])
        ids, values = given["id"].cast(pa.string()), given["value"].cast(pa.float64())
    except pa.ArrowException as error:
        rule = f"cannot be read as one table ({str(error).splitlines()[0]})"
        raise UserError(f"signals.{name}.table", table, rule, "write all of its files alike") from error
    if by == "uri":
        uris = [absolute_uri(uri, manifest) if uri else None for uri in ids.to_pylist()]
        ids = pa.chunked_array([pa.array(uris, pa.string())])
    given = given.set_column(0, "id", ids)
    given = given.set_column(1, "value", pc.if_else(pc.is_finite(values), values, None))
    given = given.filter(pc.and_(given["id"].is_valid(), given["value"].is_valid()))
    found = given.group_by("id").aggregate([("value", "min"), ("value", "max")])
    if len(twice := found.filter(pc.not_equal(found["value_min"], found["value_max"]))):
        low, high = twice["value_min"][0].as_py(), twice["value_max"][0].as_py()
        rule = f"has several values for {by} {twice['id'][0].as_py()}: {low:g} and {high:g}"
        raise UserError(f"signals.{name}.table", table, rule, "keep one value for each")
    places = pc.index_in(clips[by], value_set=found["id"].combine_chunks())
    return found["value_min"].take(places)


def signal_reasons(table: pa.Table, signals: Mapping[str, SignalConfig]) -> list[tuple[int, str, str]]:
    """(row, code, message) of every rule that a row of a table of `join_signals` breaks, in the order of the rules."""
    found = []
    for rule in signal_rules(signals):
        values = table[rule.signal].to_numpy()  # null becomes NaN
        word = "below" if rule.sign > 0 else "above"
        for row in np.flatnonzero(rule.sign * (values - rule.limit) < 0).tolist():
            found.append((row, rule.code, f"{rule.signal} {values[row]:.4g} is {word} {rule.setting} {rule.limit:g}"))
    for name, signal in signals.items():
        if signal.missing == "reject":
            message = f"{name} has no value for it in {signal.table or 'the manifest'}"
            empty = np.flatnonzero(table[name].is_null().to_numpy()).tolist()
            found += [(row, f"NO_{name.upper()}", message) for row in empty]
    return found


def describe_signals(
    measured: Measured, signals: Mapping[str, SignalConfig], told: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """For curate.json and the card: where each signal is from, and how many clips that can be decoded have no value.

    told: the names that `scores` has values for, with or without thresholds.
    """
    out: dict[str, dict[str, Any]] = {}
    for name in [*signals, *(name for name in told if name not in signals)]:
        signal = signals.get(name, SignalConfig())
        source = signal.table or ("scores" if name in told else "manifest")
        limits = signal.model_dump(include={"min", "max", "missing"}, exclude_none=True)
        missing = sum(table.filter(table["code"].is_null())[name].null_count for table in measured.values())
        out[name] = {"source": source, **limits, "missing_rows": missing}
    return out
