"""The stages of a run: what each reads, what it makes, and whether it stands as it was made."""

import os
import re
from datetime import UTC, datetime
from functools import reduce
from typing import Any, Literal

import pydantic

from aai import storage
from aai.config import Config
from aai.foundation.identity import FoundationSpec, identity, pinned_by
from pipelines.chain.fingerprints import MISSING, code_fingerprint, fingerprint, flat
from pipelines.settings import VerbConfig

Verb = Literal["world", "curate", "featurize", "align", "adapt", "tune", "evaluate", "promote"]
READS = (
    "manifest", "label_names", "exclude", "input", "features", "clips", "bundle", "evaluation", "against",
    "scores.bundle", "trust.public_keys", "trust.authorities",
)  # fmt: skip
"""Settings that name what a stage reads, in all stages that have them; besides them tables of `signals`."""
FOUNDATIONS, MODELS = ("foundation", "scores.foundation"), ("encoder.pretrained", "scores.tagger", "judge.model")
"""Settings that name frozen models: of a hub id the revision counts, which is a setting, of a folder what is loaded."""
TRACKS = ("evaluate", "promote")
"""Stages whose tracking counts: what they leave there is asked for later."""
RESULTS: dict[Verb, str] = {
    "world": "world.json",
    "curate": "curate.json",
    "featurize": "manifest.json",
    "align": "align.json",
    "adapt": "adapt.json",
    "tune": "tune.json",
    "evaluate": "evaluate.json",
    "promote": "promote.json",
}
"""What a stage writes last into its `out`."""
ELSEWHERE = ("cluster", "run_dir", "out")
"""Settings of where a stage runs and writes, not of what it makes."""
RECORDS = "_run"
"""Folder of the records, in the run's."""


class ChainStage(Config):
    """A command of a run."""

    verb: Verb
    config: str
    """Its YAML file."""
    set: tuple[str, ...] = ()
    """Further settings, as for its --set."""

    def words(self, run_dir: str) -> list[str]:
        """The arguments of the command."""
        words = ["--config", self.config, "--set", f"run_dir={run_dir}"]
        for setting in self.set:
            words += ["--set", setting]
        return words


class StageRecord(Config):
    """What a stage was made of when it ended well: RUN_DIR/_run/VERB.json."""

    verb: Verb
    settings: dict[str, str]
    """By dotted name, as JSON; the run's folder stands as ${run_dir}."""
    inputs: dict[str, str]
    """Fingerprints of what was read, by setting."""
    code: str
    output: str = MISSING
    """Fingerprint of what was written."""
    finished: str = ""
    seconds: float = pydantic.Field(0.0, ge=0)
    attempts: int = 1

    def ended(self, config: VerbConfig, seconds: float, attempts: int) -> "StageRecord":
        """The record as it is kept."""
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        told = {"output": fingerprint(out_of(config)), "finished": now, "seconds": round(seconds, 1)}
        return self.model_copy(update={**told, "attempts": attempts})


def out_of(config: VerbConfig) -> str:
    """The folder that a stage writes."""
    return str(config.out)  # type: ignore[attr-defined]


def record_of(verb: Verb, config: VerbConfig, code: str | None = None) -> StageRecord:
    """What a stage would be made of now."""
    settings, base = _settings(verb, config), swept_by(config)
    if base is not None:
        settings |= {f"base.{name}": value for name, value in _settings(verb, base).items()}
    return StageRecord(verb=verb, settings=settings, inputs=inputs_of(config), code=code or code_fingerprint())


def _settings(verb: Verb, config: VerbConfig) -> dict[str, str]:
    """Those that count, as a record has them: no folder of the run, and no password of an address."""
    apart = {*ELSEWHERE, *(() if verb in TRACKS else ("tracking",))}
    settings = flat(config.model_dump(mode="json", exclude=apart))
    settings.pop("tracking.wait_s", None)
    there = {config.run_dir.rstrip("/"), storage.absolute(config.run_dir).rstrip("/")} - {""}
    places = "|".join(re.escape(place) for place in sorted(there, key=len, reverse=True))
    of_run = re.compile(rf"(?<![\w.~-])(?<!\w/)(?:{places})(?![\w.~-])(?:/(?=/))*")  # the whole of a path's names
    for name, value in settings.items():
        value = of_run.sub("${run_dir}", value) if places else value
        settings[name] = re.sub(r"://[^/\s@\"]+@", "://***@", value)
    return settings


def swept_by(config: VerbConfig) -> VerbConfig | None:
    """The stage that `aai tune` sweeps, as it stands in the file that it names."""
    told = getattr(config, "stage_config", None)
    return told() if told is not None else None


def places_of(config: VerbConfig) -> dict[str, str]:
    """{setting: file, folder or s3:// prefix} of what a stage reads."""
    found: dict[str, str] = {}
    for name in READS:
        value = _value(config, name)
        if isinstance(value, str) and value:
            found[name] = value
        elif isinstance(value, tuple):
            found |= {f"{name}.{number}": uri for number, uri in enumerate(value)}
    for name, signal in (getattr(config, "signals", None) or {}).items():
        if getattr(signal, "table", None):
            found[f"signals.{name}.table"] = signal.table
    if base := swept_by(config):
        found |= {f"base.{name}": uri for name, uri in places_of(base).items()}
    return found


def inputs_of(config: VerbConfig) -> dict[str, str]:
    """Fingerprints of what a stage reads, by setting; of frozen models what pins them."""
    found = {name: f"{fingerprint(uri)}{_made_of(uri)}" for name, uri in places_of(config).items()}
    for part, of_part in (("", config), ("base.", swept_by(config))):
        for name in FOUNDATIONS:
            spec = _value(of_part, name)
            if isinstance(spec, FoundationSpec):
                pins = {key: value for key, value in identity(spec).items() if "revision" in key}
                found |= {f"{part}{name}.{key}": value for key, value in pins.items()}
        for name in MODELS:
            model = _value(of_part, name)
            if isinstance(model, str) and os.path.isdir(model):
                found[f"{part}{name}"] = pinned_by(model, None, name)
    return found


def _value(config: object, name: str) -> object:
    """A setting by its dotted name; None where there is none."""
    return reduce(lambda section, part: getattr(section, part, None), name.split("."), config)


def _made_of(uri: str) -> str:
    """Of a part of a result, such as curate's accepted/: the result that it belongs to."""
    above = storage.absolute(uri).rstrip("/").rsplit("/", 1)[0]
    files = [storage.join(above, name) for name in dict.fromkeys(RESULTS.values())]
    return "".join(f" {fingerprint(file)}" for file in files if storage.exists(file))


def record_file(run_dir: str, verb: Verb) -> str:
    """Where the record of a stage is kept."""
    return storage.join(run_dir, RECORDS, f"{verb}.json")


def kept_record(run_dir: str, verb: Verb) -> StageRecord | None:
    """The record of the last time that a stage ended well; None where it never did, or an older release wrote it."""
    file = record_file(run_dir, verb)
    if not storage.exists(file):
        return None
    try:
        return StageRecord.model_validate(storage.read_json(file))
    except ValueError:
        return None


def changes(kept: StageRecord | None, now: StageRecord, config: VerbConfig) -> list[str]:
    """Why a stage has to run; empty: it stands as it was made."""
    if kept is None:
        return ["not finished by `aai run` yet"]
    why = [*_differences(kept.settings, now.settings), *_inputs_changed(kept.inputs, now.inputs)]
    if kept.code != now.code:
        why.append("the code changed")
    if fingerprint(out_of(config)) != kept.output:
        why.append(f"{out_of(config)} is not as it was left")
    return why


def _differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return [f"{name}: {before.get(name, 'not set')} -> {now.get(name, 'not set')}" for name in names]


def _inputs_changed(before: dict[str, str], now: dict[str, str]) -> list[str]:
    return [f"{name} changed" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def estimate(plan: dict[str, Any] | None, verb: Verb, shape: str | None) -> float | None:
    """Hours of a stage by plan.json of `aai plan`; None where it does not tell."""
    if plan is None:
        return None
    shapes = plan.get("shapes", {})
    name = shape or next(iter(shapes), None)
    if verb in ("curate", "featurize"):
        hours = shapes.get(name, {}).get(f"{verb}_h")
    else:
        found = [one for one in plan.get("trainings", []) if (one["stage"], one["shape"]) == (verb, name)]
        hours = found[0].get("hours") if found else None
    return None if hours is None else float(hours)
