"""What a data card reads of curate's tables: the small columns of all rows, and a few rows in full."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aai import storage
from aai.schema import SIGNALS, SIMILARITIES
from pipelines.engine.columns import open_parquet, read_columns

NUMBERS = [f.name for f in (*SIGNALS, *SIMILARITIES) if not pa.types.is_binary(f.type)]
"""Signals that are numbers."""
ACCEPTED, REJECTED = "accepted", "rejected"
MAX_CODES = 63
OTHER = "OTHER"
_THREADS = 16
_KEPT = r"^same clip as (?P<uri>.*) \((?P<kept>[^()]*)\) of split (?P<split>.*)$"

Entry = dict[str, Any]


@dataclass(frozen=True)
class Duplicates:
    """The rows dropped as duplicates: row number, code, own split; id and split of the clip that was kept."""

    row: list[int] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    kept_split: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """The small columns of all N rows: those of accepted/, then those of rejected/, each in table order."""

    files: list[str]
    sizes: list[int]
    """Bytes of each file."""
    starts: np.ndarray
    """int64 [files + 1]: the row each file begins with, and N."""
    accepted: np.ndarray
    """bool [N]."""
    values: dict[str, np.ndarray]
    """float64 [N] by signal; NaN where it was not measured."""
    marks: np.ndarray
    """uint64 [N]: bit i is set when codes[i] is the row's code, or among its flags."""
    codes: list[str]
    stage: np.ndarray
    """int8 [N]: place in `stages`, -1 of accepted rows."""
    stages: list[str]
    transient: np.ndarray
    """bool [N]."""
    labels: Counter[tuple[str, str, bool]]
    """Rows by (label, split, accepted)."""
    splits: Counter[tuple[str, bool]]
    """Rows by (split, accepted)."""
    duplicates: Duplicates
    ids: pa.ChunkedArray
    """clip_id of the accepted rows."""

    def bits(self, codes: Iterable[str]) -> np.uint64:
        """The mark of some codes; those that no row has are left out."""
        return np.uint64(sum(1 << self.codes.index(code) for code in set(codes) if code in self.codes))

    @property
    def kept(self) -> np.ndarray:
        """bool [N]: accepted without a flag."""
        return self.accepted & (self.marks == 0)

    def hours(self, chosen: np.ndarray) -> float:
        """Hours of the chosen rows, as far as their length is known."""
        return round(float(np.nansum(self.values["duration_s"][chosen])) / 3600, 4)


def read_rows(out: str, own: Sequence[str] = ()) -> Rows:
    """Reads the small columns of OUT/accepted and OUT/rejected file by file; never sound or pictures.

    own: signals beside NUMBERS.
    """
    accepted, rejected = table_files(out)
    gathered = Gathered([*NUMBERS, *own])
    small = ["clip_id", *NUMBERS, *own, "labels", "split"]
    for table in read_columns(accepted, [*small, "flags"]):
        gathered.add(table)
    for table in read_columns(rejected, [*small, "stage", "code", "message", "transient"]):
        gathered.add(table)
    return gathered.rows(accepted | rejected)


def table_files(out: str) -> list[dict[str, int]]:
    """The files of OUT/accepted and of OUT/rejected, with their sizes in bytes."""
    return [storage.file_sizes(storage.join(out, name), ".parquet") for name in (ACCEPTED, REJECTED)]


class Gathered:
    """The small columns of files, one after the other: those of accepted/ first."""

    def __init__(self, numbers: Sequence[str] = NUMBERS) -> None:
        self.counts: list[int] = [0]
        self.values: dict[str, list[np.ndarray]] = {name: [] for name in numbers}
        self.parts: dict[str, list[np.ndarray]] = {n: [] for n in ("accepted", "marks", "stage", "transient")}
        self.codes: list[str] = []
        self.stages: list[str] = []
        self.labels: Counter[tuple[str, str, bool]] = Counter()
        self.splits: Counter[tuple[str, bool]] = Counter()
        self.duplicates = Duplicates()
        self.ids: list[pa.ChunkedArray] = []

    def add(self, table: pa.Table) -> None:
        """Adds one file of either table."""
        size, taken = table.num_rows, "flags" in table.column_names
        for name in self.values:
            self.values[name].append(table[name].cast(pa.float64()).to_numpy())
        self.parts["accepted"].append(np.full(size, taken))
        if taken:
            self.ids.append(table["clip_id"])
            parents, flags = _flat(table["flags"])
            marks = np.zeros(size, np.uint64)
            np.bitwise_or.at(marks, parents.to_numpy(), self._bit(flags))
            self.parts["marks"].append(marks)
            self.parts["stage"].append(np.full(size, -1, np.int8))
            self.parts["transient"].append(np.zeros(size, bool))
        else:
            self.parts["marks"].append(self._bit(table["code"].combine_chunks()))
            self.parts["stage"].append(_places(table["stage"].combine_chunks(), self.stages).astype(np.int8))
            self.parts["transient"].append(table["transient"].to_numpy(zero_copy_only=False))
            self._add_duplicates(table)
        self._add_labels(table, taken)
        self.counts.append(size)

    def _bit(self, codes: pa.Array) -> np.ndarray:
        places = _places(codes, self.codes)
        if len(self.codes) > MAX_CODES:
            del self.codes[MAX_CODES:]
            self.codes.append(OTHER)
        return np.left_shift(np.uint64(1), np.minimum(places, MAX_CODES).astype(np.uint64))

    def _add_duplicates(self, table: pa.Table) -> None:
        found = pc.extract_regex(table["message"].combine_chunks(), _KEPT)
        place = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
        picked = pa.array(place)
        d = self.duplicates
        d.row.extend((place + sum(self.counts)).tolist())
        d.code.extend(table["code"].take(picked).to_pylist())
        d.split.extend(table["split"].take(picked).to_pylist())
        d.kept.extend(found.field("kept").take(picked).to_pylist())
        d.kept_split.extend(found.field("split").take(picked).to_pylist())

    def _add_labels(self, table: pa.Table, taken: bool) -> None:
        parents, labels = _flat(table["labels"])
        pairs = pa.table({"label": labels, "split": table["split"].take(parents)})
        counted = pairs.group_by(["label", "split"]).aggregate([([], "count_all")]).to_pylist()
        self.labels.update({(row["label"], row["split"], taken): row["count_all"] for row in counted})
        for row in pc.value_counts(table["split"]).to_pylist():
            self.splits[row["values"], taken] += row["counts"]

    def rows(self, files: Mapping[str, int]) -> Rows:
        """Everything, joined. files: what was added, with its sizes in bytes. Ends the gathering."""
        empty = {"accepted": bool, "marks": np.uint64, "stage": np.int8, "transient": bool}
        joined = {name: np.concatenate([np.empty(0, empty[name]), *parts]) for name, parts in self.parts.items()}
        return Rows(
            files=list(files),
            sizes=list(files.values()),
            starts=np.cumsum(self.counts),
            values={name: np.concatenate([np.empty(0), *self.values.pop(name)]) for name in list(self.values)},
            codes=self.codes,
            stages=self.stages,
            labels=self.labels,
            splits=self.splits,
            duplicates=self.duplicates,
            ids=pa.chunked_array([chunk for column in self.ids for chunk in column.chunks], pa.string()),
            **{name: part.astype(empty[name]) for name, part in joined.items()},
        )


def _flat(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Row number and value of every item of a column of lists."""
    lists = column.combine_chunks()
    return pc.list_parent_indices(lists), pc.list_flatten(lists)


def _places(column: pa.Array, known: list[str]) -> np.ndarray:
    """int64: where each text stands in `known`, which grows by those that are new."""
    known.extend(sorted(set(pc.unique(column).to_pylist()) - set(known)))
    return np.asarray(pc.index_in(column, pa.array(known, pa.string())).cast(pa.int64()))


def locate(rows: Rows, ids: Iterable[str]) -> dict[str, int]:
    """The row of each accepted clip by its id; ids that are not there are left out."""
    wanted = sorted(set(ids))
    places = pc.index_in(pa.array(wanted, pa.string()), rows.ids).to_pylist()
    return {clip: place for clip, place in zip(wanted, places, strict=True) if place is not None}


def fetch(rows: Rows, wanted: Iterable[int], pictures: bool = True) -> dict[int, Entry]:
    """Single rows by their number: clip_id, uri, split, message ("" of accepted ones), picture (JPEG or None).

    Only the row groups that hold them are read, and pictures only when asked for.
    """
    by_file: dict[int, list[int]] = {}
    for row in sorted(set(wanted)):
        by_file.setdefault(int(np.searchsorted(rows.starts, row, side="right")) - 1, []).append(row)
    jobs = []
    for file, numbers in by_file.items():
        within = [row - int(rows.starts[file]) for row in numbers]
        jobs.append((rows.files[file], rows.sizes[file], within, pictures))
    found: dict[int, Entry] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = pool.map(lambda job: _read_some(*job), jobs)
        for numbers, part in zip(by_file.values(), parts, strict=True):
            found.update(zip(numbers, part, strict=True))
    return found


def _read_some(file: str, size_bytes: int, numbers: Sequence[int], pictures: bool) -> list[Entry]:
    """Rows of one file, in the order of their ascending numbers."""
    out: list[Entry] = []
    with open_parquet(file, size_bytes) as table:
        taken = "flags" in table.schema_arrow.names
        picture = "frames" if taken else "thumbnail"
        columns = ["clip_id", "uri", "split", *([] if taken else ["message"]), *([picture] if pictures else [])]
        first = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            mine = [number - first for number in numbers if first <= number < first + size]
            if mine:
                out += table.read_row_group(group, columns=columns).take(pa.array(mine)).to_pylist()
            first += size
    for entry in out:
        image = entry.pop(picture, None)
        entry["picture"] = (image[0] if image else None) if taken else image
        entry.setdefault("message", "")
    return out
