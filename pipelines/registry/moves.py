"""Moves of an alias and of its `previous`, which a crash at any step leaves finished or forgotten.

MLflow moves one alias at a time, and a promotion moves two and writes tags. So the whole move is first written as a tag
on the registered model; then the alias itself moves; all later steps may be done twice. Whether the alias has moved
tells, after a crash, whether the rest is to be done or nothing has happened.
"""

import json
import logging
from typing import Any

import pydantic

from aai.config import Config
from pipelines.registry import versions
from pipelines.registry.versions import CHAMPION, PREVIOUS
from pipelines.settings import TrackingConfig

log = logging.getLogger(__name__)


class Move(Config):
    """Where an alias goes. It stands as a tag on the registered model from before the first step until the last."""

    version: int | None
    """What the alias names afterwards; None = nothing."""
    previous: int | None
    """What the alias's `previous` names afterwards."""
    tags: dict[str, Any] = pydantic.Field({})
    """What the version is marked with: the figures it was promoted by, the gates, who, when and why."""


def previous_of(alias: str) -> str:
    """The alias of the version before: `previous` for champion, `previous-ALIAS` for any other."""
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


def named(version: int | None) -> str:
    """What an alias names, in words."""
    return "unset" if version is None else f"version {version}"


def move_alias(cfg: TrackingConfig, alias: str, move: Move) -> None:
    """Moves the alias and all that goes with it. What a crash leaves undone, `settle` does."""
    versions.set_model_tag(cfg, _move_tag(alias), move.model_dump_json())
    _point(cfg, alias, move.version)
    _finish(cfg, alias, move)


def settle(cfg: TrackingConfig, alias: str) -> None:
    """Finishes a move of the alias that broke off after the alias had moved; forgets one that broke off before."""
    written = versions.model_tags(cfg).get(_move_tag(alias))
    if written is None:
        return
    move = Move.parse(json.loads(written), f"tag {_move_tag(alias)} of {cfg.model_name}")
    if versions.get_alias(cfg, alias) == move.version:
        log.warning("promote: finishing the move of %s to %s, which broke off", alias, named(move.version))
        _finish(cfg, alias, move)
    else:
        log.warning("promote: the move of %s to %s broke off before it began", alias, named(move.version))
        versions.delete_model_tag(cfg, _move_tag(alias))


def figures_tag(alias: str) -> str:
    """The version's tag with the figures that it was promoted to this alias by."""
    return f"metrics-{alias}"


def evaluation_tag(alias: str) -> str:
    """The version's tag with the evaluation, and its run, that it was promoted to this alias by."""
    return f"evaluation-{alias}"


def _finish(cfg: TrackingConfig, alias: str, move: Move) -> None:
    """The steps after the alias itself; doing them twice is doing them once."""
    _point(cfg, previous_of(alias), move.previous)
    if move.version is not None:
        versions.set_version_tags(cfg, move.version, move.tags)
    versions.delete_model_tag(cfg, _move_tag(alias))


def _point(cfg: TrackingConfig, alias: str, version: int | None) -> None:
    """Sets an alias, or removes it."""
    if version is None:
        versions.delete_alias(cfg, alias)
    else:
        versions.set_alias(cfg, alias, version)


def _move_tag(alias: str) -> str:
    return f"move-{alias}"
