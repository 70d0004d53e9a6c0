"""Single sections of the report, from the few files they read."""

import json
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.sampling import SamplingConfig
from aai.version import UNKNOWN
from pipelines.pages import sections
from pipelines.pages.run_files import Missing, RunFiles


def run_files(folder: Path, **summary: Any) -> RunFiles:
    return RunFiles(str(folder), summary)


def test_a_condition_nobody_knows_is_in_the_table(tmp_path: Path) -> None:
    run = run_files(tmp_path, generation={"two_sounds": {"object": 0.4321, "pictures": 5}, "edit": {"pictures": 1}})
    found = sections.figures(run)["conditions"]
    assert [row["name"] for row in found] == ["edit", "two_sounds"]
    assert found[1] == {"name": "two_sounds", "about": "", "object": 0.4321, "pictures": 5}


def test_how_pictures_were_painted_is_told_as_far_as_it_is_known(tmp_path: Path) -> None:
    run = run_files(tmp_path, generation={"edit": {"pictures": 1}})
    assert sections.figures(run)["painted"] == ""
    for result, said in (
        ({}, ""),
        ({"request": SamplingConfig().model_dump(), "addons": {}}, "20 steps, guidance scale 3, sampler of the model"),
        (
            {"request": SamplingConfig(reuse_steps=3).model_dump(), "addons": {}},
            "20 steps (the whole network every 3), guidance scale 3, sampler of the model",
        ),
    ):
        storage.write_json(f"{tmp_path}/evaluate/evaluate.json", result)
        assert sections.figures(run)["painted"] == said


def test_a_headline_stands_beside_what_it_is_held_against(tmp_path: Path) -> None:
    generation = {"sound": {"object": 0.5}, "ceiling": {"object": 0.9}, "chance": {"object": 0.1, "ambience": 0.25}}
    found = sections.head(run_files(tmp_path, generation=generation))
    first, second = found["tiles"][:2]
    assert (first["value"], first["marks"]) == (0.5, {"caption": 0.9, "chance": 0.1})
    assert (second["value"], second["marks"]) == (None, {"caption": None, "chance": 0.25})
    assert (found["registry"], found["gates"]) == (None, None)
    verdicts = [{"gate": "a", "passed": True}, {"gate": "b", "passed": False}]
    storage.write_json(f"{tmp_path}/promote/promote.json", {"gates": verdicts})
    assert sections.head(run_files(tmp_path))["gates"] == {"passed": 1, "rows": verdicts}


@pytest.mark.parametrize(
    ("name", "plot"),
    [
        ("loss", "training loss"), ("denoise", "training loss"), ("val_a2v_r1", "held-out recall"),
        ("val_loss", "held-out loss"), ("temperature_text", "temperature"), ("grad_norm", "grad norm"),
    ],
)  # fmt: skip
def test_each_figure_is_in_the_plot_of_its_kind(name: str, plot: str) -> None:
    assert sections._group(name) == plot


def test_a_stage_without_losses_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(Missing, match="neither"):
        sections.training(run_files(tmp_path))
    for stage, name in (("align", "loss"), ("adapt", "grad_norm")):
        entries = "\n".join(json.dumps({"step": step, name: 1.0 / step}) for step in (1, 2))
        storage.write_bytes(f"{tmp_path}/{stage}/history.jsonl", entries.encode())
    stages = sections.training(run_files(tmp_path))["stages"]
    assert {name: [len(plots["main"]), len(plots["more"])] for name, plots in stages.items()} == {"align": [1, 0]}


def test_the_first_case_of_every_label_comes_before_any_second_one() -> None:
    run = RunFiles("", {})
    run.clips = {i: {"labels": [name]} for i, name in enumerate(("dog", "dog", "dog", "bell"))}
    painted = [{"audio_row": i, "case": i} for i in range(4)]
    assert [row["case"] for row in sections._first_of_each(run, painted, 0)] == [0, 3, 1, 2]
    many = [{"audio_row": 0, "case": i} for i in range(20)]
    assert len(sections._first_of_each(run, many, 0)) == sections.TRIPLETS


def test_seconds_are_those_of_the_first_call(tmp_path: Path) -> None:
    found = sections.stages(run_files(tmp_path, seconds={"world": 0.1}, first_run={"seconds": {"a": 2, "b": 5}}))
    assert found == {"rows": {"a": 2, "b": 5}, "total": 7, "longest": 5}
    with pytest.raises(Missing):
        sections.stages(run_files(tmp_path, seconds={"world": 0.1}))


def test_planted_kinds_say_what_had_to_become_of_them_defects_first(tmp_path: Path) -> None:
    planted = [{"kind": "mono", "expect": "accept"}, {"kind": "silent", "expect": "reject"}]
    storage.write_json(f"{tmp_path}/world/defects.json", [*planted, {"kind": "wrong_audio", "expect": "reject"}])
    count = {"planted": 1, "found": 0}
    scores = {"kinds": {"mono": count, "silent": count | {"missed": ["x"]}}, "unseen": {"wrong_audio": count}}
    found = sections._defects(run_files(tmp_path), scores)["kinds"]
    assert [(row["kind"], row["expect"], row["unseen"], row["missed"]) for row in found] == [
        ("silent", "reject", False, ["x"]), ("wrong_audio", "reject", True, []), ("mono", "accept", False, []),
    ]  # fmt: skip


def test_how_it_was_made_names_only_files_that_are_there(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/curated/curate.json", {"written_by": "1 (commit a)"})
    storage.write_json(f"{tmp_path}/align/bundle/meta.json", {})
    found = sections.reproduce(run_files(tmp_path, seconds={"world": 1, "total": 2, "generate": 3, "align": 4}))
    assert found["verbs"] == ["world", "align"]
    assert found["files"] == ["curated/curate.json"]
    assert found["written_by"] == {"curated/curate.json": "1 (commit a)", "align/bundle/meta.json": UNKNOWN}
    assert (found["linked"], found["examples"]) == (True, [])
