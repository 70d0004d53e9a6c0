"""Clips that must go: what holds them, and how to make what comes next without them. It deletes nothing itself.

    aai takedown --clips gone.txt         # a clip id, SHA-256 of a file, or URI a line
    aai curate --set exclude=runs/demo/takedown/exclude.txt --rejudge

It lists the tables (also what curate measured and rejected), trainings, versions and aliases that have them, into
OUT/takedown.json, and writes OUT/exclude.txt, which curate leaves out with all that looks and sounds alike.
"""

import argparse
import logging
from typing import Any

from aai import storage
from aai.errors import UserError
from pipelines.manifests.listed import read_list
from pipelines.settings import Plan, TrackingConfig, VerbConfig
from pipelines.tracing.telling import named, print_spread
from pipelines.tracing.walks import spread_of

log = logging.getLogger(__name__)
RESULT, EXCLUDE = "takedown.json", "exclude.txt"


class TakedownConfig(VerbConfig):
    """Which clips, and where to look."""

    clips: str | None = None
    """Text file: a clip id, SHA-256 of a clip's file, or URI a line."""
    tables: tuple[str, ...] = ()
    """FeatureTables and folders of `aai curate` that no training names."""
    out: str
    """Folder of takedown.json and exclude.txt."""
    tracking: TrackingConfig = TrackingConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        where = f"{self.tracking.model_name} in {self.tracking.uri}"
        outputs = {"list": storage.join(self.out, RESULT), "for curate": storage.join(self.out, EXCLUDE)}
        inputs = {"clips": self.clips or "(--clips)", "registry": where}
        return Plan(inputs=inputs, outputs=outputs, resources={"cluster": "none, this process"})


CONFIG = TakedownConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--clips", metavar="FILE", help="text file, a clip id, SHA-256 or URI a line")
    parser.add_argument("--out", metavar="DIR", help="folder of the list")
    return {"clips": "clips", "out": "out"}


def run(config: TakedownConfig) -> dict[str, Any]:
    """Prints, writes and returns what has the clips. Raises UserError for a list that says nothing."""
    if config.clips is None:
        raise UserError("clips", "(missing)", "there is nothing to look for", "give --clips FILE")
    wanted = read_list("clips", config.clips)
    spread = spread_of(config.tracking, wanted, config.tables)
    print_spread(spread)
    absent = sorted(wanted.difference(*(holding.asked for holding in spread.holdings)))
    for name in absent:
        print(f"nowhere    {name}")
    hashes = frozenset(text for holding in spread.holdings for text in holding.hashes)
    lines = ["# clips taken down: ids, content hashes (any copy of a file), URIs", *sorted(wanted | hashes)]
    exclude = storage.join(storage.absolute(config.out), EXCLUDE)
    storage.write_bytes(exclude, "".join(f"{line}\n" for line in lines).encode())
    result = {"clips": sorted(wanted), **spread.told(), "nowhere": absent, "exclude": exclude}
    storage.write_json(storage.join(config.out, RESULT), result)
    in_use = ", ".join(f"{version.version} of {version.model}{named(version)}" for version in spread.versions) or "none"
    log.info(
        "takedown: %d of %d clips found, in %d tables; %d trainings, versions %s, %d trainings unknown -> %s",
        len(wanted) - len(absent), len(wanted), len(spread.holdings), len(spread.trainings), in_use,
        len(spread.unknown), storage.join(config.out, RESULT),
    )  # fmt: skip
    log.info("takedown: for what comes next: aai curate ... --set exclude=%s --rejudge", exclude)
    return result
