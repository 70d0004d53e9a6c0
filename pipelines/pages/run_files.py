"""The files of one run as the report reads them."""

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pyarrow as pa

from aai import storage

Row = dict[str, Any]


class Missing(Exception):
    """A file or figure of the run that is not there: its section is left out."""


class RunFiles:
    """The files of one run folder (local or s3://) and its summary."""

    def __init__(self, run_dir: str, summary: Mapping[str, Any]) -> None:
        self.run_dir, self.summary = run_dir, summary

    def path(self, name: str) -> str:
        """URI of a file or folder of the run. Raises Missing."""
        uri = storage.join(self.run_dir, name)
        if not storage.exists(uri):
            raise Missing(f"{name} is not there")
        return uri

    def json(self, name: str) -> Any:
        """A JSON file, or the entries of a .jsonl file. Raises Missing."""
        uri = self.path(name)
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
        return storage.read_json(uri)

    def table(self, name: str, columns: list[str]) -> pa.Table:
        """A Parquet file or folder. Raises Missing, also when it has no rows."""
        uri = self.path(name)
        if not uri.endswith(".parquet") and not storage.list_files(uri, ".parquet"):
            raise Missing(f"{name} holds no tables")
        table = storage.read_table(uri, columns)
        if not len(table):
            raise Missing(f"{name} has no rows")
        return table

    @cached_property
    def samples(self) -> Row:
        """Which test clips the report shows."""
        return dict(need(self.json("evaluate/evaluate.json"), "samples"))

    @cached_property
    def clips(self) -> dict[int, Row]:
        """The painted test clips by row number: clip_id, audio (FLAC), frame (JPEG), caption, labels."""
        columns = ["row", "clip_id", "audio", "frame", "caption", "labels"]
        return {clip.pop("row"): clip for clip in self.table("evaluate/inputs", columns).to_pylist()}

    @cached_property
    def pictures(self) -> dict[str, list[Row]]:
        """The painted pictures by condition, in order of case."""
        columns = [
            "case", "condition", "row", "audio_row", "picture_row", "seed", "gain_db", "object", "ambience", "medium",
            "size", "png",
        ]  # fmt: skip
        by: dict[str, list[Row]] = {}
        for row in self.table("evaluate/pictures", columns).sort_by("case").to_pylist():
            by.setdefault(row["condition"], []).append(row)
        return by

    def painted(self, condition: str) -> list[Row]:
        """The pictures of one condition. Raises Missing when there are none."""
        if condition not in self.pictures:
            raise Missing(f"no pictures were painted under the condition “{condition}”")
        return self.pictures[condition]


def find(tree: Any, name: str) -> Any:
    """A value by dotted name, None when it is absent."""
    for part in name.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def need(tree: Any, name: str) -> Any:
    """A value by dotted name. Raises Missing when it is absent or empty."""
    value = find(tree, name)
    if value is None or value == {} or value == []:
        raise Missing(f"no figures “{name}”")
    return value


def spread(rows: list[Any], count: int) -> list[Any]:
    """At most `count` items at even distances."""
    step = max(1.0, len(rows) / count)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
