"""Aligned embeddings of a FeatureTable's sounds, computed once: `adapt` trains from these, not from the sounds.

For each file of the table there is one of the same name and the same row groups, with the columns clip_id and aligned
(float32 [D], unit norm; with parts [(1 + parts) x D]). It says which aligner and which settings of the features it was
made with, and of which clips: where these are others, it is made anew.
"""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from aai import storage
from aai.bundle import ALIGNER_FILE, Bundle
from aai.digest import digest
from aai.errors import UserError
from aai.version import METADATA_KEY as WRITTEN_BY

COLUMN = "aligned"
MADE_OF_KEY = b"aai.aligned"


@dataclass(frozen=True)
class AlignedCache:
    """Where the embeddings of one aligner lie."""

    folder: str
    aligner: str
    """Digest of the aligner's settings and weights."""

    @classmethod
    def of(cls, bundle: Bundle, parent: str, parts: int = 0) -> "AlignedCache":
        """The cache of a bundle's aligner in its folder below `parent`. parts: embedded beside the whole sound."""
        made_by: dict[str, object] = {"encoder": bundle.config.encoder, "weights": bundle.meta["files"][ALIGNER_FILE]}
        aligner = digest(made_by | ({"parts": parts} if parts else {}))
        return cls(storage.join(parent, aligner), aligner)

    def file(self, features: str) -> str:
        """Where the embeddings of one file of a FeatureTable lie."""
        return storage.join(self.folder, features.rsplit("/", 1)[-1])

    def made_of(self, table: pq.ParquetFile) -> bytes:
        """What the embeddings of a file carry besides the ids of its clips."""
        metadata = table.schema_arrow.metadata or {}
        said = {key.decode(): value.decode() for key, value in metadata.items() if key != WRITTEN_BY}
        return digest({"aligner": self.aligner, "features": said}).encode()

    def has(self, features: str, table: pq.ParquetFile) -> bool:
        """Whether the embeddings of a file are there, of this aligner and of these very clips."""
        if not storage.exists(self.file(features)):
            return False
        found = self._open(features)
        same = (found.schema_arrow.metadata or {}).get(MADE_OF_KEY) == self.made_of(table)
        ids = [file.read(["clip_id"])["clip_id"] for file in (found, table)]
        return same and _groups(found) == _groups(table) and ids[0].equals(ids[1])

    def write(self, features: str, table: pq.ParquetFile, groups: list[pa.Table]) -> None:
        """Writes the embeddings of a file in one step; groups: clip_id and aligned of each of its row groups."""
        metadata = {MADE_OF_KEY: self.made_of(table)}
        schema = groups[0].schema.with_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema, **storage.parquet_options(compressed=False)) as writer:
            for group in groups:
                writer.write_table(group.replace_schema_metadata(metadata), row_group_size=max(1, len(group)))
        storage.write_bytes(self.file(features), sink.getvalue().to_pybytes())

    def read_group(self, features: str, group: int, clip_ids: pa.ChunkedArray) -> pa.ChunkedArray:
        """Embeddings [N] of the row group with these clips. Raises UserError when there are none, or of others."""
        where, remedy = self.file(features), "run `aai adapt` again: it makes what is missing"
        if not storage.exists(where):
            raise UserError("aligned", where, "is not there", remedy)
        table = self._open(features).read_row_group(group, use_threads=False)
        if not table["clip_id"].equals(clip_ids):
            raise UserError("aligned", where, "was made of other clips than the features have now", remedy)
        return table[COLUMN]

    def _open(self, features: str) -> pq.ParquetFile:
        fs, path = storage.filesystem(self.file(features))
        return pq.ParquetFile(path, filesystem=fs)


def _groups(table: pq.ParquetFile) -> list[int]:
    """Rows of each row group."""
    return [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
