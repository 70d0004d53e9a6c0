"""Quality on held-out clips: retrieval, and pictures painted from sound beside their floors and their ceiling.

Pictures are read by the judge of the toy world and by the frozen CLIP. Ray actors share the painting; every picture
has its own seed, so the figures do not depend on how many actors there are. All pictures stay in OUT/pictures.
"""

import argparse
import io
import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
import torch
from PIL import Image

from aai import grading, metrics, storage
from aai.bundle import Bundle, read_bundle
from aai.encoders.audio import AudioEncoder, AudioEncoderConfig
from aai.encoders.clip import FrozenClip
from aai.errors import UserError
from aai.foundation import TOY_WEIGHTS
from aai.media.audio import decode_flac
from aai.painter import PaintRequest
from aai.toy.grammar import AMBIENCES, MEDIA, OBJECTS
from aai.toy.judge import Judge
from pipelines import tracking
from pipelines.picture_cases import PictureWorker, loudness_cases, make_cases
from pipelines.settings import DType, Plan, TrackingConfig, VerbConfig
from pipelines.shards import run_shards

log = logging.getLogger(__name__)
LOUDNESS_GAINS_DB = [-18.0, -12.0, -6.0, 0.0, 6.0]


class EvaluateConfig(VerbConfig):
    """What is evaluated and how many pictures are painted."""

    features: str = "${run_dir}/features"
    """FeatureTable."""
    clips: str = "${run_dir}/curated/accepted"
    """ClipTable of the same clips: the frames that are edited."""
    bundle: str = "${run_dir}/adapt/bundle"
    out: str = "${run_dir}/evaluate"
    split: str = "test"
    max_clips: int = pydantic.Field(2000, ge=10)
    """Size of the retrieval gallery at most; clips are taken in order of clip_id."""
    pictures: dict[str, int] = {
        "caption": 300, "sound": 400, "ceiling": 400, "nearest_caption": 200, "closed_form": 200, "shuffled_audio": 400,
        "random_token": 400, "sketch": 200, "edit": 150, "stylize": 150,
    }
    """Pictures per condition (see docs/evaluation.md)."""
    max_frames: int = pydantic.Field(1200, ge=1)
    """Held-out frames that the judge and the CLIP are themselves graded on."""
    cases_per_shard: int = pydantic.Field(25, ge=1)
    request: PaintRequest = PaintRequest(steps=12)
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
    start = time.perf_counter()
    bundle = read_bundle(config.bundle)
    manifest = storage.read_json(storage.join(config.features, "manifest.json"))
    stamp = {"config": config.digest(), "bundle": bundle.sha, "data_fingerprint": manifest["fingerprint"]}
    done = storage.join(config.out, "evaluate.json")
    if storage.exists(done) and {k: storage.read_json(done).get(k) for k in stamp} == stamp:
        log.info("evaluate: up to date -> %s", done)
        return dict(storage.read_json(done))
    storage.remove(config.out)
    test, train = load_clips(config)
    retrieval = evaluate_retrieval(config, bundle, test, train)
    generation, samples = evaluate_pictures(config, test, train)
    foundation = grade_foundation(config, bundle, test) | generation.pop("caption")
    result = {
        **stamp, "foundation": foundation, "retrieval": retrieval, "generation": generation, "samples": samples,
        "seconds": time.perf_counter() - start,
    }
    storage.write_json(done, result)
    with tracking.run(config.tracking, "evaluate", config.model_dump(mode="json"), {"bundle": bundle.sha}) as mlrun:
        mlrun.log_metrics(flatten({"retrieval": retrieval, "generation": generation}))
        mlrun.log_artifact(done)
    sound, ceiling = generation["sound"], generation["ceiling"]
    log.info(
        "evaluate: same-object R@1 %.3f of %d clips; sound -> picture object %.3f (caption %.3f), ambience %.3f (caption "
        "%.3f) in %.0f s -> %s", retrieval["same_object_r1"], retrieval["gallery"], sound["object"], ceiling["object"],
        sound["ambience"], ceiling["ambience"], result["seconds"], done,
    )
    return result


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested dict by dotted name."""
    out: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            out[prefix + key] = float(value)
    return out


def load_clips(config: EvaluateConfig) -> tuple[pa.Table, pa.Table]:
    """The held-out clips with one frame each, and the training clips (features only), both in order of clip_id."""
    table = storage.read_table(config.features).sort_by("clip_id")
    test = table.filter(pc.field("split") == config.split).slice(0, config.max_clips)
    if len(test) < 10:
        raise UserError("split", config.split, f"has {len(test)} clips in {config.features}", "give a split with more")
    frames = storage.read_table(config.clips, ["clip_id", "frames"])
    frames = frames.filter(pc.is_in(frames["clip_id"], test["clip_id"])).sort_by("clip_id")
    if frames["clip_id"].to_pylist() != test["clip_id"].to_pylist():
        raise UserError("clips", config.clips, "does not hold the clips of the FeatureTable", "give the ClipTable it came from")
    middle = [rows[len(rows) // 2] for rows in frames["frames"].to_pylist()]
    return test.append_column("frame", pa.array(middle, pa.binary())), table.filter(pc.field("split") == "train")


def vectors(table: pa.Table, column: str, dim: int) -> np.ndarray:
    """Mean unit feature [N, dim] of a flattened [N, K * dim] column."""
    flat = table[column].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    mean = flat.reshape(len(table), -1, dim).mean(1)
    return np.asarray(mean / np.linalg.norm(mean, axis=1, keepdims=True))


def load_aligner(bundle: Bundle) -> AudioEncoder:
    """The bundle's audio encoder, frozen."""
    aligner = AudioEncoder(AudioEncoderConfig.parse(bundle.config.encoder, "bundle"))
    aligner.load_state_dict(bundle.aligner())
    return aligner.eval().requires_grad_(False)


def embed_audio(aligner: AudioEncoder, audio: list[bytes], batch_size: int = 64) -> np.ndarray:
    """Aligned embeddings [N, D] of FLAC sounds."""
    from aai.encoders.audio import fit_length

    parts = []
    for at in range(0, len(audio), batch_size):
        waves = [torch.from_numpy(decode_flac(data)) for data in audio[at : at + batch_size]]
        batch = torch.stack([fit_length(wave, aligner.config.clip_samples) for wave in waves])
        with torch.no_grad():
            parts.append(aligner(batch).numpy())
    return np.concatenate(parts)


def evaluate_retrieval(config: EvaluateConfig, bundle: Bundle, test: pa.Table, train: pa.Table) -> dict[str, Any]:
    """Retrieval in all four directions, audited for overlap with training and for batch invariance."""
    dim = int(bundle.config.encoder["embed_dim"])
    aligner = load_aligner(bundle)
    sounds = test["audio"].to_pylist()
    audio, image, text = embed_audio(aligner, sounds), vectors(test, "image_features", dim), vectors(test, "text_features", dim)
    alone = embed_audio(aligner, sounds[:64], batch_size=1)
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


def evaluate_pictures(config: EvaluateConfig, test: pa.Table, train: pa.Table) -> tuple[dict[str, Any], dict[str, Any]]:
    """Paints all cases on Ray and grades them; returns the figures and the sample cases for the report."""
    labels = test["labels"].to_pylist()
    cases = make_cases(labels, config.pictures)
    first = {labels[case["row"]][0]: case["row"] for case in reversed(cases) if case["condition"] == "sound"}
    series = loudness_cases(list(first.values())[:3], LOUDNESS_GAINS_DB, len(cases))
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
        "bundle": storage.absolute(config.bundle), "clips": f"{inputs}/test.parquet", "train": f"{inputs}/train.parquet",
        "request": config.request.model_dump(), "device": config.device, "dtype": config.dtype,
    }
    run_shards("evaluate", shards, PictureWorker, worker_args, config.cluster, lambda s: storage.exists(s["out"]))
    painted = storage.read_table(storage.join(config.out, "pictures")).sort_by("case")
    bundle = read_bundle(config.bundle)
    return grade(painted, test, bundle), {"objects": first, "loudness_gains_db": LOUDNESS_GAINS_DB}


def grade(painted: pa.Table, test: pa.Table, bundle: Bundle) -> dict[str, Any]:
    """All figures of the painted pictures (see docs/evaluation.md for their definitions)."""
    truth = [dict(zip(("object", "ambience", "medium", "size"), row, strict=False)) for row in test["labels"].to_pylist()]
    rows = painted.to_pylist()
    figures: dict[str, Any] = {"pictures": len(rows)}
    by_condition: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_condition.setdefault(row["condition"], []).append(row)
    for name, seen in by_condition.items():
        if name == "loudness":
            continue
        if name == "caption":
            said = [truth[row["row"]] for row in seen]
            figures[name] = {f"caption_{a}": grading.accuracy(seen, said, a) for a in ("object", "ambience", "medium")}
            figures[name]["caption_pictures"] = len(seen)
            continue
        heard = [truth[row["row"]] for row in seen]
        figures[name] = {a: grading.accuracy(seen, heard, a) for a in ("object", "ambience")} | {"pictures": len(seen)}
    if "sketch" in by_condition:
        figures["sketch"]["medium"] = float(np.mean([row["medium"] == "sketch" for row in by_condition["sketch"]]))
    for name, attributes in (("edit", ("ambience", "medium")), ("stylize", ("object", "medium"))):
        seen = by_condition.get(name, [])
        if seen:
            given = [truth[row["picture_row"]] for row in seen]
            figures[name]["kept"] = grading.kept(seen, given, attributes)
            figures[name] |= {f"kept_{a}": grading.accuracy(seen, given, a) for a in attributes}
    figures["chance"] = {"object": 1 / len(OBJECTS), "ambience": 1 / len(AMBIENCES), "medium": 1 / len(MEDIA)}
    sound = by_condition["sound"]
    loudness = [rms_db(decode_flac(test["audio"][row["row"]].as_py())) for row in sound]
    figures["loudness_size_spearman"] = metrics.spearman(np.array(loudness), np.array([row["size"] for row in sound]))
    figures["clip"] = clip_scores(by_condition, test, bundle)
    return figures


def grade_foundation(config: EvaluateConfig, bundle: Bundle, test: pa.Table) -> dict[str, Any]:
    """The judge and the CLIP on held-out frames with known truth, and the size of the toy world's weights."""
    frames = storage.read_table(config.clips, ["clip_id", "frames", "labels"])
    frames = frames.filter(pc.is_in(frames["clip_id"], test["clip_id"]))
    rows = [(data, labels) for row in frames.to_pylist() for data, labels in ((f, row["labels"]) for f in row["frames"])]
    rows = rows[:: max(1, len(rows) // config.max_frames)]
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data, _ in rows]
    truth = [labels[0] for _, labels in rows]
    read = [seen["object"] for seen in Judge.load().read(pictures)]
    clip = FrozenClip(bundle.config.foundation)
    classes = clip.texts([f"a photo of a {name}" for name in OBJECTS])
    return {
        "frames": len(rows),
        "judge_object": float(np.mean([a == b for a, b in zip(read, truth, strict=True)])),
        "clip_object": grading.zero_shot(clip.images(pictures), classes, [OBJECTS.index(name) for name in truth]),
        "weights_mb": sum(file.stat().st_size for file in TOY_WEIGHTS.rglob("*.safetensors")) / 1e6,
    }


def rms_db(audio: np.ndarray) -> float:
    """Loudness of a waveform in dB full scale."""
    return float(10 * np.log10(np.mean(np.square(audio)) + 1e-10))


def clip_scores(by_condition: dict[str, list[dict[str, Any]]], test: pa.Table, bundle: Bundle) -> dict[str, Any]:
    """AIC, AIS, IIS and CLIP-MMD of the pictures from sound and from the true caption."""
    clip = FrozenClip(bundle.config.foundation)
    audio = torch.from_numpy(embed_audio(load_aligner(bundle), test["audio"].to_pylist()))
    image = torch.from_numpy(vectors(test, "image_features", clip.dim))
    names = sorted({labels[0] for labels in test["labels"].to_pylist() if labels})
    classes = clip.texts([f"a photo of a {name}" for name in names])
    out: dict[str, Any] = {}
    for condition in ("sound", "ceiling", "shuffled_audio"):
        rows = by_condition.get(condition, [])
        if not rows:
            continue
        painted = torch.tensor([row["clip_feature"] for row in rows])
        of = [row["row"] for row in rows]
        out[condition] = {
            "aic": grading.zero_shot(painted, classes, [names.index(test["labels"][i].as_py()[0]) for i in of]),
            "ais": grading.similarity_rank(painted, audio[of], audio),
            "iis": grading.similarity_rank(painted, image[of], image),
            "clip_mmd": grading.clip_mmd(painted, image),
        }
    return out
