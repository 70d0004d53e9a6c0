"""Where things come from and where they went: clips, trainings, versions and pictures, both ways.

    aai lineage --clip 3f2a...            # the tables, trainings, versions and aliases that have a clip
    aai lineage --version 3               # the trainings of a version, their tables, how many clips
    aai lineage --image dog.png           # the same of the model that painted a picture
    aai lineage --version 3 --out clips.csv   # and all its clips

A clip is named by its id, the SHA-256 of its file, or its URI. It reads MLflow's runs and the tables that they name,
and changes nothing. Whether a picture tells the truth about its model: `aai verify`.
"""

import argparse
import io
import logging
from typing import Any

import pyarrow.csv
import pydantic

from aai import storage
from aai.errors import UserError
from aai.proof import read_made
from pipelines.registry import versions
from pipelines.registry.versions import SHA_TAG, Version
from pipelines.settings import Plan, TrackingConfig, VerbConfig
from pipelines.tracing.telling import print_origin, print_spread, words_of
from pipelines.tracing.walks import Origin, origin_of, origin_of_picture, spread_of

log = logging.getLogger(__name__)
MAX_BYTES = 64 * 2**20


class LineageConfig(VerbConfig):
    """What is followed, and where MLflow is."""

    clip: str | None = None
    """Clip id, SHA-256 of a clip's file, or its URI."""
    version: int | None = pydantic.Field(None, ge=1)
    """A registered version."""
    image: str | None = None
    """PNG file that this project painted."""
    tables: tuple[str, ...] = ()
    """FeatureTables and folders of `aai curate` that no training names."""
    out: str | None = None
    """CSV file of all clips of the version or picture; empty = only how many."""
    tracking: TrackingConfig = TrackingConfig()

    @pydantic.model_validator(mode="after")
    def _one(self) -> "LineageConfig":
        if sum(given is not None for given in (self.clip, self.version, self.image)) > 1:
            raise ValueError("clip, version and image exclude each other: give one of them")
        return self

    def plan(self) -> Plan:
        """See VerbConfig."""
        asked = {name: str(getattr(self, name)) for name in ("clip", "version", "image") if getattr(self, name)}
        outputs = {"clips": self.out} if self.out else {}
        where = f"{self.tracking.model_name} in {self.tracking.uri}"
        return Plan(inputs={**asked, "registry": where}, outputs=outputs, resources={"cluster": "none, this process"})


CONFIG = LineageConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--clip", metavar="ID", help="clip id, SHA-256 of a clip's file, or URI")
    parser.add_argument("--version", type=int, metavar="N", help="a registered version")
    parser.add_argument("--image", metavar="FILE", help="a painted PNG file")
    parser.add_argument("--out", metavar="FILE", help="CSV file of the clips")
    return {"clip": "clip", "version": "version", "image": "image", "out": "out"}


def run(config: LineageConfig) -> dict[str, Any]:
    """Prints and returns what is found. Raises UserError for what is not known."""
    if config.clip:
        spread = spread_of(config.tracking, frozenset([config.clip]), config.tables)
        if not spread.holdings:
            why = "; ".join(spread.unknown) or "no table that a training names has it"
            remedy = "name other tables with --set tables=[FOLDER], or check tracking.uri"
            raise UserError("clip", config.clip, f"is in none of the tables ({why})", remedy)
        print_spread(spread)
        return spread.told()
    if config.version:
        return _of_version(config, _version(config))
    if config.image:
        return _of_image(config, config.image)
    raise UserError("lineage", "(nothing)", "there is nothing to follow", "give --clip, --version or --image")


def _version(config: LineageConfig) -> Version:
    found = versions.listing(config.tracking)
    for version in found:
        if version.version == config.version:
            return version
    known = f"has the versions {found[-1].version} to {found[0].version}" if found else "is not registered"
    raise UserError("version", config.version, f"{config.tracking.model_name} {known}", "see them with `aai models`")


def _of_version(config: LineageConfig, version: Version) -> dict[str, Any]:
    tags = version.tags
    origin = origin_of(config.tracking, tags.get(SHA_TAG, ""), tags.get("data_fingerprint", ""))
    print_origin(origin, [version])
    return _result(config, origin, [version])


def _of_image(config: LineageConfig, image: str) -> dict[str, Any]:
    if not storage.exists(image):
        raise UserError("image", image, "no such file", "check the path")
    made = read_made(storage.read_bytes(image, MAX_BYTES))
    if not made.get("bundle"):
        raise UserError("image", image, "does not say which model painted it", "give a PNG file as it was painted")
    print(f"{image}: {words_of(made)}")
    origin, found = origin_of_picture(config.tracking, made)
    print_origin(origin, found)
    return {"made": made, **_result(config, origin, found)}


def _result(config: LineageConfig, origin: Origin, found: list[Version]) -> dict[str, Any]:
    if config.out:
        sink = io.BytesIO()
        pyarrow.csv.write_csv(origin.clips, sink)
        storage.write_bytes(config.out, sink.getvalue())
        log.info("lineage: %d clips -> %s", len(origin.clips), config.out)
    return {
        "bundle": origin.bundle,
        "versions": [version.version for version in found],
        "runs": [training.run_id for training in origin.trainings],
        "clips": origin.by_split(),
        "unknown": list(origin.unknown),
    }
