"""Registers a bundle, checks its evaluation against gates, and moves the alias `champion`; `--rollback` moves it back.

Gates fail closed: a figure that is missing or not a number is a failed gate. Every attempt, refused ones too, leaves an
MLflow run `promotion` with who, when, why and the table of gates. The same bundle is never registered twice. Each alias
has a `previous` of its own, and a move that breaks off half-way is finished, or forgotten, by the next command.
"""

import argparse
import getpass
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypedDict

import pydantic

from aai import storage
from aai.bundle import Bundle, read_bundle
from aai.errors import UserError
from aai.signatures import TrustConfig, check
from aai.version import code_version
from pipelines.evaluation.paired import paired, read_marks
from pipelines.registry import evaluations, tracking, versions
from pipelines.registry.evaluations import Evaluation
from pipelines.registry.figures import numbers
from pipelines.registry.gates import Gate, Verdict, check_champion, check_gate, incomparable, table
from pipelines.registry.history import MOVING, PROMOTION
from pipelines.registry.moves import Move, evaluation_tag, figures_tag, move_alias, named, previous_of, settle
from pipelines.registry.tickets import Claim, turn
from pipelines.registry.versions import CANDIDATE, CHAMPION, PREVIOUS
from pipelines.settings import Plan, TrackingConfig, VerbConfig

log = logging.getLogger(__name__)
RESULT = "promote.json"


class PromoteConfig(VerbConfig):
    """Which bundle to promote, by which evaluation and gates."""

    bundle: str
    """Bundle folder or s3:// prefix."""
    evaluation: str
    """evaluate.json of this bundle."""
    gates: list[Gate] = pydantic.Field(min_length=1)
    """All must pass."""
    not_worse_than_champion: dict[str, pydantic.NonNegativeFloat] = pydantic.Field({})
    """Figure (higher is better) -> how far it may fall below the present champion's, compared clip by clip: the 95 %
    interval of the difference must not reach further down. The figure must be a mean over clips."""
    expected_current: int | None = pydantic.Field(None, ge=0)
    """Go on only if this version is champion now (0 = there is none); empty = whatever it is."""
    alias: str = pydantic.Field(CHAMPION, max_length=200)
    """Alias that marks the version in use."""
    tracking: TrackingConfig = TrackingConfig()
    trust: TrustConfig = TrustConfig()
    """Whose signature the bundle must have; a version that a rollback brings back too."""
    rollback: bool = False
    """Swap the alias and its previous version instead of promoting; a second time swaps them back."""
    force: bool = False
    """Promote although gates fail; needs a reason, and stands with the version and in the audit run."""
    reason: str = ""
    """Why: kept with the version and in the audit run."""
    out: str
    """Folder of promote.json."""

    @pydantic.model_validator(mode="after")
    def _says_why(self) -> Self:
        if self.force and (self.rollback or not self.reason.strip()):
            raise ValueError("force goes with a reason, and with no rollback, which needs no gate")
        return self

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
    parser.add_argument("--force", action="store_true", help="promote although gates fail; with --reason")
    parser.add_argument("--reason", metavar="TEXT", help="why; kept in the audit run")
    return {"bundle": "bundle", "rollback": "rollback", "force": "force", "reason": "reason"}


class Signature(TypedDict):
    """Who promoted, when, why, and by which code."""

    by: str
    at: str
    """UTC, ISO 8601."""
    reason: str
    written_by: str
    """Version and commit."""


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What promote.json and the audit run hold."""

    name: str
    """The registered model."""
    version: int | None
    """The version that was looked at; after a rollback the one that is back, None = nothing is."""
    alias: str
    """What the version is called now: the alias, or `candidate` when a gate refused it."""
    champion: int | None
    """What the alias names now."""
    was: int | None
    """What it named before."""
    previous: int | None
    """What its `previous` names now."""
    passed: bool
    """Whether all gates passed."""
    forced: bool = False
    """Promoted although they did not."""
    bundle: str | None = None
    """Content identity of the bundle; a rollback reads none."""
    gates: tuple[Verdict, ...] = ()
    by: str
    at: str
    reason: str
    written_by: str


def run(config: PromoteConfig) -> dict[str, Any]:
    """Promotes or rolls back; returns what promote.json holds. Raises UserError when a gate fails."""
    return _plain(rollback(config) if config.rollback else promote(config))


@contextmanager
def _my_turn(config: PromoteConfig, tags: Mapping[str, Any]) -> Iterator[tuple[tracking.OpenRun, Claim]]:
    """The run of an attempt, and its turn; what another one left half done is settled."""
    cfg, params = config.tracking, config.model_dump(mode="json")
    with tracking.run(cfg, PROMOTION, params, tags) as audit:
        try:
            with turn(cfg, audit, f"{tags['by']} (run {audit.run_id})") as mine:
                audit.set_tags({"turn": mine.number})
                settle(cfg, config.alias)
                yield audit, mine
        except UserError as error:
            with suppress(UserError):  # what went wrong is more than that it could not be noted
                if audit.tag("outcome") is None:
                    audit.set_tags({"outcome": "error", "error": str(error)})
            raise


def promote(config: PromoteConfig) -> Promotion:
    """Registers, gates and promotes a bundle. A refused bundle stays registered as `candidate`."""
    cfg, alias = config.tracking, config.alias
    bundle = read_bundle(config.bundle)
    if bundle.config.adapter is None:
        raise UserError("bundle", config.bundle, "has no adapter, it cannot paint", "promote the one of `aai adapt`")
    signed_by = check(bundle.folder, config.trust, config.bundle)
    evaluation = recorded_evaluation(config, bundle)
    figures = evaluation.figures
    signature = _signature(config)
    about = {"data_fingerprint": bundle.meta.get("data_fingerprint", ""), "signed_by": signed_by}
    tags: dict[str, Any] = {**signature, **about}
    with _my_turn(config, tags) as (audit, mine):
        current = _check_current(config)
        audit.log_metrics(figures)
        version = _registered(config, bundle, figures, tags)
        versions.set_alias(cfg, CANDIDATE, version)
        verdicts = _judge(config, evaluation, current, version)
        passed = all(verdict.passed for verdict in verdicts)
        forced = config.force and not passed
        tags |= {"gates": [asdict(verdict) for verdict in verdicts], "gates_passed": str(passed).lower()}
        tags |= {"forced": str(forced).lower()}
        previous = versions.get_alias(cfg, previous_of(alias))
        if not passed and not forced:
            _mark_refused(cfg, version, tags)
        elif current != version:
            if current and not _same_bundle(cfg, current, bundle):  # one that lost its files is no way back
                previous = current
            previous = None if previous == version else previous
            tags[figures_tag(alias)] = numbers(figures)
            tags[evaluation_tag(alias)] = {"sha": figures["sha"], "run": evaluation.run_id}
            mine.check()
            _note_move(audit, version, current)
            move_alias(cfg, alias, Move(version=version, previous=previous, tags=tags))
        result = Promotion(
            name=cfg.model_name,
            version=version,
            alias=alias if passed or forced else CANDIDATE,
            champion=version if passed or forced else current,
            was=current,
            previous=previous,
            passed=passed,
            forced=forced,
            bundle=bundle.sha,
            gates=tuple(verdicts),
            **signature,
        )
        _record(config, audit, result, "promoted" if passed else "forced" if forced else "refused")
    _announce(config, result)
    return result


def rollback(config: PromoteConfig) -> Promotion:
    """Swaps an alias and its previous version; the first is withdrawn. Raises UserError when there is neither."""
    cfg, alias = config.tracking, config.alias
    signature = _signature(config)
    with _my_turn(config, {**signature}) as (audit, mine):
        current, back = _check_current(config), versions.get_alias(cfg, previous_of(alias))
        if current is None and back is None:
            raise UserError("rollback", True, f"{cfg.model_name} has no {alias} yet", "run `aai promote` first")
        if back is not None:
            _fetch(config, back)
        mine.check()
        _note_move(audit, back, current)
        move_alias(cfg, alias, Move(version=back, previous=current))
        result = Promotion(
            name=cfg.model_name,
            version=back,
            alias=alias,
            champion=back,
            was=current,
            previous=current,
            passed=True,
            **signature,
        )
        _record(config, audit, result, "rolled back")
    log.info("promote: rolled back, %s of %s is %s (was %s)", alias, cfg.model_name, named(back), named(current))
    if back is None:
        log.warning("promote: nothing can be served until `aai promote` or another --rollback sets %s", alias)
    return result


def read_evaluation(uri: str, bundle: Bundle) -> dict[str, Any]:
    """What evaluate.json holds. Raises UserError when it is absent, changed, or about another bundle."""
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
    if "sha" not in evaluation:
        raise UserError("evaluation", uri, "was written by an older release, which did not seal it", remedy + " again")
    if not evaluations.is_sealed(evaluation):
        raise UserError("evaluation", uri, "was changed after `aai evaluate` wrote it", remedy + " again")
    return evaluation


def recorded_evaluation(config: PromoteConfig, bundle: Bundle) -> Evaluation:
    """The evaluation as MLflow has it on record. Raises UserError when no run of `aai evaluate` made it."""
    tags = evaluations.tags_of(read_evaluation(config.evaluation, bundle))
    found = evaluations.find(config.tracking, tags)
    if found is None:
        rule = f"is on record in no finished run of {config.tracking.experiment} in {config.tracking.uri}"
        remedy = "run `aai evaluate` again with this tracking.uri and experiment: it puts on record what is done"
        raise UserError("evaluation", config.evaluation, rule, remedy)
    return found


def _registered(config: PromoteConfig, bundle: Bundle, figures: Mapping[str, Any], tags: Mapping[str, Any]) -> int:
    """A version from which this bundle can be fetched; registered anew where the one that there was has lost it."""
    cfg = config.tracking
    version = versions.register(cfg, bundle.folder, figures, tags)
    try:
        _fetch(config, version)
    except UserError as error:
        if error.setting != "bundle":  # the server, not the files
            raise
        log.warning("promote: version %d cannot be used, the bundle is registered anew (%s)", version, error)
        version = versions.register(cfg, bundle.folder, figures, tags, anew=True)
        _fetch(config, version)
    return version


def _fetch(config: PromoteConfig, version: int) -> None:
    """Raises UserError when a version's files are not in the registry as they were registered, and signed."""
    uri = f"models:/{config.tracking.model_name}/{version}"
    with tempfile.TemporaryDirectory(prefix="aai-") as scratch:
        check(Path(versions.resolve_bundle(uri, config.tracking, scratch)), config.trust, uri)


def _judge(config: PromoteConfig, evaluation: Evaluation, current: int | None, version: int) -> list[Verdict]:
    """All gates, and those against the present champion when that is another version."""
    verdicts = [check_gate(gate, evaluation.figures) for gate in config.gates]
    if current is None or current == version or not config.not_worse_than_champion:
        return verdicts
    champion = _champions(config, evaluation, current)
    if champion is None:
        why = f"version {current} has no evaluation on record with these settings on these clips"
        remedy = f"evaluate the bundle of version {current} with them, then promote again"
        return [*verdicts, *incomparable(config.not_worse_than_champion, evaluation.figures, why, remedy)]
    ours, theirs = read_marks(evaluation.marks), read_marks(champion.marks)
    found = {name: paired(name, ours, theirs) for name in config.not_worse_than_champion}
    return [*verdicts, *check_champion(config.not_worse_than_champion, evaluation.figures, found)]


def _same_bundle(cfg: TrackingConfig, version: int, bundle: Bundle) -> bool:
    return versions.version_tags(cfg, version).get(versions.SHA_TAG) == bundle.sha


def _champions(config: PromoteConfig, evaluation: Evaluation, current: int) -> Evaluation | None:
    """The champion's evaluation with the same settings on the same clips: the one it was promoted by, or the first."""
    tags = versions.version_tags(config.tracking, current)
    wanted = evaluations.tags_of(evaluation.figures) | {"bundle": tags.get(versions.SHA_TAG, "")}
    promoted_by = json.loads(tags.get(evaluation_tag(config.alias), "{}")).get("sha", "")
    first = {name: value for name, value in wanted.items() if name != "evaluation"}
    found = evaluations.find(config.tracking, {**wanted, "evaluation": promoted_by}) if promoted_by else None
    return found or evaluations.find(config.tracking, first)


def _check_current(config: PromoteConfig) -> int | None:
    """The champion's version now. Raises UserError when another one was expected."""
    current = versions.get_alias(config.tracking, config.alias)
    if config.expected_current is not None and (current or 0) != config.expected_current:
        rule = f"{config.alias} is {named(current)} now: somebody else moved it"
        raise UserError("expected_current", config.expected_current, rule, "look at the new one, then try again")
    return current


def _mark_refused(cfg: TrackingConfig, version: int, tags: Mapping[str, Any]) -> None:
    """Marks a version with the gates it failed, unless it was promoted before: that record stays."""
    before = versions.version_tags(cfg, version)
    if "true" not in (before.get("gates_passed"), before.get("forced")):
        versions.set_version_tags(cfg, version, tags)


def _note_move(audit: tracking.OpenRun, version: int | None, was: int | None) -> None:
    """Says what is about to happen: a run that is killed now may have moved the alias."""
    audit.set_tags({"outcome": MOVING, "version": version or 0, "was": was or 0})


def _record(config: PromoteConfig, audit: tracking.OpenRun, result: Promotion, outcome: str) -> None:
    audit.set_tags({"outcome": outcome, "version": result.version or 0, "was": result.was or 0})
    audit.log_json(RESULT, _plain(result))
    storage.write_json(storage.join(config.out, RESULT), _plain(result))


def _plain(result: Promotion) -> dict[str, Any]:
    """The result as JSON holds it; a rollback names no bundle."""
    plain = asdict(result) | {"gates": [asdict(verdict) for verdict in result.gates]}
    return {key: value for key, value in plain.items() if key != "bundle" or value is not None}


def _announce(config: PromoteConfig, result: Promotion) -> None:
    """Tells the verdicts and the outcome. Raises UserError when a gate failed."""
    log.info("%s", table(result.gates))
    failed = [verdict for verdict in result.gates if not verdict.passed]
    count = f"{len(result.gates) - len(failed)} of {len(result.gates)} gates passed"
    if failed and not result.forced:
        first = failed[0]
        shown = "missing" if first.value is None else f"{first.value:.6g}"
        rule = f"must be {first.bound}, {count}; {config.alias} stays {named(result.was)}"
        remedy = first.remedy or "improve the bundle"
        raise UserError(first.gate, shown, rule, f"{remedy}; version {result.version} is kept as {CANDIDATE}")
    was = result.was or "unset"
    if failed:
        names = ", ".join(verdict.gate for verdict in failed)
        log.warning("promote: forced by %s (%s) although these gates failed: %s", result.by, result.reason, names)
    log.info("promote: %s version %d is %s (was %s); %s", result.name, result.version, result.alias, was, count)


def _signature(config: PromoteConfig) -> Signature:
    try:
        who = getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        who = "unknown"
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return Signature(by=who, at=at, reason=config.reason, written_by=code_version())
