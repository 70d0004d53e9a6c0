"""The stages of a run: what each reads, what it makes, and whether it stands as it was made."""

from datetime import UTC, datetime
from typing import Any, Literal

import pydantic

from aai import storage
from aai.config import Config
from aai.foundation.identity import FoundationSpec, identity
from pipelines.chain.fingerprints import MISSING, code_fingerprint, fingerprint, flat
from pipelines.settings import VerbConfig

Verb = Literal["world", "curate", "featurize", "align", "adapt", "tune", "evaluate", "promote"]
READS = ("manifest", "exclude", "input", "features", "clips", "bundle", "evaluation", "against")
"""Settings that name what a stage reads, in all stages that have them; besides them tables of `signals`."""
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
    apart = {*ELSEWHERE, *(() if verb == "promote" else ("tracking",))}
    settings = flat(config.model_dump(mode="json", exclude=apart))
    for place in (config.run_dir.rstrip("/"), storage.absolute(config.run_dir).rstrip("/")):
        settings = {name: value.replace(place, "${run_dir}") for name, value in settings.items()}
    code = code or code_fingerprint()
    return StageRecord(verb=verb, settings=settings, inputs=inputs_of(config), code=code)


def inputs_of(config: VerbConfig) -> dict[str, str]:
    """Fingerprints of what a stage reads, by setting; of frozen models what pins them."""
    found: dict[str, str] = {}
    for name in READS:
        uri = getattr(config, name, None)
        if isinstance(uri, str) and uri:
            found[name] = f"{fingerprint(uri)}{_made_of(uri)}"
    for name, signal in (getattr(config, "signals", None) or {}).items():
        if getattr(signal, "table", None):
            found[f"signals.{name}.table"] = fingerprint(signal.table)
    foundation = getattr(config, "foundation", None)
    if isinstance(foundation, FoundationSpec):
        found |= {f"foundation.{name}": value for name, value in identity(foundation).items() if "revision" in name}
    return found


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
