"""Shows what the registry holds: every version with its aliases and figures, and how the aliases have moved.

    aai models                 # versions, newest first, and the promotions, refusals and rollbacks
    aai models --version 3     # all that is known of one version: figures, gates, evaluation, data

It changes nothing. --set tracking.uri=URI and tracking.model_name=NAME say where and which.
"""

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pydantic

from aai.errors import UserError
from pipelines.registry import store, versions
from pipelines.registry.history import attempts
from pipelines.registry.moves import figures_tag
from pipelines.registry.versions import CHAMPION, SHA_TAG, Version
from pipelines.settings import Plan, TrackingConfig, VerbConfig

log = logging.getLogger(__name__)


class ModelsConfig(VerbConfig):
    """Which model is looked at, and how much of it."""

    tracking: TrackingConfig = TrackingConfig()
    version: int | None = pydantic.Field(None, ge=1)
    """One version, with all that is known of it; empty = a list of them."""
    alias: str = CHAMPION
    """The alias whose figures are shown: those that a version was promoted to it by, or else registered with."""
    figures: tuple[str, ...] = ("retrieval.same_object_r1", "generation.sound.object", "generation.sound.ambience")
    """Figures of the list, by their dotted names in evaluate.json."""
    newest: int = pydantic.Field(20, ge=1, le=1000)
    """Versions, and attempts of promotion, that are listed."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        where = f"{self.tracking.model_name} in {self.tracking.uri}"
        return Plan(inputs={"registry": where}, outputs={}, resources={"cluster": "none, this process"})


CONFIG = ModelsConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--version", type=int, metavar="N", help="all that is known of one version")
    parser.add_argument("--newest", type=int, metavar="N", help="how many versions and attempts are listed")
    return {"version": "version", "newest": "newest"}


def run(config: ModelsConfig) -> dict[str, Any]:
    """Prints and returns what the registry holds. Raises UserError where there is no such model or version."""
    store.must_exist(config.tracking)
    found = versions.listing(config.tracking)
    if not found:
        rule = f"no model {config.tracking.model_name!r} is registered in {config.tracking.uri}"
        raise UserError("tracking.model_name", config.tracking.model_name, rule, "run `aai promote`, or name another")
    if config.version is not None:
        return one(config, found)
    shown = [_row(config, version) for version in found[: config.newest]]
    moved = attempts(config.tracking, config.newest)
    print(table(["version", "aliases", "registered", "bundle", "gates", *config.figures], shown))
    if len(found) > len(shown):
        print(f"{len(found) - len(shown)} older versions: --newest {len(found)}")
    if moved:
        columns = ["turn", "at", "outcome", "alias", "version", "was", "by", "reason"]
        print("\n" + table(columns, [[str(move[name]) for name in columns] for move in moved]))
    aliases = {alias: version.version for version in found for alias in version.aliases}
    log.info(
        "models: %s has %d versions; %s", config.tracking.model_name, len(found),
        ", ".join(f"{alias} is {number}" for alias, number in sorted(aliases.items())) or "no alias is set",
    )  # fmt: skip
    return {"versions": len(found), "aliases": aliases, "attempts": moved}


def one(config: ModelsConfig, found: Sequence[Version]) -> dict[str, Any]:
    """Prints and returns all that is known of one version."""
    by_number = {version.version: version for version in found}
    version = by_number.get(config.version or 0)
    if version is None:
        rule = f"{config.tracking.model_name} has the versions {min(by_number)} to {max(by_number)}"
        raise UserError("version", config.version, rule, "see them with `aai models`")
    known = {name: _plain(text) for name, text in version.tags.items()}
    told = {
        "version": version.version,
        "aliases": list(version.aliases),
        "registered": _date(version.created_ms),
        **known,
    }
    for name, value in told.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, figure in sorted(value.items()):
                print(f"  {key:<56} {figure:.4g}" if isinstance(figure, float) else f"  {key:<56} {figure}")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            print(f"{name}:")
            rows = [[str(item.get(key)) for key in ("gate", "value", "bound", "passed")] for item in value]
            print(table(["  gate", "value", "bound", "passed"], [["  " + row[0], *row[1:]] for row in rows]))
        else:
            print(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return told


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of texts under their columns."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = []
    for row in [columns, *rows]:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines)


def _row(config: ModelsConfig, version: Version) -> list[str]:
    recorded: Any = version.tags.get(figures_tag(config.alias), version.tags.get("metrics", "{}"))
    figures: Mapping[str, float] = json.loads(recorded)
    passed = {"true": "passed", "false": "refused"}.get(version.tags.get("gates_passed", ""), "")
    passed = "forced" if version.tags.get("forced") == "true" else passed
    shown = [f"{figures[name]:.3f}" if name in figures else "" for name in config.figures]
    names = ", ".join(version.aliases)
    return [str(version.version), names, _date(version.created_ms), version.tags.get(SHA_TAG, ""), passed, *shown]


def _date(time_ms: int) -> str:
    """UTC, to the minute."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M")


def _plain(text: str) -> Any:
    """A tag's value: JSON where it is a structure."""
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text
