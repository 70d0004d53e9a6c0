"""The report of a small run made of drawn scenes: complete, torn, hostile; and what it must not contain."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from aai import schema, storage
from aai.media.waveform import encode_flac
from aai.sampling import SamplingConfig
from aai.toy.draw import draw_scene
from aai.toy.grammar import AMBIENCES, OBJECTS, Scene, full_caption, random_scene
from aai.toy.synthesis import synthesise
from pipelines.evaluation.cases import PICTURE_TABLE, loudness_cases, make_cases
from pipelines.pages import report, sections
from pipelines.pages.run_files import Missing, RunFiles
from pipelines.pages.sections import CONDITIONS

COUNTS = dict.fromkeys(CONDITIONS, 14)
GAINS_DB = [-18.0, -6.0, 6.0]
HOSTILE = "<script>alert('x')</script>"
PAINTED = {"request": SamplingConfig(steps=5).model_dump(), "addons": {"scheduler": "dpm", "lora": "0123abcd"}}


def encoded(scene: Scene, kind: str, size_px: int = 64) -> bytes:
    """A drawn scene as PNG or JPEG."""
    sink = io.BytesIO()
    draw_scene(scene, size_px).save(sink, kind)
    return sink.getvalue()


def write_evaluation(run: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Test clips, painted pictures and evaluate.json; the generation and retrieval figures."""
    scenes = [Scene(OBJECTS[i % 10], AMBIENCES[i % 4], "photo", float(rng.random()), i) for i in range(14)]
    clips = [
        {
            "row": i, "clip_id": f"clip-{i}", "audio": encode_flac(synthesise(scene, 1.0), 16_000),
            "frame": encoded(scene, "JPEG"), "caption": full_caption(scene), "labels": scene.labels,
        }
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    storage.write_table(f"{run}/evaluate/inputs/test.parquet", pa.Table.from_pylist(clips))
    cases = make_cases([scene.labels for scene in scenes], COUNTS)
    objects = {scene.obj: i for i, scene in reversed(list(enumerate(scenes)))}
    cases += loudness_cases(list(objects.values())[:3], GAINS_DB, len(cases))
    rows = []
    for case in cases:
        good = rng.random() < 0.8
        scene = scenes[case.audio_row] if good else random_scene(rng)
        seen = {"object": scene.obj, "ambience": scene.ambience, "medium": scene.medium, "size": scene.size}
        rows.append({**vars(case), **seen, "clip_feature": [0.0], "png": encoded(scene, "PNG")})
    storage.write_table(f"{run}/evaluate/pictures/all.parquet", pa.Table.from_pylist(rows, schema=PICTURE_TABLE))
    figure = {"object": 0.8125, "ambience": 0.7, "pictures": 14}
    generation: dict[str, Any] = {name: dict(figure) for name in CONDITIONS}
    generation["edit"] |= {"kept": 0.66, "kept_medium": 0.7, "from_noise": {"object": 0.5432, "pictures": 14}}
    generation |= {"pictures": len(rows), "chance": {"object": 0.1, "ambience": 0.25, "medium": 1 / 3}}
    scores = dict.fromkeys(("aic", "ais", "iis", "clip_mmd"), 0.5)
    generation |= {"loudness_size_spearman": 0.7654, "clip": {"sound": scores}}
    one = {"r1": 0.31, "r5": 0.6, "r10": 0.8, "median_rank": 3.0, "ci95": [0.28, 0.34], "chance": 0.01, "gallery": 14}
    retrieval: dict[str, Any] = {"gallery": 14, "overlap": 0, "batch_invariance_max_abs": 3e-7}
    retrieval |= {"same_object_r1": 0.9, "same_object_chance": 0.1, "same_object_by_caption": 0.9753, "near_overlap": 3}
    level = {"same_object_r1": 0.4321, "a2v_r10": 0.1234}
    retrieval["robustness"] = {"clips": 12, "clean": level, "noise_snr_db": {"20": level, "0": level}}
    retrieval |= {name: dict(one) for name in ("a2v", "v2a", "a2t", "t2a")}
    samples = {"objects": objects, "loudness_gains_db": GAINS_DB}
    storage.write_json(f"{run}/evaluate/evaluate.json", {"samples": samples, **PAINTED})
    return {"generation": generation, "retrieval": retrieval, "foundation": {"judge_object": 0.991, "frames": 100}}


def write_curation(run: Path, rng: np.random.Generator) -> dict[str, Any]:
    """Two accepted shards, one rejected, curate.json; the summary's figures."""
    for shard in range(2):
        rows = []
        for i in range(20):
            scene = random_scene(rng)
            row = {"content_hash": "h", "uri": f"c{i}.mp4", "caption": full_caption(scene), "labels": scene.labels}
            row |= {"clip_id": f"{shard}-{i}", "split": "train", "audio": b"x", "frame_pts_s": [0.0]}
            rows.append(row | {"frames": [encoded(scene, "JPEG", 96)] * 3})
        table = pa.Table.from_pylist(rows, schema.CLIP_TABLE)
        storage.write_table(f"{run}/curated/accepted/shard-{shard:05d}.parquet", table)
    rejects = [
        {
            "uri": f"/data/-{code}{i}.mp4", "caption": "", "labels": [], "split": "train", "stage": "filter",
            "code": code, "message": f"rms_db -91 dBFS is below silent_rms_db {HOSTILE}", "transient": False,
            "thumbnail": encoded(random_scene(rng), "JPEG") if code == "SILENT" else None,
        }
        for code, count in (("SILENT", 7), ("EMPTY_FILE", 2), ("NEAR_DUPLICATE", 1))
        for i in range(count)
    ]  # fmt: skip
    table = pa.Table.from_pylist(rejects, schema.REJECT_TABLE)
    storage.write_table(f"{run}/curated/rejected/shard-00000.parquet", table)
    storage.write_json(f"{run}/curated/curate.json", {"rows_in": 50, "hours": 0.0222})
    scores: dict[str, Any] = {"recall": 0.987, "precision": 1.0, "false_rejects": []}
    scores["unseen"] = {"wrong_audio": {"planted": 1, "found": 0}}
    scores["kinds"] = {
        "silent": {"planted": 7, "found": 6, "missed": ["/data/clips/-gone.mp4"]},
        "mono": {"planted": 3, "found": 3, "missed": []},
    }
    defects = [{"kind": kind, "expect": expect} for kind, expect in (("silent", "reject"), ("mono", "accept"))]
    storage.write_json(f"{run}/world/defects.json", defects)
    return {
        "rows_in": 50, "accepted": 40, "rejected": 10, "by_code": {"SILENT": 7, "EMPTY_FILE": 2, "NEAR_DUPLICATE": 1},
        "defect_recall": 0.987, "defect_precision": 1.0, "defects": scores,
    }  # fmt: skip


def write_run(run: Path) -> dict[str, Any]:
    """A complete small run; returns its summary."""
    rng = np.random.default_rng(0)
    summary = write_evaluation(run, rng) | {"curate": write_curation(run, rng)}
    terms = {"align": ("loss_image", "loss_text", "temperature_image"), "adapt": ("denoise", "clip", "hidden", "norm")}
    for stage, names in terms.items():
        entries: list[dict[str, float]] = []
        for step in range(10, 210, 10):
            fall = 3 * float(np.exp(-step / 80)) + 0.1
            rates = {"grad_norm": 1.0, "steps_per_s": 4.0, "learning_rate": 1e-3}
            entries.append({"step": step, "loss": 2 * fall} | {n: fall / (i + 1) for i, n in enumerate(names)} | rates)
            if step % 50 == 0:
                entries.append({"step": step, "val_a2v_r1": step / 300, "val_label0_r1": step / 220, "val_loss": fall})
        text = "\n".join(json.dumps(entry) for entry in entries)
        storage.write_bytes(f"{run}/{stage}/history.jsonl", text.encode())
    gates = {"gates": [{"gate": "g", "passed": True}], "written_by": f"1.2 (commit abcdef1{HOSTILE})"}
    storage.write_json(f"{run}/promote/promote.json", gates)
    for name in ("0_dog_rain_given", "generate_0_dog_rain_seed0", "edit_0_dog_rain_seed0", "stylize_0_dog_rain_seed0"):
        storage.write_bytes(f"{run}/pictures/{name}.png", encoded(random_scene(rng), "PNG"))
    seconds = {"world": 41.5, "curate": 50.1, "align": 133.0, "evaluate": 190.4, "generate": 9.0, "total": 424.0}
    registry = {"name": f"aai-{HOSTILE}", "version": 3, "alias": "champion"}
    own = {"seconds": seconds, "peak_rss_gb": 3.21}
    summary |= {**own, "first_run": own, "registry": registry}
    storage.write_json(f"{run}/summary.json", summary)
    return summary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and summary of a complete run."""
    folder = tmp_path_factory.mktemp("run")
    return folder, write_run(folder)


@pytest.fixture(scope="module")
def page(run: tuple[Path, dict[str, Any]]) -> str:
    """Its report."""
    return Path(report.write_report(str(run[0]), run[1])).read_text()


class Reader(HTMLParser):
    """Checks that tags close in order, and gathers ids, references and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href"):
                self.references.append(str(value))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def text_of(page: str) -> str:
    """The words on the page, joined by single ordinary spaces."""
    return " ".join(" ".join(read(page).text).split())


def cells(page: str, name: str) -> list[str]:
    """The <figure> elements whose name in the caption is `name`."""
    found = re.findall(r'<figure class="pic.*?</figure>', page, re.DOTALL)
    return [figure for figure in found if f'class="name">{name}<' in figure]


def test_a_complete_run_has_every_section_and_its_figures(page: str) -> None:
    reader, text = read(page), text_of(page)
    assert [key for key in report.SECTIONS if key != "head" and key not in reader.ids] == []
    assert "Left out" not in text
    for figure in (
        "81.2 %", "0.765", "98.7 %", "7 min 04 s", "3.2 GB", "28.0 % – 34.0 %", "version 3", "1 of 1 gates", "3.0e-07",
        "50 rows in = 40 accepted (0.022 hours) + 10 rejected", "missed: -gone.mp4", "aai curate --set run_dir=",
    ):  # fmt: skip
        assert figure in text
    for name in CONDITIONS:
        assert name.replace("_", " ") in text
    assert "also seen in training: 0 , in another form 3 ." in text
    assert "(chance 10.0 %, by the clip's caption 97.5 %)" in text
    assert "edit, from noise" in text
    assert "54.3 %" in text
    assert "12 sounds noisier, softer, duller" in text
    assert "Painted in 5 steps, guidance scale 3, sampler dpm, LoRA 0123abcd." in text
    assert "noise snr db 20 43.2 %" in text
    assert "promote/promote.json: aai 1.2 (commit abcdef1" in text
    assert "evaluate/evaluate.json: aai unknown" in text
    assert page.count("<audio") == len(OBJECTS)
    assert len(re.findall(r"[+-]\d+ dB<", page)) == 3 * len(GAINS_DB)
    plots = re.findall(r'class="plot"><figcaption>([^<]*)', page)
    assert plots[:2] == ["Judged size by gain", "Judged size by loudness, held-out sounds"]
    assert {"align: training loss", "align: held-out recall", "adapt: held-out loss", "align: temperature"} < set(plots)


def test_the_page_needs_nothing_else(page: str, run: tuple[Path, dict[str, Any]]) -> None:
    reader = read(page)
    assert len(reader.ids) == len(set(reader.ids))
    for reference in reader.references:
        if reference.startswith("#"):
            assert reference[1:] in reader.ids
        elif not reference.startswith("data:"):
            assert (run[0] / reference).is_file(), reference
    assert not re.search(r"@import|url\((?!#)", page)
    assert len(page) < 6_000_000


def test_what_comes_from_data_is_escaped(page: str) -> None:
    assert "<script" not in page
    assert text_of(page).count(HOSTILE) == 1 + 4 + 2 + 1 + 1  # model, messages of rejected clips, code


def test_a_picture_is_green_only_when_the_judge_reads_the_object(page: str, run: tuple[Path, dict[str, Any]]) -> None:
    there = RunFiles(str(run[0]), run[1])
    shown = cells(page, "sound")
    assert len(shown) == len(OBJECTS)
    for figure, (name, row) in zip(shown, sorted(there.samples["objects"].items()), strict=True):
        painted = next(p for p in there.painted("sound") if p["row"] == row)
        assert ('class="pic ok"' in figure) == (painted["object"] == name)
        assert ('class="pic no"' in figure) == (painted["object"] != name)
        assert f"the judge reads: {painted['object']}" in figure
    assert any("pic ok" in figure for figure in shown)
    assert any("pic no" in figure for figure in cells(page, "shuffled audio"))


def test_a_substitute_says_that_it_is_one(run: tuple[Path, dict[str, Any]], page: str) -> None:
    there = RunFiles(str(run[0]), run[1])
    there.samples["objects"] = {"dog": 0}
    there.pictures["sound"] = [p for p in there.painted("sound") if p["row"] != 0]
    there.pictures["ceiling"] = [{**p, "object": None, "ambience": None} for p in there.painted("ceiling")]
    del there.pictures["sketch"]
    again = report.render(there)
    assert "another clip" in cells(again, "sound")[0]
    assert "another clip" not in cells(page, "sound")[0]
    assert "no judge" in cells(again, "ceiling")[0]
    assert 'class="pic"' in cells(again, "ceiling")[0]
    assert "not painted" in cells(again, "sketch")[0]
    assert f"hears: {there.clips[there.pictures['shuffled_audio'][0]['audio_row']]['labels'][0]}" in page


def test_missing_files_leave_out_only_their_sections(
    run: tuple[Path, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torn = tmp_path / "torn"
    gone = shutil.ignore_patterns("pictures", "curate.json", "promote", "history.jsonl")
    shutil.copytree(run[0], torn, ignore=gone)
    shutil.copy(run[0] / "adapt/history.jsonl", torn / "adapt/history.jsonl")
    page = report.render(RunFiles(str(torn), run[1]))
    left_out = re.findall(r'<section id="(\w+)">\s*<h2>[^<]*</h2>\s*<p class="note">Left out: ([^<]*)', page)
    assert [key for key, _ in left_out] == ["hero", "loudness", "repaint", "curation"]
    assert dict(left_out)["hero"] == "evaluate/pictures is not there."
    assert caplog.text.count("is left out") == len(left_out)
    assert "adapt: training loss" in page
    assert "align: training loss" not in page
    read(page)


@pytest.mark.parametrize("gone", ["evaluate/evaluate.json", "evaluate/inputs"])
def test_the_hero_needs_its_samples(run: tuple[Path, dict[str, Any]], gone: str) -> None:
    there, away = run[0] / gone, run[0] / "away"
    there.rename(away)
    try:
        with pytest.raises(Missing, match=gone):
            sections.hero(RunFiles(str(run[0]), run[1]))
    finally:
        away.rename(there)


def test_an_empty_run_is_a_page_of_notes(tmp_path: Path) -> None:
    text = text_of(Path(report.write_report(str(tmp_path), {})).read_text())
    assert text.count("Left out:") == len(report.SECTIONS) - 2
    assert "–" in text
