"""Registers a bundle, checks its evaluation against gates, and moves the alias `champion`; `--rollback` moves it back.

Gates fail closed: a figure that is missing or not a number is a failed gate. Every attempt, refused ones too, leaves an
MLflow run `promotion` with who, when, why and the table of gates. The same bundle is never registered twice. Each alias
has a `previous` of its own, and a move that breaks off half-way is finished, or forgotten, by the next command.
"""

import argparse
import getpass
import json
import logging
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Self

import pydantic

from aai import storage
from aai.bundle import Bundle, read_bundle
from aai.config import Config
from aai.errors import UserError
from aai.version import code_version
from pipelines.registry import tracking
from pipelines.registry.figures import figure, numbers
from pipelines.registry.tracking import CANDIDATE, CHAMPION, PREVIOUS
from pipelines.settings import Plan, TrackingConfig, VerbConfig

log = logging.getLogger(__name__)
RESULT = "promote.json"


class Gate(Config):
    """One rule on one figure: min and/or max, or at least `ratio` times another figure."""

    metric: str
    """Dotted name of the figure in evaluate.json."""
    min: float | None = None
    max: float | None = None
    min_ratio_of: str | None = None
    """Dotted name of the figure this one is measured against, e.g. a ceiling."""
    ratio: float | None = pydantic.Field(None, gt=0)

    @pydantic.model_validator(mode="after")
    def _has_a_bound(self) -> Self:
        if (self.min_ratio_of is None) != (self.ratio is None):
            raise ValueError("min_ratio_of and ratio come together")
        if self.min is None and self.max is None and self.ratio is None:
            raise ValueError("a gate needs min, max, or min_ratio_of with ratio")
        return self


class Verdict(Config):
    """The outcome of one gate."""

    gate: str
    value: float | None
    """None when the figure is missing."""
    bound: str
    passed: bool


class Move(Config):
    """A move of an alias. It stands as a tag on the registered model from before the first step until after the last.

    MLflow moves one alias at a time. The alias in use is moved first, and all else is then repeatable: whether the
    alias has moved tells, after a crash, whether the rest is to be done or nothing has happened.
    """

    version: int | None
    """What the alias names afterwards; None = nothing."""
    previous: int | None
    """What the alias's `previous` names afterwards."""
    tags: dict[str, Any] = pydantic.Field({})
    """What the version is marked with: the figures it was promoted by, the gates, who, when and why."""


class PromoteConfig(VerbConfig):
    """Which bundle to promote, by which evaluation and gates."""

    bundle: str
    """Bundle folder or s3:// prefix."""
    evaluation: str
    """evaluate.json of this bundle."""
    gates: list[Gate] = pydantic.Field(min_length=1)
    """All must pass."""
    not_worse_than_champion: dict[str, pydantic.NonNegativeFloat] = pydantic.Field({})
    """Figure (higher is better) -> how far it may fall below the present champion's."""
    expected_current: int | None = pydantic.Field(None, ge=0)
    """Go on only if this version is champion now (0 = there is none); empty = whatever it is."""
    alias: str = pydantic.Field(CHAMPION, max_length=200)
    """Alias that marks the version in use."""
    tracking: TrackingConfig = TrackingConfig()
    rollback: bool = False
    """Swap the alias and its previous version instead of promoting; a second time swaps them back."""
    reason: str = ""
    """Why: kept with the version and in the audit run."""
    out: str
    """Folder of promote.json."""

    @pydantic.field_validator("alias")
    @classmethod
    def _is_free(cls, alias: str) -> str:
        # MLflow keeps `latest` and v1, v2, ... for itself, in capitals too.
        taken = alias.lower() in (CANDIDATE, PREVIOUS, "latest") or alias.lower().startswith(f"{PREVIOUS}-")
        if taken or not re.fullmatch(r"(?![vV]\d+$)[A-Za-z_][\w-]*", alias):
            raise ValueError("this alias has another meaning or cannot be one")
        return alias

    def plan(self) -> Plan:
        """See VerbConfig."""
        inputs = {} if self.rollback else {"bundle": self.bundle, "evaluation": self.evaluation}
        back = previous_of(self.alias)
        moves = f"{self.alias} <-> {back}" if self.rollback else f"{self.alias} after {len(self.gates)} gates"
        return Plan(
            inputs=inputs,
            outputs={
                "registry": f"{self.tracking.model_name} in {self.tracking.uri}",
                "alias": moves,
                "result": storage.join(self.out, RESULT),
            },
            resources={"cluster": "none, this process"},
        )


CONFIG = PromoteConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder")
    parser.add_argument("--rollback", action="store_true", help="put the previous champion back")
    parser.add_argument("--reason", metavar="TEXT", help="why; kept in the audit run")
    return {"bundle": "bundle", "rollback": "rollback", "reason": "reason"}


def previous_of(alias: str) -> str:
    """The alias of the version before: `previous` for champion, `previous-ALIAS` for any other."""
    return PREVIOUS if alias == CHAMPION else f"{PREVIOUS}-{alias}"


def run(config: PromoteConfig) -> dict[str, Any]:
    """Promotes or rolls back; returns what promote.json holds. Raises UserError when a gate fails."""
    _settle(config)
    return rollback(config) if config.rollback else promote(config)


def promote(config: PromoteConfig) -> dict[str, Any]:
    """Registers, gates and promotes a bundle. A refused bundle stays registered as `candidate`."""
    cfg = config.tracking
    bundle = read_bundle(config.bundle)
    if bundle.config.adapter is None:
        raise UserError("bundle", config.bundle, "has no adapter, it cannot paint", "promote the one of `aai adapt`")
    evaluation = read_evaluation(config.evaluation, bundle)
    current = _check_current(config)
    tags = _signature(config) | {"data_fingerprint": bundle.meta.get("data_fingerprint", "")}
    with tracking.run(cfg, "promotion", config.model_dump(mode="json"), tags) as audit:
        audit.log_metrics(evaluation)
        version = tracking.register(cfg, bundle.folder, evaluation, tags)
        tracking.set_alias(cfg, CANDIDATE, version)
        verdicts = [check_gate(gate, evaluation) for gate in config.gates]
        verdicts += check_champion(config, evaluation, current, version)
        passed = all(verdict.passed for verdict in verdicts)
        gates = [verdict.model_dump() for verdict in verdicts]
        tags |= {"gates": gates, "gates_passed": str(passed).lower()}
        previous = tracking.get_alias(cfg, previous_of(config.alias))
        if not passed:
            _mark_refused(config, version, tags)
        elif _check_current(config) != version:  # asked again: registering takes time
            previous = current or (None if previous == version else previous)
            tags |= {_figures_tag(config.alias): numbers(evaluation)}
            _move(config, Move(version=version, previous=previous, tags=tags))
        result = {
            "name": cfg.model_name,
            "version": version,
            "alias": config.alias if passed else CANDIDATE,
            "champion": version if passed else current,
            "was": current,
            "previous": previous,
            "passed": passed,
            "bundle": bundle.sha,
            "gates": gates,
            **_signature(config),
        }
        _record(config, audit, result, "promoted" if passed else "refused")
    log.info("%s", table(verdicts))
    count = f"{sum(v.passed for v in verdicts)} of {len(verdicts)} gates passed"
    if not passed:
        first = next(verdict for verdict in verdicts if not verdict.passed)
        shown = "missing" if first.value is None else f"{first.value:.6g}"
        rule = f"must be {first.bound}, {count}; {config.alias} stays {_named(current)}"
        raise UserError(first.gate, shown, rule, f"improve the bundle; version {version} is kept as {CANDIDATE}")
    was = current or "unset"
    log.info("promote: %s version %d is %s (was %s); %s", cfg.model_name, version, config.alias, was, count)
    return result


def rollback(config: PromoteConfig) -> dict[str, Any]:
    """Swaps an alias and its previous version; the first is withdrawn. Raises UserError when there is neither."""
    cfg = config.tracking
    current, back = _check_current(config), tracking.get_alias(cfg, previous_of(config.alias))
    if current is None and back is None:
        raise UserError("rollback", True, f"{cfg.model_name} has no {config.alias} yet", "run `aai promote` first")
    with tracking.run(cfg, "promotion", config.model_dump(mode="json"), _signature(config)) as audit:
        _move(config, Move(version=back, previous=current))
        result: dict[str, Any] = {
            "name": cfg.model_name,
            "version": back,
            "alias": config.alias,
            "champion": back,
            "was": current,
            "previous": current,
            "passed": True,
            "gates": [],
            **_signature(config),
        }
        _record(config, audit, result, "rolled back")
    log.info(
        "promote: rolled back, %s of %s is %s (was %s)", config.alias, cfg.model_name, _named(back), _named(current)
    )
    if back is None:
        log.warning("promote: nothing can be served until `aai promote` or another --rollback sets %s", config.alias)
    return result


def read_evaluation(uri: str, bundle: Bundle) -> dict[str, Any]:
    """The figures of evaluate.json. Raises UserError when it is absent, or is about another bundle."""
    remedy = "run `aai evaluate` on this bundle"
    if not storage.exists(uri):
        raise UserError("evaluation", uri, "no such file", remedy)
    try:
        evaluation = storage.read_json(uri)
    except ValueError as error:
        raise UserError("evaluation", uri, f"is not JSON ({error})", remedy) from error
    if not isinstance(evaluation, dict):
        raise UserError("evaluation", uri, "is not a JSON object", remedy)
    if (about := evaluation.get("bundle")) != bundle.sha:
        raise UserError("evaluation", uri, f"is about bundle {about}, this is bundle {bundle.sha}", remedy)
    return evaluation


def check_gate(gate: Gate, evaluation: Mapping[str, Any]) -> Verdict:
    """Whether a figure keeps to its gate; a missing figure does not."""
    value = figure(evaluation, gate.metric)
    low, bounds, known = gate.min, [], value is not None
    if gate.min is not None:
        bounds.append(f">= {gate.min:g}")
    if gate.max is not None:
        bounds.append(f"<= {gate.max:g}")
    if gate.min_ratio_of is not None and gate.ratio is not None:
        other = figure(evaluation, gate.min_ratio_of)
        # A share of nothing, or of less, is no bound: any figure would reach it.
        known = known and other is not None and other > 0
        shown = "missing or not a number" if other is None else f"{other:.4g}"
        shown += ", but it must be above 0" if other is not None and other <= 0 else ""
        bounds.append(f">= {gate.ratio:g} x {gate.min_ratio_of} ({shown})")
        low = max(-math.inf if low is None else low, gate.ratio * (other or 0.0))
    passed = known and value is not None and (low is None or value >= low)
    passed = passed and value is not None and (gate.max is None or value <= gate.max)
    return Verdict(gate=gate.metric, value=value, bound=" and ".join(bounds), passed=passed)


def check_champion(
    config: PromoteConfig, evaluation: Mapping[str, Any], current: int | None, version: int
) -> list[Verdict]:
    """The gates against the figures the present champion was promoted by; none when there is no other champion."""
    if current is None or current == version or not config.not_worse_than_champion:
        return []
    tags = tracking.version_tags(config.tracking, current)
    # An older release kept one set of figures for all aliases.
    recorded = json.loads(tags.get(_figures_tag(config.alias), tags.get("metrics", "{}")))
    verdicts = []
    for name, tolerance in config.not_worse_than_champion.items():
        value, theirs = figure(evaluation, name), recorded.get(name)
        bound = f">= champion's {'(missing)' if theirs is None else f'{theirs:.4g}'} - {tolerance:g}"
        passed = value is not None and theirs is not None and value >= theirs - tolerance
        verdicts.append(Verdict(gate=name, value=value, bound=bound, passed=passed))
    return verdicts


def table(verdicts: list[Verdict]) -> str:
    """The verdicts as an aligned text table."""
    rows = [("gate", "value", "bound", "verdict")]
    for v in verdicts:
        value = "missing" if v.value is None else f"{v.value:.4g}"
        rows.append((v.gate, value, v.bound, "pass" if v.passed else "FAIL"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _check_current(config: PromoteConfig) -> int | None:
    """The champion's version now. Raises UserError when another one was expected."""
    current = tracking.get_alias(config.tracking, config.alias)
    if config.expected_current is not None and (current or 0) != config.expected_current:
        rule = f"{config.alias} is {_named(current)} now: somebody else moved it"
        raise UserError("expected_current", config.expected_current, rule, "look at the new one, then try again")
    return current


def _move(config: PromoteConfig, move: Move) -> None:
    """Moves the alias and all that goes with it. What a crash leaves undone, `_settle` does."""
    tracking.set_model_tag(config.tracking, _move_tag(config.alias), move.model_dump_json())
    _point(config, config.alias, move.version)
    _finish(config, move)


def _settle(config: PromoteConfig) -> None:
    """Finishes a move of the alias that broke off after the alias had moved; forgets one that broke off before."""
    written = tracking.model_tags(config.tracking).get(_move_tag(config.alias))
    if written is None:
        return
    move = Move.parse(json.loads(written), f"tag {_move_tag(config.alias)} of {config.tracking.model_name}")
    if tracking.get_alias(config.tracking, config.alias) == move.version:
        log.warning("promote: finishing the move of %s to %s, which broke off", config.alias, _named(move.version))
        _finish(config, move)
    else:
        log.warning("promote: the move of %s to %s broke off before it began", config.alias, _named(move.version))
        tracking.delete_model_tag(config.tracking, _move_tag(config.alias))


def _finish(config: PromoteConfig, move: Move) -> None:
    """The steps after the alias itself; doing them twice is doing them once."""
    _point(config, previous_of(config.alias), move.previous)
    if move.version is not None:
        tracking.set_version_tags(config.tracking, move.version, move.tags)
    tracking.delete_model_tag(config.tracking, _move_tag(config.alias))


def _mark_refused(config: PromoteConfig, version: int, tags: Mapping[str, Any]) -> None:
    """Marks a version with the gates it failed, unless it was promoted before: that record stays."""
    if tracking.version_tags(config.tracking, version).get("gates_passed") != "true":
        tracking.set_version_tags(config.tracking, version, tags)


def _move_tag(alias: str) -> str:
    return f"move-{alias}"


def _figures_tag(alias: str) -> str:
    return f"metrics-{alias}"


def _point(config: PromoteConfig, alias: str, version: int | None) -> None:
    """Sets an alias, or removes it."""
    if version is None:
        tracking.delete_alias(config.tracking, alias)
    else:
        tracking.set_alias(config.tracking, alias, version)


def _record(config: PromoteConfig, audit: tracking.Run, result: dict[str, Any], outcome: str) -> None:
    audit.set_tags({"outcome": outcome, "version": result["version"] or 0, "was": result["was"] or 0})
    audit.log_json(RESULT, result)
    storage.write_json(storage.join(config.out, RESULT), result)


def _signature(config: PromoteConfig) -> dict[str, str]:
    """Who, when, why, and by which code."""
    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        who = "unknown"
    return {
        "by": who,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "reason": config.reason,
        "written_by": code_version(),
    }


def _named(version: int | None) -> str:
    return "unset" if version is None else f"version {version}"
