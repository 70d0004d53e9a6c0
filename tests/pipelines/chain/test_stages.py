"""What a stage is made of, and what makes it run again."""

from pathlib import Path
from typing import Any

import pytest

from aai import storage
from pipelines.__main__ import load_config
from pipelines.chain.stages import (
    RESULTS,
    ChainStage,
    StageRecord,
    changes,
    estimate,
    inputs_of,
    kept_record,
    out_of,
    record_file,
    record_of,
)
from pipelines.settings import VerbConfig

MADE = {
    "world/manifest.csv": "uri,split\n", "world/world.json": "{}", "curated/curate.json": "{}",
    "curated/accepted/0.parquet": "rows", "features/manifest.json": "{}", "align/bundle/bundle.json": "{}",
    "align/align.json": "{}", "adapt/bundle/bundle.json": "{}", "adapt/adapt.json": "{}",
    "evaluate/evaluate.json": "{}", "promote/promote.json": "{}",
}  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> str:
    """A run's folder, with all that the demo's stages leave, and their records."""
    run_dir = tmp_path / "run"
    for name, content in MADE.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(content)
    for verb in RESULTS:
        if verb != "tune":
            config = settings(verb, str(run_dir))
            record = record_of(verb, config).ended(config, 1.0, 1)
            storage.write_json(record_file(str(run_dir), verb), record.model_dump())
    return str(run_dir)


def settings(verb: str, run_dir: str, *given: str) -> VerbConfig:
    """The demo's config of a stage."""
    stage = ChainStage(verb=verb, config=f"configs/demo/{verb}.yaml", set=given)  # type: ignore[arg-type]
    return load_config(verb, stage.words(run_dir))[0]


def why(run_dir: str, verb: Any, *given: str) -> list[str]:
    """Why a stage would run."""
    config = settings(verb, run_dir, *given)
    return changes(kept_record(run_dir, verb), record_of(verb, config), config)


STAGES = ("world", "curate", "featurize", "align", "adapt", "evaluate", "promote")


def test_a_finished_run_stands_and_elsewhere_too(finished: str) -> None:
    moved = f"{finished}-moved"
    Path(finished).rename(moved)
    assert {verb: why(moved, verb) for verb in STAGES} == {verb: [] for verb in STAGES}


@pytest.mark.parametrize(
    ("verb", "given", "told"),
    [
        ("curate", "filters.min_size_px=77", "filters.min_size_px: "),
        ("align", "fit.steps=7", "fit.steps: "),
        ("promote", "tracking.model_name=other", "tracking.model_name: "),
        ("align", "tracking.experiment=other", ""),
        ("evaluate", "tracking.experiment=other", "tracking.experiment: "),  # promote asks there for it
        ("promote", "tracking.wait_s=1", ""),
        ("align", "cluster.num_workers=1", ""),
        ("featurize", "prompts=['a sound of {caption}']", "prompts: "),
    ],
)
def test_a_changed_setting_is_named(finished: str, verb: str, given: str, told: str) -> None:
    reasons = why(finished, verb, given)
    assert reasons == [] if not told else [reason.startswith(told) for reason in reasons] == [True]


def changed_by(finished: str, name: str, content: str) -> list[str]:
    """The stages that would run after a file changed."""
    (Path(finished) / name).write_text(content)
    return [verb for verb in STAGES if why(finished, verb)]


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("world/manifest.csv", ["world", "curate"]),
        ("curated/curate.json", ["curate", "featurize", "evaluate"]),
        ("curated/accepted/1.parquet", ["curate", "featurize", "evaluate"]),
        ("features/manifest.json", ["featurize", "align", "adapt", "evaluate"]),
        ("align/bundle/bundle.json", ["align", "adapt"]),
        ("evaluate/evaluate.json", ["evaluate", "promote"]),
        ("promote/promote.json", ["promote"]),
    ],
)
def test_a_changed_file_is_for_those_who_made_and_read_it(finished: str, name: str, again: list[str]) -> None:
    assert changed_by(finished, name, '{"other": 1}') == again


def test_what_is_gone_is_made_again(finished: str) -> None:
    (Path(finished) / "features" / "manifest.json").unlink()
    assert f"{finished}/features is not as it was left" in why(finished, "featurize")
    assert why(finished, "align") == ["features changed"]


def test_the_code_counts(finished: str) -> None:
    config = settings("align", finished)
    assert changes(kept_record(finished, "align"), record_of("align", config, code="other"), config) == [
        "the code changed"
    ]


@pytest.mark.parametrize("content", ["{}", '{"verb": "align", "from": "the future"}', "[]"])
def test_a_record_that_is_not_understood_is_none(finished: str, content: str) -> None:
    Path(record_file(finished, "align")).write_text(content)
    assert why(finished, "align") == ["not finished by `aai run` yet"]


def test_frozen_models_count_by_what_pins_them(finished: str) -> None:
    found = inputs_of(settings("align", finished))
    assert set(found) == {"features", "foundation.clip_revision", "foundation.diffusion_revision"}


def model_folder(folder: Path) -> Path:
    """A folder of weights; other ones have the same size."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("verb", "setting"),
    [("align", "encoder.pretrained"), ("evaluate", "judge.model"), ("curate", "scores.tagger"),
     ("curate", "scores.foundation.clip"), ("curate", "scores.bundle"), ("curate", "label_names"),
     ("promote", "trust.public_keys")],
)  # fmt: skip
def test_what_else_a_stage_reads_counts_by_its_content(finished: str, verb: Any, setting: str) -> None:
    folder = model_folder(Path(finished) / "other")
    file = {"scores.bundle": "bundle.json", "label_names": "names.csv", "trust.public_keys": "key.pem"}.get(setting)
    if file:
        (folder / file).write_text("{}")
    place = folder if setting == "scores.bundle" or not file else folder / file
    given = f"{setting}=[{place}]" if setting == "trust.public_keys" else f"{setting}={place}"
    more = ["encoder.backbone=ast"] if verb == "align" else []
    before = inputs_of(settings(verb, finished, given, *more))
    (folder / (file or "model.safetensors")).write_bytes(b"[]" if file else b"changed")
    after = inputs_of(settings(verb, finished, given, *more))
    changed = [name for name in before if before[name] != after[name]]
    assert [name.startswith(setting) for name in changed] == [True]


def test_a_sweep_is_made_of_the_stage_that_it_sweeps(finished: str) -> None:
    base = Path(finished) / "align.yaml"
    base.write_text(Path("configs/demo/align.yaml").read_text())
    config = settings("tune", finished, f"base={base}")
    Path(out_of(config)).mkdir(parents=True)
    storage.write_json(record_file(finished, "tune"), record_of("tune", config).ended(config, 1.0, 1).model_dump())
    storage.write_json(f"{out_of(config)}/tune.json", {})
    assert why(finished, "tune", f"base={base}") == [f"{out_of(config)} is not as it was left"]
    base.write_text(base.read_text().replace("steps: 300", "steps: 301"))
    (Path(finished) / "features" / "manifest.json").write_text('{"other": 1}')
    told = why(finished, "tune", f"base={base}")
    assert told[:2] == ["base.fit.steps: 300 -> 301", "base.features changed"]


def test_only_the_whole_name_of_the_runs_folder_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = Path("featurize.yaml")

    def told(run_dir: str, prompt: str) -> tuple[str, str]:
        config.write_text(f"run_dir: {run_dir}\ninput: ${{run_dir}}/x\nout: y\nprompts: ['{prompt}']\n")
        found = record_of("featurize", load_config("featurize", ["--config", str(config)])[0]).settings
        return found["input"], found["prompts"]

    assert told("do", "a dog does {caption}") == ('"${run_dir}/x"', '["a dog does {caption}"]')
    beside = f"{tmp_path}/dodo {{caption}}"
    assert told(f"{tmp_path}/do/", beside) == ('"${run_dir}/x"', f'["{beside}"]')
    assert told(".", "1.5 {caption}") == ('"${run_dir}/x"', '["1.5 {caption}"]')


def test_a_password_stands_in_no_record(finished: str) -> None:
    config = settings("promote", finished, "tracking.uri=https://me:hunter22@mlflow.example.org")
    assert record_of("promote", config).settings["tracking.uri"] == '"https://***@mlflow.example.org"'


def test_every_stage_names_its_result(finished: str) -> None:
    for verb in STAGES:
        assert (Path(out_of(settings(verb, finished))) / RESULTS[verb]).is_file()  # type: ignore[index]
    assert isinstance(kept_record(finished, "align"), StageRecord)


def test_hours_are_those_of_the_plan() -> None:
    plan = {
        "shapes": {"cpu": {"curate_h": 2.0, "featurize_h": 9.0}, "gpu": {"curate_h": 1.0, "featurize_h": 0.5}},
        "trainings": [{"stage": "align", "shape": "gpu", "hours": 3.5}, {"stage": "adapt", "shape": "gpu"}],
    }
    assert [estimate(plan, verb, "gpu") for verb in ("curate", "align", "adapt", "promote")] == [1.0, 3.5, None, None]
    assert estimate(plan, "curate", None) == 2.0
    assert estimate(None, "curate", None) is None
