"""Quality on held-out clips: retrieval, and pictures painted from sound beside their floors and their ceiling.

First every held-out clip is heard, then pictures are painted and read, both by workers on their device; each picture
has its own seed, so the figures do not depend on how many workers there are. The same command goes on after a kill.
All that was made stays in OUT: evaluate.json, marks.parquet, heard/, inputs/, pictures/. The first two are put on
record in MLflow.
"""

import argparse
import logging
import time
from typing import Any, Literal

import pydantic

from aai import grading, storage
from aai.addons import AddOns, absolute, check_there, content
from aai.bundle import read_bundle
from aai.digest import digest
from aai.encoders.aligner import encoder_config
from aai.errors import UserError
from aai.features import FeatureManifest
from aai.media.duplicates import WholeConfig
from aai.sampling import SamplingConfig
from aai.version import code_version
from pipelines.engine.cluster import worker_dtype
from pipelines.engine.lock import is_empty, locked
from pipelines.engine.shards import run_shards
from pipelines.evaluation import grades
from pipelines.evaluation.cases import (
    PICTURE_TABLE,
    PICTURES,
    Case,
    PictureWorker,
    check_conditions,
    loudness_cases,
    make_cases,
    picture_shards,
)
from pipelines.evaluation.clips import EvaluatedClips, find_clips, listen_shards
from pipelines.evaluation.judges import JudgeConfig
from pipelines.evaluation.leaks import near_overlap
from pipelines.evaluation.listening import HEARD, ListenWorker
from pipelines.evaluation.marks import marks
from pipelines.evaluation.paired import MARKS, as_bytes, check_finished, compare, lines
from pipelines.registry import store, tracking
from pipelines.registry.evaluations import is_recorded, is_whole, sealed, tags_of
from pipelines.settings import DType, Plan, RayVerbConfig, RunsConfig

log = logging.getLogger(__name__)
STARTED, RESULT = "_started.json", "evaluate.json"
"""Written first: what the folder is an evaluation of; written last: its figures."""
LOUDNESS_GAINS_DB = [-18.0, -12.0, -6.0, 0.0, 6.0]
NUM_PICTURES = {
    "caption": 300,
    "sound": 320,
    "ceiling": 320,
    "nearest_caption": 100,
    "closed_form": 100,
    "shuffled_audio": 300,
    "random_token": 300,
    "sketch": 300,
    "edit": 120,
    "edit_from_noise": 60,
    "stylize": 120,
    "stylize_from_noise": 60,
}


class EvaluateConfig(RayVerbConfig):
    """What is evaluated and how many pictures are painted."""

    features: str = "${run_dir}/features"
    """FeatureTable."""
    clips: str = "${run_dir}/curated/accepted"
    """ClipTable of the same clips: the frames that are edited."""
    bundle: str = "${run_dir}/adapt/bundle"
    """Bundle of `aai adapt`."""
    out: str = "${run_dir}/evaluate"
    """Folder or s3:// prefix of the result; it must be new, or of this very evaluation."""
    against: str | None = None
    """Folder of another bundle's evaluation on the same clips, to be compared picture by picture."""
    split: str = "test"
    """The held-out split."""
    max_clips: int = pydantic.Field(2000, ge=10)
    """Size of the retrieval gallery at most; clips are taken in order of clip_id."""
    pictures: dict[str, pydantic.PositiveInt] = NUM_PICTURES
    """Pictures per condition (see docs/evaluation.md)."""
    seed: int = pydantic.Field(0, ge=0, le=10_000)
    """Draws which clips are painted, what picture a sound changes, and each picture's noise."""
    judge: JudgeConfig = JudgeConfig()
    """Who reads the pictures beside the CLIP."""
    max_frames: int = pydantic.Field(1200, ge=1)
    """Held-out frames that the toy world's judge and CLIP are themselves graded on."""
    disturbed_clips: int = pydantic.Field(128, ge=0)
    """Held-out clips, at most, that are also heard noisier, softer, duller and with more room: `retrieval.robustness`;
    0 = none."""
    clips_per_shard: int = pydantic.Field(128, ge=1)
    """Clips of one unit of listening."""
    cases_per_shard: int = pydantic.Field(25, ge=1)
    """Pictures of one unit of painting, which is also a batch."""
    duplicates: WholeConfig = WholeConfig()
    """How alike a held-out clip and a training clip are that count as `near_overlap`; as in curate."""
    request: SamplingConfig = SamplingConfig(steps=10)
    """How pictures are painted; prompt and seed are the condition's."""
    addons: AddOns = AddOns()
    """What is loaded on top of the diffusion model: those of the service, and the figures are of what it serves. Files
    must be where the workers run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when cluster.gpus_per_worker is not 0."""
    dtype: DType = "float32"
    """Arithmetic of the diffusion model."""
    tracking: RunsConfig = RunsConfig()

    @pydantic.field_validator("judge", mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"model": value} if isinstance(value, str) else value

    @pydantic.model_validator(mode="after")
    def _unguided(self) -> "EvaluateConfig":
        if self.addons.controlnet:
            raise ValueError("addons.controlnet needs a picture that held-out clips do not have: leave it out")
        return self

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(
            inputs={"features": self.features, "clips": self.clips, "bundle": self.bundle},
            outputs={"result": storage.join(self.out, RESULT), "pictures": storage.join(self.out, PICTURES)},
            resources={**self.resources(), "pictures": str(sum(self.pictures.values()))},
        )

    def content_digest(self) -> str:
        """Of everything that determines the figures: not where, or by how many workers, they are made."""
        names = {
            "split",
            "max_clips",
            "pictures",
            "judge",
            "max_frames",
            "request",
            "dtype",
            "seed",
            "duplicates",
            "disturbed_clips",
        }
        columns = PICTURE_TABLE.names  # an evaluation of before what is read today cannot be gone on with, or compared
        settings = self.model_dump(mode="json", include=names)
        if self.addons != AddOns():
            settings["addons"] = self.painted_with()
        return digest([columns, settings])

    def painted_with(self) -> dict[str, Any]:
        """The add-ons by what their files hold, wherever these lie."""
        return {**self.addons.model_dump(mode="json", exclude_defaults=True), **content(self.addons)}

    @property
    def worker_device(self) -> str:
        """Where models run."""
        on_gpu = self.device == "cuda" or (self.device == "auto" and self.cluster.gpus_per_worker > 0)
        return "cuda" if on_gpu else "cpu"


CONFIG = EvaluateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--bundle", metavar="DIR", help="bundle to evaluate")
    parser.add_argument("--features", metavar="DIR", help="FeatureTable with the held-out split")
    parser.add_argument("--out", metavar="DIR", help="folder of the result")
    parser.add_argument("--against", metavar="DIR", help="another bundle's evaluation of the same clips")
    return {"bundle": "bundle", "features": "features", "out": "out", "against": "against"}


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a bundle; returns and writes evaluate.json (see docs/architecture.md)."""
    refuse_foreign(config.out)  # before the lock, which writes: such a folder is not touched at all
    store.check(config.tracking)  # both before hours of work
    if config.against:
        check_finished(config.against)
    result = _evaluate(config)
    if config.against:
        found = compare(storage.absolute(config.out), result, storage.absolute(config.against))
        file = storage.join(config.out, f"against-{found['bundle']}.json")
        storage.write_json(file, found)
        for line in ("difference to the other bundle, 95 % interval:", *lines(found)):
            print(line)
        log.info("evaluate: against %s -> %s", found["bundle"], file)
    return result


@locked
def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    begin = time.monotonic()
    places = {name: storage.absolute(getattr(config, name)) for name in ("features", "clips", "bundle", "out")}
    config = config.model_copy(update={**places, "addons": absolute(config.addons)})
    if config.cluster.address is None:  # before hours of listening
        check_there(config.addons)
    bundle = read_bundle(config.bundle)
    manifest = FeatureManifest.read(config.features)
    rate_hz = encoder_config(bundle).sample_rate_hz
    manifest.check_sample_rate("bundle", config.bundle, rate_hz, "give the features that it was aligned on")
    stamp = {"config": config.content_digest(), "bundle": bundle.sha, "data_fingerprint": manifest.fingerprint}
    found = up_to_date(config.out, stamp)
    if found is not None and is_recorded(config.tracking, found):  # else its figures are taken once more, and recorded
        log.info("evaluate: up to date -> %s", storage.join(config.out, RESULT))
        return found
    clips = find_clips(config.features, config.clips, config.split, config.max_clips)
    check_conditions(config.pictures, clips.labels, config.judge, bundle.config)
    cases, samples = plan_pictures(config, clips)
    planned = {"clips": len(clips.labels), "pictures": len(cases)}
    config = config.model_copy(update=settled(config, stamp, planned))
    listen(config, clips, cases)
    paint(config, cases)
    result = {**stamp, **figures(config, clips), "samples": samples, "dtype": config.dtype}
    result |= {"request": config.request.model_dump(mode="json"), "addons": config.painted_with()}
    result |= {"seconds": time.monotonic() - begin, "written_by": code_version()}
    result = sealed(result, storage.read_bytes(storage.join(config.out, MARKS)))
    done = storage.join(config.out, RESULT)
    storage.write_json(done, result)
    _record(config, result)
    log.info(
        "evaluate: same-object R@1 %.3f of %d clips; %s; %d pictures in %s, %.0f s -> %s",
        result["retrieval"]["same_object_r1"], result["retrieval"]["gallery"], headline(result["generation"]),
        result["generation"]["pictures"], config.dtype, result["seconds"], done,
    )  # fmt: skip
    return result


def up_to_date(out: str, stamp: dict[str, str]) -> dict[str, Any] | None:
    """The finished result of this very evaluation, None when there is work left. Raises UserError for another's."""
    started, done = storage.join(out, STARTED), storage.join(out, RESULT)
    if not storage.exists(started):
        return None
    before = storage.read_json(started)
    if any(before.get(name) != value for name, value in stamp.items()):
        rule = "holds the evaluation of another bundle, other data or other settings"
        raise UserError("out", out, rule, "give another --out, or delete it")
    marks_file = storage.join(out, MARKS)
    if not storage.exists(done) or not storage.exists(marks_file):
        return None
    found = dict(storage.read_json(done))
    # What is not as it was written, or is of an older release: its figures are taken anew from what was painted.
    whole = is_whole(found, storage.read_bytes(marks_file)) and stamp.items() <= found.items()
    return found if whole else None


def refuse_foreign(out: str) -> None:
    """Raises UserError when the folder holds what no evaluation began; nothing in it is touched."""
    if not storage.exists(storage.join(out, STARTED)) and not is_empty(out):
        raise UserError("out", out, "is not empty, nor written by evaluate", "choose another folder")


def settled(config: EvaluateConfig, stamp: dict[str, str], planned: dict[str, int]) -> dict[str, Any]:
    """What `dtype` stands for in this evaluation, and the sizes of its shards; one that goes on keeps them.

    A shard's number means other clips where shards have another size. planned: how many clips and pictures there will
    be, noted for `aai status`.
    """
    started = storage.join(config.out, STARTED)
    kept = {name: getattr(config, name) for name in ("clips_per_shard", "cases_per_shard")}
    if storage.exists(started):
        before = storage.read_json(started)
        return {name: before.get(name, value) for name, value in kept.items()} | {"dtype": before["dtype"]}
    kept["dtype"] = worker_dtype(config.dtype, config.worker_device, config.cluster, config.out)
    storage.write_json(started, {**stamp, **kept, "planned": planned})
    return kept


def plan_pictures(config: EvaluateConfig, clips: EvaluatedClips) -> tuple[list[Case], dict[str, Any]]:
    """Every picture to paint, and which test clips the report shows."""
    labels = clips.labels
    cases = make_cases(labels, config.pictures, config.seed)
    first = {
        labels[case.row][0]: case.row for case in reversed(cases) if case.condition == "sound" and labels[case.row]
    }
    if "size" in config.judge.attributes:
        cases += loudness_cases(list(first.values())[:3], LOUDNESS_GAINS_DB, len(cases), config.seed)
    return cases, {"objects": first, "loudness_gains_db": LOUDNESS_GAINS_DB}


def listen(config: EvaluateConfig, clips: EvaluatedClips, cases: list[Case]) -> None:
    """Hears every held-out clip and some training clips; finished shards stay."""
    texts = [grading.class_prompt(name) for name in grades.class_names(clips.labels)]
    painted = set().union(*(case.rows for case in cases))
    frames = len(clips.labels) * FeatureManifest.read(config.features).num_frames
    args = {
        "bundle": config.bundle,
        "out": config.out,
        "judge": config.judge.model_dump(mode="json"),
        "device": config.worker_device,
        "graded_frames_every": max(1, frames // config.max_frames) if config.judge.model == "toy" else 0,
        "disturbed_every": -(-len(clips.labels) // config.disturbed_clips) if config.disturbed_clips else 0,
    }
    shards = listen_shards(clips, config.clips_per_shard, texts, painted)
    there = storage.shard_names(storage.join(config.out, HEARD))
    run_shards("evaluate: listen", shards, ListenWorker, args, config.cluster, lambda s: s.name in there, config.out)


def paint(config: EvaluateConfig, cases: list[Case]) -> None:
    """Paints and reads every picture; finished shards stay."""
    request = config.request.model_dump(exclude_none=True)
    args = {
        "bundle": config.bundle,
        "out": config.out,
        "judge": config.judge.model_dump(mode="json"),
        "request": request,
        "addons": config.addons.model_dump(mode="json"),
        "device": config.worker_device,
        "dtype": config.dtype,
    }
    shards = picture_shards(cases, config.cases_per_shard, config.out)
    there = storage.shard_names(storage.join(config.out, PICTURES))
    done = lambda shard: shard.name in there  # noqa: E731
    run_shards("evaluate: paint", shards, PictureWorker, args, config.cluster, done, config.out, unit="picture")


def figures(config: EvaluateConfig, clips: EvaluatedClips) -> dict[str, Any]:
    """foundation, retrieval and generation, from the tables in OUT; leaves the marks of the single clips there."""
    heard = grades.Heard(config.out)
    found = as_bytes(marks(config.out, clips, heard, config.judge.attributes))
    storage.write_bytes(storage.join(config.out, MARKS), found)
    generation = grades.picture_figures(config.out, clips, heard, config.judge.attributes)
    foundation = generation.pop("foundation", {})
    if config.judge.model == "toy":
        foundation |= grades.foundation_figures(config.out, clips.labels)
    retrieval = grades.retrieval_figures(clips, heard)
    if (near := near_overlap(clips, config.clips, config.duplicates)) is not None:
        retrieval["near_overlap"] = near
    if robustness := grades.robustness_figures(config.out, clips, heard):
        retrieval["robustness"] = robustness
    return {"foundation": foundation, "retrieval": retrieval, "generation": generation}


def headline(generation: dict[str, Any]) -> str:
    """The pictures' figures in a few words."""
    sound, ceiling = generation.get("sound", {}), generation.get("ceiling", {})
    read = [name for name in ("object", "ambience") if name in sound and name in ceiling]
    if read:
        return ", ".join(f"{name} {sound[name]:.3f} (caption {ceiling[name]:.3f})" for name in read)
    return "CLIP-based: " + ", ".join(f"{k} {v:.3f}" for k, v in generation["clip"].get("sound", {}).items())


def _record(config: EvaluateConfig, result: dict[str, Any]) -> None:
    """Puts the evaluation on record in MLflow, unless it is there: `aai promote` takes no other."""
    if not is_recorded(config.tracking, result):
        with tracking.run(config.tracking, "evaluate", config.model_dump(mode="json"), tags_of(result)) as run:
            run.log_metrics({"retrieval": result["retrieval"], "generation": result["generation"]})
            run.log_artifact(storage.join(config.out, MARKS))
            run.log_artifact(storage.join(config.out, RESULT))
