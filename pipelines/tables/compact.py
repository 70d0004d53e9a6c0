"""Rewrites a table of many small files into fewer, larger ones: the same rows in the same order."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from aai import storage
from aai.errors import UserError
from aai.features import MANIFEST, METADATA_KEY, SHAPES_KEY
from aai.version import METADATA_KEY as WRITTEN_BY
from pipelines.engine.resume import finished

log = logging.getLogger(__name__)

OF_ONE_FILE = ("input", "splits", "enlarged", "without_picture", "dtype")
"""What the files of a FeatureTable say of themselves alone; the manifest has the table's."""
GROUP_ROWS = 256
"""Rows of a row group: what is held in memory, and what a reader takes at once."""

Sources = list[tuple[str, int]]
"""Each file and the number of its rows."""


def compact(given: str, out: str, rows_per_file: int) -> dict[str, Any]:
    """Writes OUT/part-*.parquet of about `rows_per_file` rows each (all but the last of one size).

    Schema and metadata stay. Of a FeatureTable the files carry their digest and shapes, and manifest.json comes along,
    written last. A file appears whole or not at all, and a run after a kill goes on with the next one. Raises UserError
    for a missing or mixed table, or an `out` that holds something else.
    """
    files = storage.list_files(given, ".parquet")
    if not files:
        raise UserError("input", given, "holds no Parquet files", "give a table: a folder such as curated/accepted")
    footers = [_footer(file) for file in files]
    schema, shapes = _common(files, [footer.schema.to_arrow_schema() for footer in footers])
    if METADATA_KEY in (schema.metadata or {}) and not storage.exists(storage.join(given, MANIFEST)):
        raise UserError("input", given, f"has no {MANIFEST}: it is not finished", "run `aai featurize` again")
    sources = [(file, footer.num_rows) for file, footer in zip(files, footers, strict=True)]
    total = sum(rows for _, rows in sources)
    settings = {
        "input": _hash([[f.rsplit("/", 1)[1], n, _size(f)] for f, n in sources]),
        "rows_per_file": rows_per_file,
    }
    if (done := finished(out, "compact", settings)) is not None:
        log.info("compact: up to date: %d rows in %d files -> %s", done["rows"], done["files"], out)
        return done
    count = max(1, -(-total // rows_per_file))
    size = max(1, -(-total // count))
    with tqdm(total=total, desc="compact", unit="row", mininterval=1.0) as bar:
        for number in range(count):
            target, first = storage.join(out, f"part-{number:05d}.parquet"), number * size
            last = min(total, first + size)
            if not storage.exists(target):
                _write(target, sources, first, last, schema, shapes)
            bar.update(last - first)
    if storage.exists(storage.join(given, MANIFEST)):
        storage.write_bytes(storage.join(out, MANIFEST), storage.read_bytes(storage.join(given, MANIFEST)))
    result = {**settings, "rows": total, "files_before": len(files), "files": count}
    storage.write_json(storage.join(out, "compact.json"), result)
    log.info("compact: %d rows, %d files -> %d files in %s", total, len(files), count, out)
    return result


def _footer(file: str) -> pq.FileMetaData:
    fs, path = storage.filesystem(file)
    try:
        return pq.read_metadata(path, filesystem=fs)
    except pa.ArrowInvalid as error:
        raise UserError("input", file, f"is not a whole Parquet file ({error})", "write it anew") from error


def _size(file: str) -> int:
    fs, path = storage.filesystem(file)
    return int(fs.size(path))


def _common(files: Sequence[str], schemas: Sequence[pa.Schema]) -> tuple[pa.Schema, dict[str, dict[str, Any]]]:
    """The schema of all files with their metadata, and by file what each says of its shapes, where it does.

    Files may be written by several versions of the code; all of these are named. Raises UserError when files differ in
    columns or in other metadata, such as the digest of the settings that made them.
    """
    first, shapes = schemas[0], {}
    common, authors = _settings(first), set()
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(first):
            rule = f"has other columns than {files[0]}"
            raise UserError("input", file, rule, "compact tables of one kind and version only")
        metadata = schema.metadata or {}
        if SHAPES_KEY in metadata:
            shapes[file] = json.loads(metadata[SHAPES_KEY])
        if WRITTEN_BY in metadata:
            authors.add(metadata[WRITTEN_BY])
        if _settings(schema) != common:
            rule = f"was made with other settings than {files[0]}"
            raise UserError("input", file, rule, "tables of different settings cannot be mixed")
    constant = []
    for of_file in shapes.values():
        constant.append({k: v for k, v in of_file.items() if k not in OF_ONE_FILE})
    if shapes and (len(shapes) != len(files) or any(c != constant[0] for c in constant)):
        raise UserError("input", files[0], "and its neighbours differ in their shapes", "featurize them anew")
    if authors:
        first = first.with_metadata({**(first.metadata or {}), WRITTEN_BY: b"; ".join(sorted(authors))})
    return first, shapes


def _settings(schema: pa.Schema) -> dict[bytes, bytes]:
    """The metadata in which all files of a table must agree."""
    return {key: value for key, value in (schema.metadata or {}).items() if key not in (SHAPES_KEY, WRITTEN_BY)}


def _write(
    target: str, sources: Sources, first: int, last: int, schema: pa.Schema, shapes: dict[str, dict[str, Any]]
) -> None:
    """One file of the rows from `first` up to `last` of the whole table."""
    if shapes:
        schema = schema.with_metadata({**schema.metadata, SHAPES_KEY: _shapes(sources, first, last, shapes)})
    how = storage.parquet_options(compressed=not shapes)  # features are kept plain
    with storage.writing(target) as local, pq.ParquetWriter(local, schema, **how) as writer:
        held: list[pa.RecordBatch] = []
        for batch in _batches(sources, first, last):
            held.append(batch)
            while sum(b.num_rows for b in held) >= GROUP_ROWS:
                whole = pa.Table.from_batches(held)
                writer.write_table(
                    whole.slice(0, GROUP_ROWS).replace_schema_metadata(schema.metadata), row_group_size=GROUP_ROWS
                )
                held = whole.slice(GROUP_ROWS).to_batches()
        if held:
            whole = pa.Table.from_batches(held)
            writer.write_table(whole.replace_schema_metadata(schema.metadata), row_group_size=GROUP_ROWS)


def _parts(sources: Sources, first: int, last: int) -> Iterator[tuple[str, int, int]]:
    """(file, first row, last row + 1 within it) of the files that hold rows `first` up to `last`."""
    start = 0
    for file, rows in sources:
        low, high = max(first, start) - start, min(last, start + rows) - start
        if low < high:
            yield file, low, high
        start += rows


def _batches(sources: Sources, first: int, last: int) -> Iterator[pa.RecordBatch]:
    """Rows in order, read row group by row group."""
    for file, low, high in _parts(sources, first, last):
        fs, path = storage.filesystem(file)
        with pq.ParquetFile(path, filesystem=fs, pre_buffer=False) as table:
            start = 0
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                begin, end = max(low - start, 0), min(high - start, rows)
                if begin < end:
                    yield from table.read_row_group(group).slice(begin, end - begin).to_batches()
                start += rows


def _shapes(sources: Sources, first: int, last: int, shapes: dict[str, dict[str, Any]]) -> bytes:
    """What one file of a FeatureTable says of itself: the shapes all share, its rows by split, what it is made of."""
    splits: Counter[str] = Counter()
    made_of = []
    for file, low, high in _parts(sources, first, last):
        splits.update(storage.read_table(file, ["split"])["split"].slice(low, high - low).to_pylist())
        made_of.append([shapes[file]["input"], low, high])
    shared = {key: value for key, value in shapes[sources[0][0]].items() if key not in OF_ONE_FILE}
    return json.dumps({**shared, "input": _hash(made_of), "splits": splits}).encode()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
