"""Looks at curated data and moves it.

    aai data show ID                             # all that is known of a clip, and a contact sheet of it
    aai data compact --input DIR --out DIR       # the same table in fewer, larger files
    aai data export --format webdataset --input runs/demo/curated/accepted --out DIR

ID is a clip_id, the beginning of one, or a part of a uri.
"""

import argparse
from typing import Any, Literal

import pydantic

from aai import storage
from aai.errors import UserError
from pipelines.engine.lock import output_lock
from pipelines.settings import Plan, VerbConfig

ACTIONS = ("show", "compact", "export")


class DataConfig(VerbConfig):
    """Settings of `aai data`."""

    action: Literal["show", "compact", "export"] = "show"
    """What to do."""
    id: str | None = None
    """show: a clip_id, the beginning of one, or a part of a uri."""
    table: str = "${run_dir}/curated"
    """show: folder or s3:// prefix that holds accepted/ and rejected/, or one such table."""
    features: str | None = "${run_dir}/features"
    """show: FeatureTable to look the clip up in; it may be absent."""
    input: str | None = None
    """compact, export: folder or s3:// prefix of the table."""
    out: str | None = None
    """compact, export: folder or s3:// prefix to write to; show: where the contact sheet goes [run_dir/clips]."""
    rows_per_file: int = pydantic.Field(4096, ge=1)
    """compact: about how many rows a file holds."""
    format: Literal["webdataset"] = "webdataset"
    """export: the format."""
    shard_mb: float = pydantic.Field(512, gt=0)
    """export: largest size of a tar, in MB."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        given = f"{self.table}, clip {self.id or '(ID)'}" if self.action == "show" else self.input or "(--input)"
        out = self.out or (storage.join(self.run_dir, "clips") if self.action == "show" else "(--out)")
        resources = {"action": self.action, "machine": "this one, one process"}
        return Plan(inputs={"table": given}, outputs={"out": out}, resources=resources)


CONFIG = DataConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """ACTION, ID and short flags, each with the setting it stands for."""
    parser.add_argument("action", nargs="?", choices=ACTIONS, help="show, compact or export")
    parser.add_argument("id", nargs="?", metavar="ID", help="show: clip_id, beginning of one, or part of a uri")
    parser.add_argument("--table", metavar="DIR", help="show: curated tables [runs/demo/curated]")
    parser.add_argument("--features", metavar="DIR", help="show: FeatureTable [runs/demo/features]")
    parser.add_argument("--input", metavar="DIR", help="compact, export: the table")
    parser.add_argument("--out", metavar="DIR", help="folder or s3:// prefix to write to")
    parser.add_argument("--rows-per-file", type=int, metavar="N", help="compact: rows of a file, about")
    parser.add_argument("--format", choices=("webdataset",), help="export: the format")
    names = ("action", "id", "table", "features", "input", "out", "rows_per_file", "format")
    return {name: name for name in names}


def run(config: DataConfig) -> dict[str, Any]:
    """Does the action; returns what it found or wrote. Raises UserError."""
    if config.action == "show":
        if not config.id:
            raise UserError("id", "(missing)", "which clip?", "aai data show CLIP_ID (or a part of its uri)")
        from pipelines.tables.show import show

        out = config.out or storage.join(config.run_dir, "clips")
        return show(config.id, config.table, config.features, out)
    if config.id:
        raise UserError("id", config.id, f"`{config.action}` takes no ID", "leave it out")
    for name in ("input", "out"):
        if getattr(config, name) is None:
            raise UserError(name, "(missing)", f"`{config.action}` needs it", f"pass --{name} DIR")
    given, out = storage.absolute(str(config.input)), storage.absolute(str(config.out))
    if f"{out}/".startswith(f"{given}/") or f"{given}/".startswith(f"{out}/"):
        raise UserError("out", config.out, "lies in the input, or holds it", "give a folder of its own")
    with output_lock(out):
        if config.action == "compact":
            from pipelines.tables.compact import compact

            return compact(given, out, config.rows_per_file)
        from pipelines.tables.webdataset import export

        return export(given, out, int(config.shard_mb * 1e6))
