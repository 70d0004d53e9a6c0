"""Runs a chain of commands, from clips to a promoted model, and again only what something changed for.

    aai run                                               # the demo's chain on this machine
    aai run align adapt evaluate --dry-run                # of its stages these: what is to do, why, and how long
    aai run --config configs/run/vggsound_vitl14_gpu8.yaml --address auto
    aai submit run --config configs/run/vggsound_vitl14_gpu8.yaml --cluster infra/clusters/kubernetes.yaml

Each stage is a command and a process of its own, with the settings and resources of its own config. A stage whose
settings, inputs and code are what they were is skipped; what they were stands in RUN_DIR/_run/VERB.json. One that
breaks off, since a node died, goes on where it stopped; after a mistake in the settings or a gate that says no, the
run ends. Run the same command again to go on.
"""

import argparse
import logging
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pydantic

from aai import storage
from aai.errors import UserError
from pipelines.__main__ import config_file, load_config
from pipelines.chain.launch import INTERRUPTED, USER_ERROR, launch, told
from pipelines.chain.stages import (
    RECORDS,
    ChainStage,
    StageRecord,
    Verb,
    changes,
    estimate,
    kept_record,
    out_of,
    places_of,
    record_file,
    record_of,
)
from pipelines.checkup import doors
from pipelines.engine.lock import output_lock
from pipelines.settings import Plan, RayVerbConfig, VerbConfig

log = logging.getLogger(__name__)


class RunConfig(VerbConfig):
    """Settings of `aai run`. What a stage occupies stands in its own config."""

    stages: tuple[ChainStage, ...]
    """The commands in their order: {verb: curate, config: FILE, set: [NAME=VALUE, ...]}."""
    address: str | None = None
    """Ray cluster of all stages: auto, HOST:PORT or ray://HOST:PORT; empty = what their own configs name."""
    only: tuple[Verb, ...] = ()
    """Of these the ones to run; empty = all."""
    first: Verb | None = None
    """The stage to begin with; what is before it is taken as it lies there."""
    last: Verb | None = None
    """The stage to end after."""
    attempts: int = pydantic.Field(3, ge=1, le=100)
    """How often a stage that breaks off is begun; it goes on where it stopped."""
    away_s: float = pydantic.Field(600, ge=0)
    """How long a cluster at HOST:PORT that does not answer is waited for, before a stage that broke off goes on."""
    doctor: bool = True
    """Look first for what would stop the run (`aai doctor`), if there is anything to do."""
    estimate: str = "${run_dir}/plan/plan.json"
    """What `aai plan` wrote: hours of each stage."""
    shape: str | None = None
    """The kind of node in it that is meant; empty = its first."""
    node_cost_per_h: float | None = pydantic.Field(None, ge=0)
    """Price of a node for an hour, in any currency; then costs are told."""

    @pydantic.model_validator(mode="after")
    def _stages_are_known(self) -> "RunConfig":
        verbs = [stage.verb for stage in self.stages]
        if len(set(verbs)) < len(verbs):
            raise ValueError(f"stages: {', '.join(verbs)}: a command can stand there once")
        for name in (*self.only, self.first, self.last):
            if name is not None and name not in verbs:
                raise ValueError(f"{name} is no stage of this run; it has {', '.join(verbs)}")
        return self

    def chosen(self) -> list[ChainStage]:
        """The stages that this run is about."""
        verbs = [stage.verb for stage in self.stages]
        begin = verbs.index(self.first) if self.first else 0
        end = verbs.index(self.last) + 1 if self.last else len(verbs)
        return [stage for stage in self.stages[begin:end] if not self.only or stage.verb in self.only]

    def plan(self) -> Plan:
        """See VerbConfig."""
        stages = {stage.verb: text for stage, text in zip(self.chosen(), outlook(self), strict=True)}
        where = self.address or "what the stages' configs name, else this machine"
        outputs = {"records": storage.join(self.run_dir, RECORDS)}
        return Plan(inputs={}, outputs=outputs, resources={"cluster": where}, stages=stages)


CONFIG = RunConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="run these stages alone [all]")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="begin with this stage")
    parser.add_argument("--until", metavar="STAGE", help="end after this stage")
    parser.add_argument("--address", metavar="ADDR", help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    parser.add_argument("--run-dir", metavar="DIR", help="folder or s3:// prefix of the run")
    return {"stages": "only", "first": "first", "until": "last", "address": "address", "run_dir": "run_dir"}


def run(config: RunConfig) -> dict[str, Any]:
    """Runs what is to be run; returns what was done and what was left. Raises UserError where a stage failed,
    SystemExit where it broke off."""
    begin_s, chosen = time.monotonic(), config.chosen()
    configs = {stage.verb: settings_of(config, stage) for stage in chosen}  # before hours of work: all are valid
    done, hours = list[str](), planned(config)
    with output_lock(storage.join(config.run_dir, RECORDS)):
        for number, stage in enumerate(chosen, 1):
            now, settings = record_of(stage.verb, configs[stage.verb]), configs[stage.verb]
            kept = kept_record(config.run_dir, stage.verb)
            why = changes(kept, now, settings)
            head = f"[{number}/{len(chosen)}] {stage.verb}"
            if kept is not None and not why:
                log.info("%s: unchanged since %s, skipped", head, kept.finished)
                continue
            if config.doctor and not done:
                look_first(config, chosen)
            log.info("\n%s: %s%s", head, "; ".join(why), price(config, hours, stage.verb))
            perform(config, stage, settings)
            done.append(stage.verb)
    left = [stage.verb for stage in chosen if stage.verb not in done]
    seconds = round(time.monotonic() - begin_s, 1)
    log.info("\nrun: finished in %.1f s; done: %s; unchanged: %s", seconds, listed(done), listed(left))
    return {"done": done, "unchanged": left, "seconds": seconds}


def listed(names: Sequence[str]) -> str:
    """Names for a line of the log."""
    return ", ".join(names) or "none"


def settings_of(config: RunConfig, stage: ChainStage) -> VerbConfig:
    """A stage's config as its command will load it."""
    return load_config(stage.verb, stage.words(config.run_dir))[0]


def perform(config: RunConfig, stage: ChainStage, settings: VerbConfig) -> None:
    """Runs a stage and keeps what it was made of. Raises UserError for a mistake, SystemExit where it broke off."""
    address = config.address
    words = stage.words(config.run_dir)
    if address and isinstance(settings, RayVerbConfig):
        words += ["--address", address]
    before = record_of(stage.verb, settings)  # of what it reads, not of what somebody changes meanwhile
    begin_s = time.monotonic()
    code, attempts = launch(stage.verb, words, config.attempts, ready=partial(wait_for, address, config.away_s))
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == USER_ERROR:
        remedy = "mend that and run the same command again: it goes on here"
        raise UserError("stage", stage.verb, "failed; what it said stands above", remedy)
    if code != 0:  # another try may do: who started us is told so by another code than of a mistake
        told_of = (stage.verb, attempts, told(code))
        log.error("run: stage %s broke off %d times (%s); run the same command again: it goes on here", *told_of)
        raise SystemExit(code if code > 0 else 128 - code)
    record = before.ended(settings, time.monotonic() - begin_s, attempts)
    storage.write_json(record_file(config.run_dir, stage.verb), record.model_dump())


def wait_for(address: str | None, most_s: float) -> None:
    """Returns when a cluster at HOST:PORT answers, or after the time given; at once for what is no such address."""
    if address is None or not re.fullmatch(r"(ray://)?[^/]+:\d+", address):
        return
    host, port = doors.split(address.removeprefix("ray://"))
    end_s = time.monotonic() + most_s
    while doors.listens(host, port) != "yes" and time.monotonic() < end_s:
        log.info("run: %s does not answer, waiting", address)
        time.sleep(5.0)


def look_first(config: RunConfig, chosen: list[ChainStage]) -> None:
    """`aai doctor` on what is to be run. Raises UserError where it found what would stop the run."""
    files = [f"{stage.verb}={config_file(stage.config)}" for stage in chosen]
    words = [*files, "--set", f"run_dir={config.run_dir}"]
    if config.address:
        words += ["--address", config.address]
    log.info("run: aai doctor looks first (doctor=false leaves it out)")
    code, _ = launch("doctor", words, attempts=1)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0:
        raise UserError("stage", "doctor", "found what would stop the run", "see above, or --set doctor=false")


def outlook(config: RunConfig) -> list[str]:
    """For each stage whether it would run, why, and what that takes."""
    plan, lines, before = planned(config), list[str](), list[str]()
    for stage in config.chosen():
        settings = settings_of(config, stage)
        kept: StageRecord | None = kept_record(config.run_dir, stage.verb)
        why = changes(kept, record_of(stage.verb, settings), settings)
        after = [name for name in before if reads_of(config, stage, name)]
        if not why and not after and kept is not None:
            lines.append(f"unchanged since {kept.finished}")
            continue
        before.append(stage.verb)
        reasons = [*why, *([f"after {', '.join(after)}"] if after else [])]
        lines.append(f"to do ({'; '.join(reasons)}){price(config, plan, stage.verb)}")
    return lines


def planned(config: RunConfig) -> dict[str, Any] | None:
    """What `aai plan` found; None where it was not run."""
    return dict(storage.read_json(config.estimate)) if storage.exists(config.estimate) else None


def reads_of(config: RunConfig, stage: ChainStage, before: str) -> bool:
    """Whether a stage reads what another one of the run writes."""
    other = next(one for one in config.stages if one.verb == before)
    made = storage.absolute(out_of(settings_of(config, other))).rstrip("/")
    places = places_of(settings_of(config, stage)).values()
    return any(f"{storage.absolute(place).rstrip('/')}/".startswith(f"{made}/") for place in places)


def price(config: RunConfig, plan: dict[str, Any] | None, verb: Verb) -> str:
    """Time and cost of a stage, where `aai plan` has told its hours."""
    hours = estimate(plan, verb, config.shape)
    if plan is None or hours is None:
        return ""
    told = f", {hours:.3g} h on {plan['nodes']} nodes"
    return told if config.node_cost_per_h is None else f"{told}, {hours * plan['nodes'] * config.node_cost_per_h:.3g}"
