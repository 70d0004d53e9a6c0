"""Sweeps over the settings of `aai align` or `aai adapt`, and writes the best ones as a config file.

    aai tune align                 # the demo's align and 7 other settings of it
    aai tune adapt --trials 4
    aai tune align --dry-run       # what is swept, how many trials, how many steps of each

Each trial is an ordinary run of the stage in OUT/trials/NNN; trial 0 is the stage as it is. Ray Tune drives them, stops
what falls behind early, and compares a figure of the val split: the test split is for `aai evaluate`. Prints a table
and writes OUT/best.yaml (`aai align --config OUT/best.yaml`), OUT/trials.png and, last, OUT/tune.json. The same command
goes on after a kill.
"""

import argparse
import logging
import time
from pathlib import Path
from typing import Any, Literal

import pydantic
from omegaconf import OmegaConf

from aai import storage
from aai.digest import digest
from aai.errors import UserError
from aai.features import FeatureManifest
from pipelines.__main__ import CONFIGS, config_file
from pipelines.adapt import AdaptRecipe
from pipelines.align import AlignRecipe
from pipelines.engine.lock import locked
from pipelines.registry import tracking
from pipelines.registry.figures import flatten
from pipelines.registry.nested import PARENT, end_children
from pipelines.settings import Plan, VerbConfig
from pipelines.training.recipe import StageConfig, TrainRecipe, bundle_dir
from pipelines.training.stage import content_digest
from pipelines.tuning.space import Distribution, Settings, by_dotted_name, drawn
from pipelines.tuning.standing import Standing, plot, sentence, standings, table, winner
from pipelines.tuning.sweep import Candidate, StoppingConfig, Sweep, connect_for, run_sweep

log = logging.getLogger(__name__)

RECIPES: dict[str, type[TrainRecipe[Any]]] = {"align": AlignRecipe, "adapt": AdaptRecipe}
METRICS = {"align": "val_a2v_r1", "adapt": "val_loss"}
MODES = {"align": "max", "adapt": "min"}
"""What the validation of a stage has: recalls, or losses."""
SPACES: dict[str, dict[str, Distribution]] = {
    "align": {
        "fit.learning_rate": Distribution(log_uniform=(3e-4, 3e-3)),
        "fit.weight_decay": Distribution(log_uniform=(0.01, 0.2)),
        "loss.temperature": Distribution(log_uniform=(0.03, 0.2)),
    },
    "adapt": {
        "fit.learning_rate": Distribution(log_uniform=(5e-4, 8e-3)),
        "fit.weight_decay": Distribution(log_uniform=(0.01, 0.2)),
    },
}


class TuneConfig(VerbConfig):
    """Settings of a sweep."""

    stage: Literal["align", "adapt"] = "align"
    """What is trained."""
    base: str | None = None
    """Config file of the stage, from which all trials begin; empty = configs/demo/STAGE.yaml. Its cluster is each
    trial's, its tracking the sweep's; its run_dir is this one's."""
    overrides: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Settings of the stage that all trials have, as in its file: {fit: {steps: 60}}."""
    space: dict[str, Distribution] = pydantic.Field(default_factory=dict)
    """What is swept: {fit.learning_rate: {log_uniform: [1e-4, 1e-3]}}; empty = learning rate, weight decay, and for
    align the temperature."""
    trials: int = pydantic.Field(8, ge=2)
    """The stage as it is, and the rest drawn from the space. Given more later, the first ones stay."""
    metric: str | None = None
    """A figure of the validation, with val_ before it; empty = val_a2v_r1 for align, val_loss for adapt."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more is better; auto: more for align (recall), less for adapt (losses)."""
    stopping: StoppingConfig = StoppingConfig()
    """Decides at the validations: fit.eval_every of the stage says how often."""
    seed: int = pydantic.Field(0, ge=0)
    """Of what is drawn."""
    concurrent: int = pydantic.Field(1, ge=1)
    """Trials at a time; each takes the workers of the stage."""
    out: str
    """Folder or s3:// prefix of the trials, the table and the best settings."""

    @pydantic.field_validator("space", mode="before")
    @classmethod
    def _dotted(cls, given: object) -> object:
        return by_dotted_name(given) if isinstance(given, dict) else given

    @property
    def result(self) -> str:
        """The file that is written last."""
        return storage.join(self.out, "tune.json")

    @property
    def best(self) -> str:
        """The winner's settings."""
        return storage.join(self.out, "best.yaml")

    def metric_and_mode(self) -> tuple[str, str]:
        """The metric's name, and max or min."""
        return self.metric or METRICS[self.stage], MODES[self.stage] if self.mode == "auto" else self.mode

    def candidates(self) -> tuple[Candidate, ...]:
        """All trials. Raises UserError for what the stage, or the metric, does not take: before anything runs."""
        space = {name: self.space[name] for name in sorted(self.space)} or SPACES[self.stage]
        base = self.stage_config()
        self._check_metric(space)
        if "adapter.parts" in space:
            rule, remedy = "the sounds are embedded once for all trials", "set overrides.adapter.parts"
            raise UserError("space.adapter.parts", space["adapter.parts"], rule, remedy)
        known = flatten(base.content())
        for name, distribution in space.items():
            for value in distribution.ends():
                self._config({name: value}, 0)
            if name not in known:
                rule, remedy = "decides no weights", "sweep settings of what is trained: those of encoder, loss, fit"
                raise UserError(f"space.{name}", distribution, rule, remedy)
        as_it_is: Settings = {name: known[name] for name in space}
        found = [Candidate(0, as_it_is, base)]
        for number, settings in enumerate(drawn(space, as_it_is, self.trials, self.seed), 1):
            found.append(Candidate(number, settings, self._config(settings, number)))
        if len(found) < self.trials:
            log.warning("tune: the space has no more than %d trials that differ", len(found))
        return tuple(found)

    def stage_config(self) -> StageConfig:
        """The stage as it is, from which all trials begin."""
        return self._config({}, 0)

    def _config(self, settings: Settings, number: int) -> StageConfig:
        """The stage's settings with some changed."""
        file = Path(self.base) if self.base else CONFIGS / "demo" / f"{self.stage}.yaml"
        out = storage.join(self.out, "trials", f"{number:03d}")
        values = {"run_dir": self.run_dir, **flatten(self.overrides), **settings, "out": out}
        try:
            return RECIPES[self.stage].config_class.load(config_file(str(file)), (), values)
        except UserError as error:
            if error.setting not in settings:
                raise
            name = f"space.{error.setting}"
            raise UserError(name, error.value, error.rule, error.remedy) from error

    def _check_metric(self, space: dict[str, Distribution]) -> None:
        metric, _ = self.metric_and_mode()
        if not metric.startswith("val_"):
            remedy = f"name one with val_ before it, such as {METRICS[self.stage]}"
            raise UserError("metric", metric, "is no figure of the val split", remedy)
        weighed = [name for name in space if name.startswith("loss.")]
        if self.stage == "adapt" and metric == "val_loss" and weighed:
            rule = f"means something else in each trial where {weighed[0]} is swept"
            raise UserError(
                "metric", metric, rule, "take one term of it: val_hidden, val_clip, val_contrast or val_denoise"
            )

    def plan(self) -> Plan:
        """See VerbConfig."""
        candidates = self.candidates()
        stage, (metric, mode) = candidates[0].config.plan(), self.metric_and_mode()
        swept = self.space or SPACES[self.stage]
        outputs = {"winner": self.best, "figures": self.result, "trials": storage.join(self.out, "trials")}
        fit = candidates[0].config.fit
        asked = ", ".join(map(str, self.stopping.asked(fit.steps, fit.eval_every)))
        chosen = {"metric": f"{metric}, {'more' if mode == 'max' else 'less'} is better, on the val split"}
        chosen |= {name: str(swept[name]) for name in sorted(swept)}
        training = {"trials": f"{len(candidates)}: the stage as it is, and {len(candidates) - 1} drawn"}
        training |= {"early stop": f"at step {asked}" if asked else "none", **stage.training}
        resources = {**stage.resources, "at a time": f"{self.concurrent} trials"}
        inputs = {"base": self.base or f"configs/demo/{self.stage}.yaml", **stage.inputs}
        return Plan(inputs=inputs, outputs=outputs, resources=resources, chosen=chosen, training=training)


CONFIG = TuneConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The positional STAGE, and short flags with the settings they stand for."""
    parser.add_argument("stage", nargs="?", metavar="STAGE", choices=tuple(RECIPES), help="align | adapt [align]")
    parser.add_argument("--trials", type=int, metavar="N", help="how many, the stage as it is among them")
    parser.add_argument("--base", metavar="FILE", help="config file of the stage [configs/demo/STAGE.yaml]")
    parser.add_argument("--out", help="folder for trials and best settings")
    parser.add_argument("--address", metavar="ADDR", help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    flags = {"stage": "stage", "trials": "trials", "base": "base", "out": "out"}
    return flags | {"address": "overrides.cluster.address"}


@locked
def run(config: TuneConfig) -> dict[str, Any]:
    """Runs the sweep, prints the table; returns what tune.json holds.

    Raises UserError for settings that do not fit together, and when no trial finished.
    """
    begin = time.monotonic()
    config = config.model_copy(update={"out": storage.absolute(config.out)})
    candidates = config.candidates()
    sweep_digest, recipe = check(config, candidates)
    if (found := up_to_date(config, sweep_digest, len(candidates))) is not None:
        return found
    metric, mode = config.metric_and_mode()
    base = candidates[0].config
    told = {"stage": config.stage, "metric": metric, "mode": mode, "trials": len(candidates), "seed": config.seed}
    swept = {"space": {name: str(where) for name, where in (config.space or SPACES[config.stage]).items()}}
    with tracking.run(base.tracking, "tune", told | swept, {"digest": sweep_digest}, earlier_run(config)) as opened:
        begun = {"digest": sweep_digest, "mlflow_run": opened.run_id, "trials": len(candidates)}
        storage.write_json(started(config), begun)
        end_children(opened)  # of a driver that was killed
        parts = metric, mode, config.stopping, config.concurrent, config.out, {PARENT: opened.run_id}
        sweep = Sweep(RECIPES[config.stage], candidates, *parts)
        connect_for(sweep)
        recipe.precompute()  # once, and here: within a trial of Tune nothing but Ray Train gets CPUs
        try:
            failed = run_sweep(sweep)
        finally:
            end_children(opened)
        standing = standings(sweep, failed)
        end_children(opened, [f"{s.number:03d}" for s in standing if s.state == "stopped"])
        for line in table(standing, metric):
            print(line)
        result = {"digest": sweep_digest, "seconds": round(time.monotonic() - begin, 1), **told}
        result = keep(config, candidates, standing, result, opened)
    log.info("tune: %s, %.0f s: %s -> %s", counts(standing), result["seconds"], result["summary"], config.best)
    return result


def check(config: TuneConfig, candidates: tuple[Candidate, ...]) -> tuple[str, TrainRecipe[Any]]:
    """The digest of what decides the trials' figures, and the base's recipe.

    Raises UserError for what would make every trial fail.
    """
    base = candidates[0].config
    if (base.cluster.address or "").startswith("ray://"):
        remedy = "run it there, with HOST:PORT or auto: ray job submit -- aai tune"
        raise UserError("cluster.address", base.cluster.address, "Ray Tune's driver must be in the cluster", remedy)
    manifest = FeatureManifest.read(base.features)
    if manifest.clips("val", base.pictures_only) < 2:
        rule = "has no clips of the split val, by which trials are compared"
        raise UserError("features", base.features, rule, "curate with val_share=0.02")
    places = {name: storage.absolute(getattr(base, name)) for name in base.places}
    recipe = RECIPES[config.stage](base.model_copy(update=places))
    recipe.prepare(manifest)
    recipe.config.refuse_what_cannot_fit()
    sampled = {name: str(where) for name, where in (config.space or SPACES[config.stage]).items()}
    decides = {
        "base": content_digest(recipe, manifest),
        "validation": base.max_val_clips,
        "space": sampled,
        "metric": config.metric_and_mode(),
        "stopping": config.stopping.model_dump(),
        "seed": config.seed,
    }
    return digest(decides), recipe


def started(config: TuneConfig) -> str:
    """The file that says which sweep a folder holds, and its run in MLflow."""
    return storage.join(config.out, "sweep.json")


def earlier_run(config: TuneConfig) -> str | None:
    """The MLflow run of a sweep that was killed; one that ended is not changed any more."""
    if storage.exists(config.result) or not storage.exists(started(config)):
        return None
    return str(storage.read_json(started(config))["mlflow_run"])


def up_to_date(config: TuneConfig, sweep_digest: str, trials: int) -> dict[str, Any] | None:
    """The stored result of the same sweep, unless trials of it failed. Raises UserError when OUT holds another."""
    if not storage.exists(started(config)):
        return None
    if storage.read_json(started(config))["digest"] != sweep_digest:
        rule, remedy = "holds a sweep with other settings or data", "give another --out, or delete it"
        raise UserError("out", config.out, rule, remedy)
    if not storage.exists(config.result):
        return None
    found: dict[str, Any] = storage.read_json(config.result)
    if found["trials"] != trials or any(trial["state"] == "failed" for trial in found["standing"]):
        return None
    log.info("tune: up to date -> %s", config.result)
    return found


def keep(
    config: TuneConfig,
    candidates: tuple[Candidate, ...],
    standing: list[Standing],
    told: dict[str, Any],
    opened: tracking.OpenRun,
) -> dict[str, Any]:
    """Writes best.yaml, trials.png and tune.json, here and to MLflow; returns what tune.json holds."""
    metric, _ = config.metric_and_mode()
    best, base = winner(standing), next(s for s in standing if s.number == 0)
    picture = plot(standing, metric, config.stage)
    storage.write_bytes(storage.join(config.out, "trials.png"), picture)
    opened.log_bytes("trials.png", picture)
    if best is None:
        why = next((s.error for s in standing if s.error), "all were stopped")
        raise UserError("trials", len(standing), f"none finished ({why})", "mend it, and run the same command again")
    text = best_yaml(config, candidates[best.number], sentence(standing, metric))
    storage.write_bytes(config.best, text.encode())
    result = {
        **told,
        "summary": sentence(standing, metric),
        "best": {"trial": best.number, "value": best.value, "settings": best.settings, "bundle": bundle_dir(best.out)},
        "base_value": base.value,
        "standing": [s.model_dump(mode="json") for s in standing],
    }
    values = {"best_value": best.value, "base_value": base.value}
    opened.log_metrics(values)
    opened.log_params({"best": {"trial": best.number, **best.settings}})
    opened.log_bytes("best.yaml", text.encode())
    opened.log_json("tune.json", result)
    storage.write_json(config.result, result)
    return result


def best_yaml(config: TuneConfig, candidate: Candidate, why: str) -> str:
    """A config file of the stage: what was given and drawn; all else keeps its default, also what the data decide."""
    given = candidate.config.model_dump(mode="json", exclude_unset=True)
    given["out"] = storage.join(config.out, "best")
    if "@" in candidate.config.tracking.uri:  # a password out of the environment does not belong into a file
        del given["tracking"]["uri"]
    head = f"# Trial {candidate.number} of a sweep by `aai tune {config.stage}`:\n# {why}.\n"
    return head + OmegaConf.to_yaml(OmegaConf.create(given))


def counts(standing: list[Standing]) -> str:
    """How many trials finished, were stopped and failed."""
    states = [s.state for s in standing]
    parts = [f"{states.count(state)} {state}" for state in ("finished", "stopped", "failed") if state in states]
    return f"{len(states)} trials ({', '.join(parts)})"
