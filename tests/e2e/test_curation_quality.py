"""What curation is worth: planted defects found among 5,000 clips, edited copies found, and retrieval with and without
it (make accept)."""

import csv
import json
import multiprocessing
import re
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from aai import storage
from aai.bundle import read_bundle
from aai.encoders.aligner import embed_files, load_aligner
from aai.metrics import bootstrap_ci, first_hit_ranks, retrieval
from aai.toy.roster import plain_clip
from aai.toy.scoring import score_defects
from aai.toy.writer import render_clip
from pipelines.evaluation.listening import mean_vectors
from tests.e2e.test_accept import CLIPS
from tests.e2e.test_curation import RUNS, run
from tests.edits import KINDS, edited, encoded, opened

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
FALSE_ACCEPT_RATE = 0.05
"""Chosen on the demo's world (seed 1), reported on others."""
TOY_CLIPS, TAKES, EDITS_SEED = 60, 5, 41
"""Thresholds were chosen on worlds of the seeds 11, 12 and 31."""


def fresh(name: str) -> Path:
    """A run folder without results; a world that lies there is kept."""
    base = RUNS / name
    for folder in base.glob("*") if base.exists() else ():
        if folder.name != "world" and folder.is_dir() and not folder.is_symlink():  # a link to Ray's logs
            shutil.rmtree(folder)
    base.mkdir(parents=True, exist_ok=True)
    return base


def planted(base: Path) -> dict[str, str]:
    """{uri: kind} of the clips that ought to be rejected."""
    defects = storage.read_json(str(base / "world" / "defects.json"))
    return {str(base / "world" / d["uri"]): d["kind"] for d in defects if d["expect"] == "reject"}


def test_b7_filters_find_what_was_planted() -> None:
    """5,000 clips: curated, aligned, and curated again with the aligner; per kind of defect precision and recall."""
    base = fresh("b7")
    run("world", "--out", str(base / "world"), "--clips", "5000", "--seed", "7")
    for verb in ("curate", "featurize", "align"):
        run(verb, run_dir=base)
    judged = {"scores__bundle": base / "align" / "bundle", "scores__false_accept_rate": FALSE_ACCEPT_RATE}
    run("curate", "--rejudge", run_dir=base, **judged)
    scores, bad = score_defects(str(base / "world" / "defects.json"), str(base / "curated")), planted(base)
    rejected = storage.read_table(str(base / "curated" / "rejected")).to_pylist()
    false_rejects = [row["uri"] for row in rejected if row["code"] == "WRONG_AUDIO" and row["uri"] not in bad]
    figures = {
        "kinds": {k: {n: v for n, v in kind.items() if n != "missed"} for k, kind in scores["kinds"].items()},
        "false_rejects": len(false_rejects),
        "false_reject_rate": len(false_rejects) / (5000 - len(bad)),
        "threshold": storage.read_json(str(base / "curated" / "curate.json"))["correspondence"]["threshold"],
    }
    (RUNS / "filters.json").write_text(json.dumps(figures, indent=1))
    kinds = scores["kinds"]
    assert kinds["wrong_audio"]["found"] >= 0.9 * kinds["wrong_audio"]["planted"]
    assert figures["false_reject_rate"] <= 0.01
    assert kinds["cross_split_duplicate"]["found"] == kinds["cross_split_duplicate"]["planted"]
    for name, kind in kinds.items():
        if "precision" in kind:  # a defect; oddities are to be accepted, and stand in filters.json
            assert kind["found"] >= 0.9 * kind["planted"], name
            assert kind["precision"] >= 0.9, name


# ---------------------------------------------------------------- B8: quality is worth it


def take(source: Path, out: Path, rows: pa.Table) -> None:
    """Writes some rows of a ClipTable as a table of their own."""
    table = storage.read_table(str(source))
    chosen = table.filter(pc.is_in(table["uri"], rows["uri"]))
    storage.write_table(str(out / "shard-00000.parquet"), chosen)


def trained_on(base: Path, name: str, clips: Path) -> np.ndarray:
    """Featurizes clips and aligns on them; the held-out sounds' embeddings by that aligner."""
    where = base / name
    run("featurize", run_dir=where, input=clips)
    run("align", run_dir=where)
    return embed_files(load_aligner(read_bundle(str(where / "align" / "bundle"))), held_out(base)["audio"].to_pylist())


def held_out(base: Path) -> pa.Table:
    """Features of the test clips in which nothing is wrong, by the planted truth, not by curation."""
    table = storage.read_table(str(base / "raw" / "features")).sort_by("uri")
    good = pc.invert(pc.is_in(table["uri"], pa.array(list(planted(base)))))
    return table.filter(pc.and_(good, pc.equal(table["split"], "test")))


def test_b8_curated_data_is_worth_its_price() -> None:
    """Two trainings of one size, on a world in which every third clip has the wrong sound."""
    base = fresh("b8")
    run("world", "--out", str(base / "world"), "--clips", "4000", "--seed", "8", shares="{wrong_audio: 0.35}")
    manifest = base / "world" / "manifest.csv"
    # Uncurated: all that can be decoded. Its aligner is the one that judges correspondence: nothing clean is needed.
    run("curate", "--flag-only", "--manifest", str(manifest), run_dir=base / "raw", duplicates__enabled="false")
    for verb in ("featurize", "align"):
        run(verb, run_dir=base / "raw")
    judged = {"scores__bundle": base / "raw/align/bundle", "scores__false_accept_rate": FALSE_ACCEPT_RATE}
    run("curate", "--manifest", str(manifest), run_dir=base / "clean", max_reject_ratio=0.8, **judged)
    curated = storage.read_table(str(base / "clean/curated/accepted"), ["uri", "split"])
    uncurated = storage.read_table(str(base / "raw/curated/accepted"), ["uri", "split"])
    size = pc.sum(pc.equal(curated["split"], "train")).as_py()
    pool = uncurated.filter(pc.equal(uncurated["split"], "train"))
    drawn = pool.take(np.random.default_rng(8).permutation(len(pool))[:size])
    assert len(drawn) == size
    rest = uncurated.filter(pc.not_equal(uncurated["split"], "train"))
    take(base / "raw/curated/accepted", base / "same/accepted", pa.concat_tables([drawn, rest]))
    figures: dict[str, Any] = {"train_clips": size, "planted_wrong_in_uncurated": 0.35}
    test = held_out(base)
    images, labels = mean_vectors(test, "image_features", 128), np.array([row[0] for row in test["labels"].to_pylist()])
    hits = {}
    for name, clips in (("uncurated", base / "same/accepted"), ("curated", base / "clean/curated/accepted")):
        sounds = trained_on(base, name, clips)
        ranks = first_hit_ranks(sounds, images, np.arange(len(test)), np.arange(len(test)))
        hits[name] = ranks <= 10
        figures[name] = {
            "a2v": retrieval(sounds, images),
            "r10_ci95": bootstrap_ci(ranks <= 10),
            "same_object_r1": retrieval(sounds, images, labels, labels)["r1"],
        }
    figures["r10_gain_ci95"] = bootstrap_ci(hits["curated"].astype(float) - hits["uncurated"].astype(float))
    (RUNS / "worth.json").write_text(json.dumps(figures, indent=1))
    assert figures["curated"]["r10_ci95"][0] > figures["uncurated"]["r10_ci95"][1]
    assert figures["r10_gain_ci95"][0] > 0


# ---------------------------------------------------------------- edited copies


def write_edits(folder: Path, number: int) -> None:
    """A clip of the toy world, all its edits, and other takes of it: the same object, another recording."""
    clip, rng = plain_clip(number, EDITS_SEED), np.random.default_rng((EDITS_SEED, number))
    other = opened(render_clip(plain_clip(number + 1000, EDITS_SEED)))
    data = render_clip(replace(clip, duration_s=float(rng.uniform(2, 6))))
    write_copies(folder, f"toy{number:03d}", data, other, rng)
    for take in range(TAKES):
        scene = replace(clip.scene, seed=int(rng.integers(2**31)))
        again = render_clip(replace(clip, scene=scene, sound=scene, duration_s=float(rng.uniform(2, 6))))
        (folder / f"toy{number:03d}_take{take}.mp4").write_bytes(again)


def write_copies(folder: Path, name: str, data: bytes, other: Any, rng: np.random.Generator) -> None:
    """SOURCE_source.mp4, and SOURCE_KIND.mp4 for each edit."""
    (folder / f"{name}_source.mp4").write_bytes(data)
    for kind in KINDS:
        (folder / f"{name}_{kind.replace(' ', '-')}.mp4").write_bytes(edited(kind, data, other, rng))


def write_real(folder: Path) -> None:
    """The real clips, all edits of them; and other parts of the same videos, which look the same."""
    other = opened(render_clip(plain_clip(1, EDITS_SEED)))
    for number, file in enumerate(sorted(CLIPS.glob("*.mp4"))):
        footage = opened(file.read_bytes())
        third_s = footage.duration_s / 3
        parts = [encoded(footage.part(i * third_s, (i + 1) * third_s), crf=20) for i in range(3)]
        write_copies(folder, f"real{number:03d}", parts[0], other, np.random.default_rng(number))
        for take, part in enumerate(parts[1:]):
            (folder / f"real{number:03d}_take{take}.mp4").write_bytes(part)


def edits_world(base: Path) -> Path:
    """A manifest of sources in test, and their copies and other takes in train."""
    clips, manifest = base / "world" / "clips", base / "world" / "manifest.csv"
    if manifest.exists():
        return manifest
    clips.mkdir(parents=True)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(partial(write_edits, clips), range(TOY_CLIPS)))
    write_real(clips)
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["uri", "split"])
        for path in sorted(clips.iterdir()):
            rows.writerow([f"clips/{path.name}", "test" if "_source" in path.name else "train"])
    return manifest


def copies_found(out: Path) -> dict[str, tuple[int, int]]:
    """By kind of copy, and for other takes: (those rejected as a duplicate of their source, all)."""
    rows = storage.read_table(str(out / "rejected"), ["uri", "code", "message"]).to_pylist()
    assert {row["code"] for row in rows} <= {"CROSS_SPLIT_DUPLICATE", "NEAR_DUPLICATE"}, "no filter may interfere"
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    of_source = {row["uri"] for row in rows if _source(row["uri"]) in row["message"]}
    uris = storage.read_table(str(out / "accepted"), ["uri"])["uri"].to_pylist() + [row["uri"] for row in rows]
    for uri in uris:
        kind = re.sub(r"\d+$", "", uri.rsplit("_", 1)[1].removesuffix(".mp4"))
        found[kind][0] += uri in of_source
        found[kind][1] += 1
    return {kind: (hits, count) for kind, (hits, count) in found.items()}


def _source(uri: str) -> str:
    return uri.rsplit("/", 1)[1].split("_")[0] + "_source.mp4"


def test_j2_edited_copies_are_found() -> None:
    """Thirteen edits of 60 and more clips, and other takes of each: by the present rules, and by whole hashes alone."""
    base = fresh("edits")
    args = ("--manifest", str(edits_world(base)), "--max-reject-ratio", "1")
    tables = {}
    for name, flags, on in (("whole hashes", (), "false"), ("prints", ("--rejudge",), "true")):
        run("curate", *args, *flags, run_dir=base, duplicates__edited__enabled=on)
        tables[name] = copies_found(base / "curated")
    kinds = [kind.replace(" ", "-") for kind in KINDS]
    figures: dict[str, Any] = {}
    for name, found in tables.items():
        hits, count = (sum(found[kind][i] for kind in kinds) for i in (0, 1))
        false, takes = found["take"]
        figures[name] = {kind: found[kind][0] / found[kind][1] for kind in kinds} | {
            "all": hits / count,
            "precision": hits / max(1, hits + false),
            "other takes kept": 1 - false / takes,
        }
    for kind in figures["prints"]:
        print(f"| {kind} | {' | '.join(f'{rates[kind]:.3f}' for rates in figures.values())} |")
    (RUNS / "edits.json").write_text(json.dumps(figures | {"counts": tables}, indent=1))
    found = figures["prints"]
    assert found["all"] >= 0.95
    assert min(found[kind] for kind in kinds) >= 0.9
    assert min(found["precision"], found["other takes kept"]) >= 0.98
    accepted = storage.read_table(str(base / "curated" / "accepted"), ["uri", "split"]).to_pylist()
    sources = {row["uri"] for row in accepted if row["split"] == "test"}
    across = [row["uri"] for row in accepted if row["split"] == "train" and "_take" not in row["uri"]]
    print(f"{len(across)} of {len(sources) * len(kinds)} copies are left in another split than their source: {across}")
    assert not across
