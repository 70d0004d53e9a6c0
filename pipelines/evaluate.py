"""Quality on held-out clips: retrieval, and pictures painted from sound beside their floors and their ceiling.

Pictures are read by the judge of the toy world and by the frozen CLIP. Ray actors share the painting; every picture
has its own seed, so the figures do not depend on how many actors there are. All pictures stay in OUT/pictures.
"""

import argparse
import logging
import time
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic

from aai import metrics, storage
from aai.align import embed_files, load_aligner
from aai.bundle import Bundle, read_bundle
from aai.errors import UserError
from aai.painter import PaintRequest
from aai.version import code_version
from pipelines.engine.cluster import worker_dtype
from pipelines.engine.lock import is_empty, locked
from pipelines.engine.shards import run_shards
from pipelines.evaluation.cases import PictureWorker, loudness_cases, make_cases
from pipelines.evaluation.grades import grade, grade_foundation, vectors
from pipelines.registry import tracking
from pipelines.settings import DType, Plan, TrackingConfig, VerbConfig

log = logging.getLogger(__name__)
STARTED = "_started.json"
"""Written first: what the folder is an evaluation of."""
WRITTEN = (STARTED, "inputs", "pictures", "evaluate.json")
"""All that an evaluation writes below its output folder; nothing else there is ever removed."""
LOUDNESS_GAINS_DB = [-18.0, -12.0, -6.0, 0.0, 6.0]


PICTURES = {
    "caption": 300,
    "sound": 320,
    "ceiling": 320,
    "nearest_caption": 100,
    "closed_form": 100,
    "shuffled_audio": 300,
    "random_token": 300,
    "sketch": 300,
    "edit": 120,
    "stylize": 120,
}


class EvaluateConfig(VerbConfig):
    """What is evaluated and how many pictures are painted."""

    summary: ClassVar[str] = "retrieval and generation quality on held-out clips, with floors and ceilings"

    features: str = "${run_dir}/features"
    """FeatureTable."""
    clips: str = "${run_dir}/curated/accepted"
    """ClipTable of the same clips: the frames that are edited."""
    bundle: str = "${run_dir}/adapt/bundle"
    out: str = "${run_dir}/evaluate"
    split: str = "test"
    max_clips: int = pydantic.Field(2000, ge=10)
    """Size of the retrieval gallery at most; clips are taken in order of clip_id."""
    pictures: dict[str, int] = PICTURES
    """Pictures per condition (see docs/evaluation.md)."""
    judge: Literal["toy", "none"] = "toy"
    """Who reads the pictures beside the CLIP: the toy world's judge (object, ambience, medium, size), or nobody."""
    max_frames: int = pydantic.Field(1200, ge=1)
    """Held-out frames that the judge and the CLIP are themselves graded on."""
    cases_per_shard: int = pydantic.Field(25, ge=1)
    request: PaintRequest = PaintRequest(steps=10)
    device: str = "cpu"
    dtype: DType = "float32"
    tracking: TrackingConfig = TrackingConfig()

    def plan(self) -> Plan:
        """See VerbConfig."""
        return Plan(
            inputs={"features": self.features, "clips": self.clips, "bundle": self.bundle},
            outputs={"result": storage.join(self.out, "evaluate.json"), "pictures": storage.join(self.out, "pictures")},
            resources={**self.resources(), "pictures": str(sum(self.pictures.values()))},
        )


CONFIG = EvaluateConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--bundle", metavar="DIR", help="bundle to evaluate")
    parser.add_argument("--features", metavar="DIR", help="FeatureTable with the held-out split")
    return {"bundle": "bundle", "features": "features"}


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates a bundle; returns and writes evaluate.json (see docs/architecture.md)."""
    check_out(config.out)  # before the lock: a foreign folder is not touched at all
    return _evaluate(config)


@locked
def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    start = time.perf_counter()
    bundle = read_bundle(config.bundle)
    manifest = storage.read_json(storage.join(config.features, "manifest.json"))
    stamp = {"config": config.digest(), "bundle": bundle.sha, "data_fingerprint": manifest["fingerprint"]}
    done = storage.join(config.out, "evaluate.json")
    if storage.exists(done) and {k: storage.read_json(done).get(k) for k in stamp} == stamp:
        log.info("evaluate: up to date -> %s", done)
        return dict(storage.read_json(done))
    check_out(config.out)
    test, train = load_clips(config)
    clear_out(config.out, stamp)
    retrieval = evaluate_retrieval(config, bundle, test, train)
    dtype = worker_dtype(config.dtype, config.device, config.cluster, config.out)
    generation, samples = evaluate_pictures(config, test, train, dtype)
    foundation = generation.pop("foundation", {})
    if config.judge == "toy":
        foundation |= grade_foundation(config.clips, config.max_frames, bundle, test)
    result = {
        **stamp,
        "foundation": foundation,
        "retrieval": retrieval,
        "generation": generation,
        "samples": samples,
        "dtype": dtype,
        "seconds": time.perf_counter() - start,
        "written_by": code_version(),
    }
    storage.write_json(done, result)
    with tracking.run(config.tracking, "evaluate", config.model_dump(mode="json"), {"bundle": bundle.sha}) as mlrun:
        mlrun.log_metrics({"retrieval": retrieval, "generation": generation})
        mlrun.log_artifact(done)
    log.info(
        "evaluate: same-object R@1 %.3f of %d clips; %s; %d pictures in %s, %.0f s -> %s",
        retrieval["same_object_r1"],
        retrieval["gallery"],
        headline(generation),
        generation["pictures"],
        dtype,
        result["seconds"],
        done,
    )
    return result


def check_out(out: str) -> None:
    """Raises UserError when the output folder holds something that no evaluation began; nothing is touched."""
    done = storage.join(out, "evaluate.json")
    begun = storage.exists(storage.join(out, STARTED)) or (storage.exists(done) and "bundle" in storage.read_json(done))
    if not begun and not is_empty(out):
        raise UserError("out", out, "is not empty, nor written by evaluate", "choose another folder")


def clear_out(out: str, stamp: dict[str, str]) -> None:
    """Removes what an evaluation of other settings left, and notes the present ones."""
    started = storage.join(out, STARTED)
    if storage.exists(started) and storage.read_json(started) == stamp:
        return
    for name in WRITTEN:
        storage.remove(storage.join(out, name))
    storage.write_json(started, stamp)


def headline(generation: dict[str, Any]) -> str:
    """The pictures' figures in a few words."""
    sound, ceiling = generation.get("sound", {}), generation.get("ceiling", {})
    if "object" in sound and "object" in ceiling:
        return ", ".join(f"{a} {sound[a]:.3f} (caption {ceiling[a]:.3f})" for a in ("object", "ambience"))
    return "CLIP-based: " + ", ".join(f"{k} {v:.3f}" for k, v in generation["clip"].get("sound", {}).items())


def load_clips(config: EvaluateConfig) -> tuple[pa.Table, pa.Table]:
    """The held-out clips with one frame each, and the training clips (features only), both in order of clip_id."""
    table = storage.read_table(config.features).sort_by("clip_id")
    test = table.filter(pc.field("split") == config.split).slice(0, config.max_clips)
    if len(test) < 10:
        raise UserError("split", config.split, f"has {len(test)} clips in {config.features}", "give a split with more")
    frames = storage.read_table(config.clips, ["clip_id", "frames"])
    frames = frames.filter(pc.is_in(frames["clip_id"], test["clip_id"])).sort_by("clip_id")
    if frames["clip_id"].to_pylist() != test["clip_id"].to_pylist():
        raise UserError(
            "clips", config.clips, "does not hold the clips of the FeatureTable", "give the ClipTable it came from"
        )
    middle = [rows[len(rows) // 2] for rows in frames["frames"].to_pylist()]
    return test.append_column("frame", pa.array(middle, pa.binary())), table.filter(pc.field("split") == "train")


def evaluate_retrieval(config: EvaluateConfig, bundle: Bundle, test: pa.Table, train: pa.Table) -> dict[str, Any]:
    """Retrieval in all four directions, audited for overlap with training and for batch invariance."""
    dim = int(bundle.config.encoder["embed_dim"])
    aligner = load_aligner(bundle)
    sounds = test["audio"].to_pylist()
    audio, image, text = (
        embed_files(aligner, sounds),
        vectors(test, "image_features", dim),
        vectors(test, "text_features", dim),
    )
    alone = embed_files(aligner, sounds[:64], batch_size=1)
    objects = np.array([labels[0] if labels else "" for labels in test["labels"].to_pylist()])
    nearest = (audio @ image.T).argmax(1)
    captions = test["caption"].to_numpy()
    trained = {*train["clip_id"].to_pylist(), *train["content_hash"].to_pylist()}
    tested = [*test["clip_id"].to_pylist(), *test["content_hash"].to_pylist()]
    return {
        "gallery": len(test),
        "overlap": sum(item in trained for item in tested),
        "batch_invariance_max_abs": float(np.abs(alone - audio[: len(alone)]).max()),
        "same_object_r1": float((objects[nearest] == objects).mean()),
        "same_object_chance": float(np.mean([(objects == o).mean() for o in objects])),
        "a2v": metrics.retrieval(audio, image),
        "v2a": metrics.retrieval(image, audio),
        "a2t": metrics.retrieval(audio, text, captions, captions),
        "t2a": metrics.retrieval(text, audio, captions, captions),
    }


def evaluate_pictures(
    config: EvaluateConfig, test: pa.Table, train: pa.Table, dtype: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Paints all cases on Ray and grades them; returns the figures and the sample cases for the report."""
    labels = test["labels"].to_pylist()
    cases = make_cases(labels, config.pictures)
    first = {labels[case["row"]][0]: case["row"] for case in reversed(cases) if case["condition"] == "sound"}
    series = loudness_cases(list(first.values())[:3], LOUDNESS_GAINS_DB, len(cases)) if config.judge == "toy" else []
    inputs = storage.absolute(storage.join(config.out, "inputs"))
    storage.write_table(f"{inputs}/test.parquet", test.select(["clip_id", "audio", "frame", "caption", "labels"]))
    storage.write_table(f"{inputs}/train.parquet", train.select(["caption", "audio"]).slice(0, 256))
    shards = []
    for group in [[c for c in [*cases, *series] if c["condition"] == name] for name in [*config.pictures, "loudness"]]:
        for at in range(0, len(group), config.cases_per_shard):
            part = group[at : at + config.cases_per_shard]
            out = storage.join(storage.absolute(config.out), "pictures", f"{part[0]['condition']}-{at:05d}.parquet")
            shards.append({"out": out, "rows": len(part), "cases": part})
    worker_args = {
        "bundle": storage.absolute(config.bundle),
        "clips": f"{inputs}/test.parquet",
        "train": f"{inputs}/train.parquet",
        "request": config.request.model_dump(),
        "device": config.device,
        "dtype": dtype,
        "judged": config.judge == "toy",
    }
    done = lambda shard: storage.exists(shard["out"])  # noqa: E731
    run_shards("evaluate", shards, PictureWorker, worker_args, config.cluster, done, unit="picture")
    painted = storage.read_table(storage.join(config.out, "pictures")).sort_by("case")
    figures = grade(painted, test, read_bundle(config.bundle), judged=config.judge == "toy")
    return figures, {"objects": first, "loudness_gains_db": LOUDNESS_GAINS_DB}
