"""Writes the toy world: real .mp4 clips with captions and planted defects, all from one seed.

Clips go to OUT/clips with OUT/manifest.csv; --images adds captioned pictures for the foundation recipe under
OUT/captioned. A world that is there already with the same settings is kept; an unfinished one is made again.
"""

import argparse
import logging
import time
from typing import Any

import pydantic

from aai import storage
from aai.errors import UserError
from aai.toy import writer
from pipelines.engine.lock import is_empty, locked
from pipelines.settings import Plan, VerbConfig

log = logging.getLogger(__name__)

REMEDY = "choose another folder or delete it"


class WorldConfig(VerbConfig):
    """Settings of `aai world`."""

    out: str = "${run_dir}/world"
    """Folder or s3:// prefix of the world."""
    clips: int = pydantic.Field(2400, ge=0)
    """Clips to write, planted ones included; 0 writes none."""
    images: int = pydantic.Field(0, ge=0)
    """Captioned pictures to write under OUT/captioned."""
    seed: int = pydantic.Field(1, ge=0)
    """Everything follows from it."""
    processes: int = pydantic.Field(2, ge=1)
    """Processes that write clips."""
    shares: dict[str, float] = pydantic.Field(default_factory=dict)
    """Shares of planted kinds other than the usual ones, e.g. {wrong_audio: 0.3}."""

    @pydantic.field_validator("shares")
    @classmethod
    def _known_kinds(cls, shares: dict[str, float]) -> dict[str, float]:
        if unknown := set(shares) - set(writer.KINDS):
            raise ValueError(f"no such kind: {', '.join(sorted(unknown))}; kinds: {', '.join(writer.KINDS)}")
        total = sum(shares.get(kind, spec.share) for kind, spec in writer.KINDS.items())
        if total > 1 or min(shares.values(), default=0) < 0:
            raise ValueError(f"shares of all kinds add up to {total:.2f}; they must be within 0..1")
        return shares

    def plan(self) -> Plan:
        """What the command would do."""
        outputs = {"world": storage.absolute(self.out), "clips": str(self.clips), "images": str(self.images)}
        return Plan(inputs={}, outputs=outputs, resources={"processes": str(self.processes)})


CONFIG = WorldConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags, each with the setting it stands for."""
    parser.add_argument("--out", metavar="DIR", help="folder or s3:// prefix of the world")
    parser.add_argument("--clips", type=int, metavar="N", help="clips to write")
    parser.add_argument("--images", type=int, metavar="N", help="captioned pictures to write")
    parser.add_argument("--seed", type=int, metavar="S", help="seed of everything")
    return {"out": "out", "clips": "clips", "images": "images", "seed": "seed"}


def _content(config: WorldConfig) -> dict[str, Any]:
    """The settings that decide what the files hold."""
    content = {"version": writer.VERSION, "seed": config.seed, "clips": config.clips, "images": config.images}
    return content | ({"shares": config.shares} if config.shares else {})


def _state(config: WorldConfig, out: str) -> dict[str, Any]:
    """What writer.json in `out` says; empty for a fresh folder. Raises UserError for foreign files there."""
    marker = storage.join(out, "world.json")
    if storage.exists(marker):
        state: dict[str, Any] = storage.read_json(marker)
        if state.get("content") == _content(config):
            return state
        raise UserError("out", out, f"holds another world ({state.get('content')})", REMEDY)
    if not is_empty(out):
        raise UserError("out", out, "is not empty and holds no world", REMEDY)
    return {}


@locked
def run(config: WorldConfig) -> dict[str, Any]:
    """Writes the world, or finds it written. Returns clips, defects, oddities, images and seconds."""
    out = storage.absolute(config.out)
    state = _state(config, out)
    if state.get("finished"):
        log.info("world: kept, %d clips are there with the same settings -> %s", config.clips, config.out)
        return dict(state["figures"])
    marker = storage.join(out, "world.json")
    storage.write_json(marker, {"content": _content(config), "finished": False})
    start, workers = time.monotonic(), config.processes
    figures: dict[str, Any] = {"clips": 0, "defects": 0, "oddities": 0, "images": config.images}
    if config.clips:
        figures.update(writer.write_world(out, config.clips, config.seed, workers, shares=config.shares))
    if config.images:
        writer.write_images(storage.join(out, "captioned"), config.images, config.seed, workers)
    figures["seconds"] = round(time.monotonic() - start, 1)
    storage.write_json(marker, {"content": _content(config), "finished": True, "figures": figures})
    log.info(
        "world: %d clips (%d planted defects, %d oddities)%s in %.1f s -> %s",
        figures["clips"],
        figures["defects"],
        figures["oddities"],
        f", {config.images} pictures" if config.images else "",
        figures["seconds"],
        config.out,
    )
    return figures
