"""What each section of the report shows, gathered from the files of a run.

A builder takes the files of a run and returns what the template needs; it raises Missing where there are none.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from aai import storage
from aai.encoders.audio import AudioEncoderConfig
from aai.media.signals import level_db
from aai.media.waveform import read_sound, sound_rate_hz
from aai.version import UNKNOWN
from pipelines.pages.plots import data_uri, lines, scatter, spectrogram, thumbnail
from pipelines.pages.run_files import Missing, Row, RunFiles, find, need, spread

HERO = ("sound", "sketch", "nearest_caption", "closed_form", "ceiling", "shuffled_audio", "random_token")
CONDITIONS = {
    "full_caption": "a caption that names everything: the ceiling of what clips' captions leave out",
    "ceiling": "the true caption as prompt: the ceiling of what it names",
    "sound": "the sound alone, through the trained adapter",
    "sketch": "the same sound in “a sketch of <sound>”",
    "nearest_caption": "the training caption nearest to the sound as prompt",
    "closed_form": "the text projection inverted in closed form: no adapter training",
    "shuffled_audio": "another clip's sound: a floor",
    "random_token": "a random token: a floor",
    "edit": "the sound's object put into a given picture",
    "stylize": "the sound's ambience put onto a given picture",
}
"""Conditions in the order of the table, and what the picture is painted from."""
DIRECTIONS = {"a2v": "sound → picture", "v2a": "picture → sound", "a2t": "sound → caption", "t2a": "caption → sound"}
MAIN_PLOTS = ("training loss", "held-out loss", "held-out recall")
RATES = ("learning_rate", "steps_per_s", "grad_norm")
SHEET, TRIPLETS = 24, 8


def head(run: RunFiles) -> Row:
    """Headline figures, each beside what it is to be held against; an absent one is None."""
    s = run.summary

    def tile(label: str, value: str, kind: str, **marks: str) -> Row:
        beside = {name: find(s, mark) for name, mark in marks.items()}
        return {"label": label, "value": find(s, value), "kind": kind, "marks": beside}

    def painted(attribute: str) -> Row:
        names = {"caption": "ceiling", "chance": "chance"}
        return {name: f"generation.{condition}.{attribute}" for name, condition in names.items()}

    same = "retrieval.same_object"
    return {
        "tiles": [
            tile("sound → object in the picture", "generation.sound.object", "share", **painted("object")),
            tile("sound → ambience in the picture", "generation.sound.ambience", "share", **painted("ambience")),
            tile("same-object R@1, sound → picture", f"{same}_r1", "share", chance=f"{same}_chance"),
            tile("loudness ~ painted size, Spearman", "generation.loudness_size_spearman", "number"),
            tile("curation recall, planted defects", "curate.defect_recall", "share"),
            tile("curation precision", "curate.defect_precision", "share"),
            tile("all stages", "first_run.seconds.total", "seconds"),
            tile("peak memory, all processes", "first_run.peak_rss_gb", "gb"),
        ],
        "registry": find(s, "registry"),
        "gates": _gates(run),
    }


def _gates(run: RunFiles) -> Row | None:
    try:
        verdicts = find(run.json("promote/promote.json"), "gates") or []
    except Missing:
        return None
    return {"passed": sum(v["passed"] for v in verdicts), "rows": verdicts} if verdicts else None


def _picture(row: Row, truth: str, attribute: str = "object", note: str = "") -> Row:
    """A painted picture with the judge's reading, held against what `attribute` should be."""
    if row["object"] is None:
        return {
            "src": thumbnail(row["png"]),
            "ok": None,
            "read": "no judge",
            "title": f"asked for: {truth}",
            "note": note,
        }
    read = f"{row['object']}, {row['ambience']}, {row['medium']}, size {row['size']:.2f}"
    return {
        "src": thumbnail(row["png"]),
        "ok": row[attribute] == truth,
        "read": row[attribute],
        "title": f"the judge reads: {read}; asked for: {truth}; seed {row['seed']}",
        "note": note,
    }


def _sound(run: RunFiles, row: int) -> Row:
    clip = run.clips[row]
    audio = read_sound(clip["audio"])
    rate_hz = sound_rate_hz(clip["audio"])
    return {
        "spectrogram": spectrogram(audio, AudioEncoderConfig(sample_rate_hz=rate_hz)),
        "audio": data_uri(clip["audio"], "audio/flac"),
        "seconds": len(audio) / rate_hz,
        "khz": rate_hz / 2000,
        "labels": clip["labels"],
        "caption": clip["caption"],
        "frame": thumbnail(clip["frame"]),
    }


def hero(run: RunFiles) -> Row:
    """Per sounding object one test clip: its sound, its true frame, and a picture under each condition."""
    rows = []
    for name, row in sorted(need(run.samples, "objects").items()):
        cells = {condition: _hero_cell(run, condition, name, row) for condition in HERO}
        rows.append({"object": name, **_sound(run, row), "cells": cells})
    return {"rows": rows, "conditions": {name: CONDITIONS[name] for name in HERO}}


def _hero_cell(run: RunFiles, condition: str, name: str, row: int) -> Row | None:
    """The same clip's picture; else, said in its note, that of another clip with this object."""
    painted = run.pictures.get(condition, [])
    own = [p for p in painted if p["row"] == row]
    others = [p for p in painted if run.clips[p["row"]]["labels"][:1] == [name]]
    if not own and not others:
        return None
    picture = (own or others)[0]
    notes = [] if own else ["another clip"]
    if picture["audio_row"] != picture["row"]:
        notes.append(f"hears: {run.clips[picture['audio_row']]['labels'][0]}")
    cell = _picture(picture, name, note=", ".join(notes))
    beside = picture["medium" if condition == "sketch" else "ambience"]
    return {**cell, "read": f"{picture['object']}, {beside}"} if beside else cell


def loudness(run: RunFiles) -> Row:
    """One sound at several gains with the size the judge reads, and loudness against size over all sounds."""
    by_clip: dict[int, list[Row]] = {}
    for row in run.painted("loudness"):
        by_clip.setdefault(row["row"], []).append(row)
    series, curves = [], {}
    for clip, rows in by_clip.items():
        rows = sorted(rows, key=lambda r: r["gain_db"])
        name = run.clips[clip]["labels"][0]
        curves[name] = [(r["gain_db"], r["size"]) for r in rows]
        cells = [{**_picture(r, name), "gain_db": r["gain_db"], "size": r["size"]} for r in rows]
        series.append({"object": name, "cells": cells})
    plots = [lines(curves, "Judged size by gain", "gain in dB", "size read by the judge", dots=True)]
    if "sound" in run.pictures:
        points = [(level_db(read_sound(run.clips[r["row"]]["audio"])), r["size"]) for r in run.pictures["sound"]]
        title = "Judged size by loudness, held-out sounds"
        plots.append(scatter(points, title, "loudness in dBFS", "size read by the judge"))
    return {
        "series": series,
        "plots": plots,
        "spearman": find(run.summary, "generation.loudness_size_spearman"),
        "pictures": len(run.pictures.get("sound", [])),
    }


def repaint(run: RunFiles) -> Row:
    """Edited and stylized pictures: (given picture, sound, result), the first case of each label."""
    parts = []
    for verb, place, kept in (("edit", 0, ("ambience", "medium")), ("stylize", 1, ("object", "medium"))):
        painted = run.pictures.get(verb, [])
        if painted:
            attribute = ("object", "ambience")[place]
            figures = find(run.summary, f"generation.{verb}") or {}
            parts.append({
                "verb": verb, "attribute": attribute, "kept": kept, "figures": figures, "about": CONDITIONS[verb],
                "chance": find(run.summary, f"generation.chance.{attribute}"), "pictures": len(painted),
                "triplets": [_triplet(run, row, place, attribute) for row in _first_of_each(run, painted, place)],
            })  # fmt: skip
    if not parts:
        raise Missing("no pictures were edited or stylized")
    return {"parts": parts}


def _first_of_each(run: RunFiles, painted: list[Row], place: int) -> list[Row]:
    """The first case of every label in turn, then the second, ...: nobody picked the good ones."""
    by_label: dict[str, list[Row]] = {}
    for row in painted:
        by_label.setdefault(run.clips[row["audio_row"]]["labels"][place], []).append(row)
    rounds = range(max(len(rows) for rows in by_label.values()))
    in_turn: list[Row] = []
    for i in rounds:
        in_turn += [rows[i] for rows in by_label.values() if i < len(rows)]
    return in_turn[:TRIPLETS]


def _triplet(run: RunFiles, row: Row, place: int, attribute: str) -> Row:
    given, heard = run.clips[row["picture_row"]], run.clips[row["audio_row"]]
    wanted = heard["labels"][place]
    return {
        "given": thumbnail(given["frame"]), "given_labels": given["labels"], "sound": heard["labels"],
        "wanted": wanted, "result": _picture(row, wanted, attribute),
    }  # fmt: skip


def figures(run: RunFiles) -> Row:
    """Every condition with what the judge reads right, and the CLIP-based scores."""
    generation = need(run.summary, "generation")
    found = {k: v for k, v in generation.items() if isinstance(v, Mapping) and "pictures" in v}
    order = [*(k for k in CONDITIONS if k in found), *(k for k in found if k not in CONDITIONS)]
    conditions = []
    for name in order:
        row = dict(found[name])
        noise = row.pop("from_noise", None)
        conditions.append({"name": name, "about": CONDITIONS.get(name, ""), **row})
        if noise:
            conditions.append(
                {"name": f"{name}, from noise", "about": "told what it shows, without it: a floor", **noise}
            )
    return {
        "conditions": conditions,
        "chance": generation.get("chance", {}),
        "clip": generation.get("clip", {}),
        "foundation": find(run.summary, "foundation") or {},
        "painted": _painted(run),
    }


def _painted(run: RunFiles) -> str:
    """How the pictures were painted, in words; empty where an older release did not say."""
    try:
        found = run.json("evaluate/evaluate.json")
    except Missing:
        return ""
    if "request" not in found:
        return ""
    request, addons = found["request"], found["addons"]
    reused = f" (the whole network every {request['reuse_steps']})" if request["reuse_steps"] > 1 else ""
    words = [f"{request['steps']} steps{reused}", f"guidance scale {request['guidance_scale']:g}"]
    words.append(f"sampler {addons.get('scheduler', 'of the model')}")
    return ", ".join([*words, *([f"LoRA {addons['lora']}"] if "lora" in addons else [])])


def retrieval(run: RunFiles) -> Row:
    """Retrieval in four directions, the overlap audit and the batch invariance."""
    found = need(run.summary, "retrieval")
    return {"directions": {k: {"name": v, **found[k]} for k, v in DIRECTIONS.items() if k in found}, **found}


def training(run: RunFiles) -> Row:
    """Curves of both trained stages; a stage without a history is left out."""
    stages = {name: plots for name in ("align", "adapt") if (plots := _curves(run, name))["main"]}
    if not stages:
        raise Missing("neither align/history.jsonl nor adapt/history.jsonl holds entries")
    return {"stages": stages}


def _curves(run: RunFiles, stage: str) -> dict[str, list[Any]]:
    """Plots of losses and held-out figures (`main`), and of what else was logged (`more`)."""
    try:
        entries = run.json(f"{stage}/history.jsonl")
    except Missing:
        entries = []
    groups: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for entry in entries:
        for name in entry.keys() - {"step"}:
            groups.setdefault(_group(name), {}).setdefault(name, []).append((entry["step"], entry[name]))
    plots: dict[str, list[Any]] = {"main": [], "more": []}
    for title in [*(t for t in MAIN_PLOTS if t in groups), *sorted(groups.keys() - MAIN_PLOTS)]:
        group = dict(sorted(groups[title].items()))
        values: list[float] = []
        for points in group.values():
            values += [y for _, y in points]
        wide = min(values) > 0 and max(values) / min(values) > 30
        curve = lines(
            group, f"{stage}: {title}", log_y=wide, floor_zero=not wide and min(values) >= 0,
            dots=title.startswith("held-out"),
        )  # fmt: skip
        plots["main" if title in MAIN_PLOTS else "more"].append(curve)
    return plots


def _group(name: str) -> str:
    """Which plot a logged figure belongs to."""
    if name.startswith("val_"):
        return "held-out recall" if name.endswith("_r1") else "held-out loss"
    if name.startswith("temperature"):
        return "temperature"
    return name.replace("_", " ") if name in RATES else "training loss"


def curation(run: RunFiles) -> Row:
    """The funnel, the planted defects, and a contact sheet of what was kept and what was not."""
    counts = {**run.json("curated/curate.json"), **(find(run.summary, "curate") or {})}
    need(counts, "rows_in")
    scores = dict(find(counts, "defects") or {})
    return {**counts, **_defects(run, scores), "kept": _accepted(run), "dropped": _rejected(run)}


def _defects(run: RunFiles, scores: Row) -> Row:
    """What was planted, by kind: what had to become of it, how often it did, and which files were missed."""
    try:
        expected = {planted["kind"]: planted["expect"] for planted in run.json("world/defects.json")}
    except Missing:
        expected = {}
    kinds: list[Row] = []
    for part in ("kinds", "unseen"):
        for kind, found in sorted((scores.get(part) or {}).items()):
            expect = expected.get(kind, "")
            kinds.append({"kind": kind, "expect": expect, "unseen": part == "unseen", "missed": [], **found})
    kinds.sort(key=lambda row: (row["expect"] == "accept", row["unseen"]))
    return {"kinds": kinds, "false_rejects": scores.get("false_rejects", [])}


def _accepted(run: RunFiles) -> list[Row]:
    """Accepted clips at even distances through the table, read from a few of its files."""
    files = spread(storage.list_files(storage.join(run.run_dir, "curated/accepted"), ".parquet"), SHEET)
    rows: list[Row] = []
    for file in files:
        table = storage.read_table(file, ["caption", "split", "frames"]).slice(0, -(-SHEET // len(files)))
        rows += [row for row in table.to_pylist() if row["frames"]]
    return [
        {"src": thumbnail(row["frames"][len(row["frames"]) // 2]), "caption": row["caption"], "split": row["split"]}
        for row in spread(rows, SHEET)
    ]


def _rejected(run: RunFiles) -> list[Row]:
    """Some rejected clips of every code, the commonest code first."""
    try:
        rows = run.table("curated/rejected", ["uri", "code", "message", "thumbnail"]).to_pylist()
    except Missing:
        return []
    by_code: dict[str, list[Row]] = {}
    for row in rows:
        by_code.setdefault(row["code"], []).append(row)
    within = storage.absolute(run.run_dir) + "/"
    share = min(4, max(1, SHEET // len(by_code)))
    codes = sorted(by_code, key=lambda code: -len(by_code[code]))
    shown: list[Row] = []
    for code in codes:
        clips = [_reject(row, within) for row in by_code[code][:share]]
        shown.append({"code": code, "count": len(by_code[code]), "clips": clips})
    return shown


def _reject(row: Row, within: str) -> Row:
    src = thumbnail(row["thumbnail"]) if row["thumbnail"] else None
    return {"src": src, "message": row["message"].replace(within, ""), "file": row["uri"].rsplit("/", 1)[-1]}


def stages(run: RunFiles) -> Row:
    """Seconds of each stage in the run's first call; later calls keep what is finished."""
    seconds = dict(need(run.summary, "first_run.seconds"))
    total = seconds.pop("total", sum(seconds.values()))
    return {"rows": seconds, "total": total, "longest": max(seconds.values(), default=0)}


def reproduce(run: RunFiles) -> Row:
    """The commands that make this run, its files, and the pictures of the promoted bundle."""
    verbs = [name for name in find(run.summary, "seconds") or {} if name not in ("total", "generate")]
    local = not run.run_dir.startswith("s3://")
    names: Iterable[str] = (
        "summary.json", "world/manifest.csv", "world/defects.json", "curated/curate.json", "features/manifest.json",
        "align/align.json", "align/history.jsonl", "adapt/adapt.json", "adapt/history.jsonl", "evaluate/evaluate.json",
        "promote/promote.json",
    )  # fmt: skip
    files = [name for name in names if storage.exists(storage.join(run.run_dir, name))]
    body: Row = {"verbs": verbs, "files": files, "linked": local, "run_dir": run.run_dir}
    return {**body, "examples": _examples(run), "written_by": _written_by(run)}


def _written_by(run: RunFiles) -> Row:
    """Which code made what: the file of each stage that says so."""
    names = (
        "curated/curate.json", "features/manifest.json", "align/bundle/meta.json", "adapt/bundle/meta.json",
        "evaluate/evaluate.json", "promote/promote.json",
    )  # fmt: skip
    there = [name for name in names if storage.exists(storage.join(run.run_dir, name))]
    return {name: find(run.json(name), "written_by") or UNKNOWN for name in there}


def _examples(run: RunFiles) -> list[Row]:
    """What generate, edit and stylize painted through the registered bundle, by sound."""
    by_sound: dict[str, Row] = {}
    for file in storage.list_files(storage.join(run.run_dir, "pictures"), ".png"):
        name = file.rsplit("/", 1)[-1].removesuffix(".png")
        verb, _, rest = name.partition("_")
        if verb in ("generate", "edit", "stylize"):
            stem = rest.partition("_seed")[0]
            by_sound.setdefault(stem, {}).setdefault(verb, thumbnail(storage.read_bytes(file)))
    for stem, pictures in by_sound.items():
        given = storage.join(run.run_dir, "pictures", f"{stem}_given.png")
        if storage.exists(given):
            pictures["given"] = thumbnail(storage.read_bytes(given))
    return [{"sound": stem, "pictures": pictures} for stem, pictures in sorted(by_sound.items())]
