"""The way every trained stage runs: skip what is done, refuse what does not fit, train, keep the result.

OUT holds the bundle, history.jsonl and, written last, NAME.json; a folder with NAME.json is finished.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from aai import storage
from aai.digest import digest
from aai.errors import UserError
from aai.features import FeatureManifest, load_split
from aai.fit import FitConfig, local_batch_size
from aai.reader import Batch, FeatureReader, joined, ranks_of, read_ahead
from pipelines.engine.lock import output_lock
from pipelines.registry import live, origins, tracking
from pipelines.training import following, ray_train
from pipelines.training.following import OnLog
from pipelines.training.recipe import C, StageConfig, Trained, TrainRecipe, bundle_dir

log = logging.getLogger(__name__)


def run_stage(
    recipe_class: type[TrainRecipe[C]],
    config: C,
    on_log: OnLog = lambda step, figures: None,
    tags: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Trains and writes the result; returns what NAME.json holds.

    A finished run with the same settings and data is returned as it is; the same call goes on after a kill. on_log
    hears of every new entry of the history, in another thread; tags: of the run in MLflow. Raises UserError when OUT
    holds a run with others.
    """
    with output_lock(config.out):
        return _run(recipe_class, config, on_log, tags or {})


def _run(recipe_class: type[TrainRecipe[C]], config: C, on_log: OnLog, tags: Mapping[str, str]) -> dict[str, Any]:
    begin = time.monotonic()
    config = config.model_copy(update={name: storage.absolute(getattr(config, name)) for name in config.places})
    manifest = FeatureManifest.read(config.features)
    if not validates(config.fit, manifest, config.pictures_only):
        log.warning("%s: no validation: the features have no clips of the split val", config.stage)
    recipe = recipe_class(config)
    run_digest = content_digest(recipe, manifest)
    ranks = ranks_of_run(config, run_digest)
    if (found := up_to_date(config, run_digest)) is not None:
        return found
    settings = recipe.prepare(manifest).model_dump(mode="json")
    recipe.config.refuse_what_cannot_fit()
    recipe.precompute()
    params = {"fingerprint": manifest.fingerprint, **settings}
    with tracking.run(config.tracking, config.stage, params, {"digest": run_digest, **tags}) as run:
        with live.sender(run) as send:
            for entry in following.history(config.out):  # of a run that goes on
                send.figures(int(entry["step"]), _figures(entry))
            for picture in following.samples(config.out):
                send.picture(*picture)
            storage.write_json(ranks_file(config, run_digest), {"ranks": ranks, "steps": config.fit.steps})
            work = make_work, (recipe_class, settings, ranks), config.cluster.at_most(ranks), config.out, run_digest

            def heard(step: int, figures: dict[str, float]) -> None:
                send.figures(step, figures)
                on_log(step, figures)

            trained = ray_train.train(config.stage, *work, config.fit, heard, send.picture)
            metrics = kept_figures(following.history(config.out), trained)
            folder = bundle_dir(config.out)
            meta = {"data_fingerprint": manifest.fingerprint, "metrics": metrics, "parents": list(recipe.parents)}
            sha = recipe.write(folder, trained, meta)
            try:
                run.set_tags({origins.MADE: sha, origins.PARENTS: " ".join(recipe.parents)})
            except UserError as error:  # a server that is away takes nothing from what is trained
                log.warning("%s: MLflow was not told that this run made the bundle %s (%s)", config.stage, sha, error)
        result = {
            "digest": run_digest,
            "seconds": round(time.monotonic() - begin, 1),
            "steps": trained.step,
            "kept_step": trained.kept_step,
            "precision": trained.precision,
            "ranks": ranks,
            "metrics": metrics,
            "data_fingerprint": manifest.fingerprint,
            "bundle": folder,
            "sha": sha,
        }
        storage.write_json(config.result, result)
        storage.remove(ray_train.checkpoints(config.out))
    _log_summary(config.stage, result)
    return result


def ranks_file(config: StageConfig, run_digest: str) -> str:
    """Where a run notes its ranks, and of how many steps it is."""
    return storage.join(ray_train.checkpoints(config.out), f"{run_digest}.json")


def ranks_of_run(config: StageConfig, run_digest: str) -> int:
    """Into how many parts the clips of a run are shared out: the workers it began with, however many it has later.

    A run has begun when it has a checkpoint. Raises UserError when they cannot share the batch evenly.
    """
    where, ranks = ranks_file(config, run_digest), config.cluster.most_workers
    if storage.exists(where) and ray_train.has_checkpoint(config.out, run_digest):
        ranks = int(storage.read_json(where)["ranks"])
    local_batch_size(config.fit, ranks)
    if config.cluster.most_workers > ranks:
        said = "%s: begun with %d workers, which more cannot share: %d are not used (for all of them, delete %s)"
        log.warning(said, config.stage, ranks, config.cluster.most_workers - ranks, config.out)
    return ranks


def make_work(
    worker: int, workers: int, settings: tuple[type[TrainRecipe[Any]], dict[str, Any], int]
) -> ray_train.Work:
    """What one worker trains: the clips of one rank of the run, or of several when workers are missing.

    Only the first worker gets held-out clips. settings: the recipe's class, which Ray sends by name, its config as
    JSON, and the number of ranks.
    """
    recipe_class, values, ranks = settings
    config = recipe_class.config_class.parse(values)
    recipe = recipe_class(config)
    mine = ranks_of(worker, workers, ranks)
    reader = FeatureReader(
        config.features,
        "train",
        local_batch_size(config.fit, ranks),
        recipe.clip_samples,
        0,
        ranks,
        config.fit.seed,
        recipe.columns,
        config.shuffle_clips,
        max(1, int(config.cluster.cpus_per_worker) // len(mine)),
        recipe.cache,
        config.pictures_only,
    )
    readers = [reader.of_rank(rank) for rank in mine]
    torch.manual_seed(config.fit.seed)  # all ranks begin with the same weights
    task = recipe.build()
    more: dict[str, Any] = {}
    if worker == 0 and validates(config.fit, reader.manifest, config.pictures_only):
        what = recipe.clip_samples, recipe.columns, config.max_val_clips, recipe.cache, config.pictures_only
        held_out = load_split(config.features, "val", *what)
        more["evaluate"] = partial(_validate, recipe, task, held_out)
        more["sample"] = partial(recipe.sample, task, held_out)

    def batches(first_step: int) -> Iterator[Batch]:
        return read_ahead(joined([reader.batches(first_step) for reader in readers]), torch.cuda.is_available())

    return ray_train.Work(task, batches, partial(recipe.export, task), **more)


def _validate(recipe: TrainRecipe[Any], task: torch.nn.Module, held_out: dict[str, Any]) -> dict[str, float]:
    return {f"val_{name}": value for name, value in recipe.validate(task, held_out).items()}


def content_digest(recipe: TrainRecipe[Any], manifest: FeatureManifest) -> str:
    """Of everything that determines the weights: settings, features, and what else goes in."""
    config = recipe.config
    return digest(
        {
            "settings": config.content(),
            "data": manifest.fingerprint,
            "parents": recipe.parents,
        }
    )


def validates(fit: FitConfig, manifest: FeatureManifest, pictures_only: bool = False) -> bool:
    """Whether there are clips to validate on. Raises UserError when validations are asked for and there are none."""
    if manifest.clips("val", pictures_only) > 1:
        return True
    if fit.eval_every:
        raise UserError(
            "fit.eval_every",
            fit.eval_every,
            f"the features have no clips of the split val {'with a picture ' * pictures_only}to validate on",
            "curate with val_share=0.02, or set fit.eval_every=0 to train without validation",
        )
    return False


def up_to_date(config: StageConfig, run_digest: str) -> dict[str, Any] | None:
    """The stored result when it was made with the same settings and data. Raises UserError when it was not."""
    if not storage.exists(config.result):
        return None
    found: dict[str, Any] = storage.read_json(config.result)
    if found.get("digest") != run_digest:
        rule, remedy = "was made with other settings or data", "give another --out, or delete it"
        raise UserError("out", config.result, rule, remedy)
    log.info("%s: up to date -> %s", config.stage, config.result)
    return found


def kept_figures(entries: list[dict[str, Any]], trained: Trained) -> dict[str, float]:
    """Figures of the weights that are kept: of their validation, or without one of their last steps."""
    of_step = [entry for entry in entries if entry["step"] == trained.kept_step]
    return _figures((of_step or entries)[-1])


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name != "step"}


def _log_summary(stage: str, result: dict[str, Any]) -> None:
    shown = " ".join(f"{name} {value:.3f}" for name, value in result["metrics"].items())
    log.info(
        "%s: %d steps%s in %s, %.0f s, %s -> %s",
        stage,
        result["steps"],
        "" if result["kept_step"] in (None, result["steps"]) else f", the weights of step {result['kept_step']} kept,",
        result["precision"],
        result["seconds"],
        shown,
        result["bundle"],
    )
