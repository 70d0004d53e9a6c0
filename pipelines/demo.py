"""Everything on the toy world, on this machine: from clips to a promoted bundle, pictures and a report.

    aai demo                       # runs/demo, about ten minutes on two cores
    aai demo --out runs/mine

Runs the same commands as a cluster would, with configs/demo/*.yaml: world, curate, featurize, align, adapt, evaluate,
promote, generate. What is finished is kept, so the command can be run again after any interruption. Ends with
OUT/report.html and OUT/summary.json.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pydantic

from aai import storage
from aai.media.waveform import read_sound, sound_rate_hz, write_wav
from aai.schema import VERSION
from aai.toy.scoring import score_defects
from pipelines.__main__ import load_config, module_of, run_verb
from pipelines.engine import cluster
from pipelines.engine.machine import peak_memory
from pipelines.pages import report
from pipelines.settings import Plan, RayVerbConfig

log = logging.getLogger(__name__)

STAGES = ("world", "curate", "featurize", "align", "adapt", "evaluate", "promote")
ABOUT = {
    "name": "toy world",
    "description": "Synthetic clips: drawn scenes and the sounds that belong to them, some of them spoiled on purpose.",
    "license": "Apache-2.0",
    "creator": "aai world",
    "collection": "Drawn and synthesised by aai world; nothing was recorded.",
    "personal_information": ["None: nobody is seen or heard."],
}
"""What croissant.json says of the demo's clips."""
EXAMPLES = 2
"""Held-out sounds that the last step paints."""


class DemoConfig(RayVerbConfig):
    """Settings of `aai demo`; those of its stages are in configs/demo/."""

    overrides: dict[str, tuple[str, ...]] = pydantic.Field(default_factory=dict)
    """Settings of single stages, as for their --set: {world: [clips=300], align: [fit.steps=50]}."""

    def plan(self) -> Plan:
        """See VerbConfig."""
        outputs = {name: storage.join(self.run_dir, f"{name}") for name in ("report.html", "summary.json", *STAGES)}
        return Plan(inputs={}, outputs=outputs, resources=self.resources())


CONFIG = DemoConfig


def add_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Short flags and the settings they stand for."""
    parser.add_argument("--out", metavar="DIR", help="folder of the run [runs/demo]")
    return {"out": "run_dir"}


def run(config: DemoConfig) -> dict[str, Any]:
    """Runs all stages and writes report and summary; returns the summary."""
    seconds: dict[str, float] = {}
    results: dict[str, dict[str, Any]] = {}
    begin = time.monotonic()
    with peak_memory() as peak:
        cluster.connect(config.cluster, config.run_dir)
        for number, verb in enumerate(STAGES, 1):
            log.info("\n[%d/%d] %s", number, len(STAGES) + 1, verb)
            start = time.monotonic()
            settings, _ = load_config(verb, stage_settings(config, verb))
            results[verb] = run_verb(verb, settings)
            seconds[verb] = round(time.monotonic() - start, 1)
        log.info("\n[%d/%d] generate", len(STAGES) + 1, len(STAGES) + 1)
        start = time.monotonic()
        results["generate"] = generate_examples(config.run_dir)
        seconds["generate"] = round(time.monotonic() - start, 1)
        cluster.shutdown()
    seconds["total"] = round(time.monotonic() - begin, 1)
    where = storage.join(config.run_dir, "summary.json")
    earlier = storage.read_json(where) if storage.exists(where) else {}
    summary = summarise(config.run_dir, results, seconds, round(peak[0] / 1e9, 2))
    # A later run keeps what is finished and takes seconds: what the work itself took must not be lost.
    own = {key: summary[key] for key in ("seconds", "peak_rss_gb")}
    summary["first_run"] = earlier.get("first_run", own)
    storage.write_json(where, summary)
    page = report.write_report(config.run_dir, summary)
    log.info(
        "\ndemo: finished in %.0f s, peak memory %.1f GB; open %s\n      figures in %s",
        seconds["total"],
        summary["peak_rss_gb"],
        page,
        where,
    )
    return summary


def stage_settings(config: DemoConfig, verb: str) -> list[str]:
    """The arguments of a stage."""
    settings = [f"run_dir={config.run_dir}"]
    if issubclass(module_of(verb).CONFIG, RayVerbConfig):
        cluster = config.cluster
        settings += [
            f"cluster.address={cluster.address or 'null'}",
            f"cluster.num_workers={cluster.num_workers}",
            f"cluster.cpus_per_worker={cluster.cpus_per_worker}",
            f"cluster.gpus_per_worker={cluster.gpus_per_worker}",
        ]
    if verb == "curate":
        settings += [f"about.{name}={json.dumps(value)}" for name, value in ABOUT.items()]
    words = []
    for setting in (*settings, *config.overrides.get(verb, ())):
        words += ["--set", setting]
    return words


def generate_examples(run_dir: str) -> dict[str, Any]:
    """Paints, edits and stylizes by a few held-out sounds through the registered champion, with the public verbs."""
    accepted = storage.read_table(
        storage.join(run_dir, "curated", "accepted"), ["clip_id", "split", "labels", "audio", "frames"]
    )
    test = accepted.filter(pc.field("split") == "test").sort_by("clip_id").slice(0, 200).to_pylist()
    chosen = list({row["labels"][0]: row for row in reversed(test)}.values())[:EXAMPLES]
    files: list[str] = []
    for i, row in enumerate(chosen):
        name = f"sound{i}"
        sound = storage.join(run_dir, "pictures", f"{name}.wav")
        picture = storage.join(run_dir, "pictures", f"{name}_given.png")
        storage.write_bytes(picture, chosen[(i + 1) % len(chosen)]["frames"][0])
        write_wav(sound, read_sound(row["audio"]), sound_rate_hz(row["audio"]))
        for verb in ("generate", "edit", "stylize"):
            image = [] if verb == "generate" else ["--image", picture]
            settings, _ = load_config(verb, ["--audio", sound, *image, "--set", f"run_dir={run_dir}"])
            files += module_of(verb).run(settings)["files"]
    return {"files": files}


def summarise(
    run_dir: str, results: dict[str, dict[str, Any]], seconds: dict[str, float], peak_rss_gb: float
) -> dict[str, Any]:
    """Every figure of the run (summary.json)."""
    scores = score_defects(storage.join(run_dir, "world", "defects.json"), storage.join(run_dir, "curated"))
    curate, evaluate, promote = results["curate"], results["evaluate"], results["promote"]
    return {
        "version": VERSION,
        "seconds": seconds,
        "peak_rss_gb": peak_rss_gb,
        "curate": {
            **{key: curate[key] for key in ("rows_in", "accepted", "rejected", "by_code")},
            "defect_recall": scores["recall"],
            "defect_precision": scores["precision"],
            "defects": scores,
        },
        "foundation": evaluate["foundation"],
        "align": results["align"]["metrics"],
        "adapt": results["adapt"]["metrics"],
        "retrieval": evaluate["retrieval"],
        "generation": evaluate["generation"],
        "registry": {key: promote[key] for key in ("name", "version", "alias")},
        "pictures": [Path(file).name for file in results["generate"]["files"]],
    }
