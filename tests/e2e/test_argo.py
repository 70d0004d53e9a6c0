"""The example of an orchestrator, by Argo's own models (hera), and by the commands that it gives."""

from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hera.workflows.models import CronWorkflow

from aai.errors import UserError
from pipelines.__main__ import config_file, load_config
from pipelines.run import RunConfig

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / "examples" / "argo.yaml").read_text()


def mistakes(text: str) -> list[str]:
    """What is wrong with a workflow: keys that Argo does not know, and stages that do not fit the commands."""
    given = yaml.safe_load(text)
    try:
        known = CronWorkflow.model_validate(given).model_dump(by_alias=True, exclude_none=True, mode="json")
    except pydantic.ValidationError as error:
        return [str(error)]
    return [*unknown(given, known), *stage_mistakes(given["spec"]["workflowSpec"])]


def unknown(given: Any, known: Any, at: str = "") -> list[str]:
    """Keys that were given and left aside."""
    found = []
    if isinstance(given, dict):
        for key, value in given.items():
            there = isinstance(known, dict) and key in known
            found += unknown(value, known[key], f"{at}.{key}") if there else [f"{at}.{key} is not known"]
    elif isinstance(given, list) and isinstance(known, list) and len(given) == len(known):
        for number, (one, other) in enumerate(zip(given, known, strict=True)):
            found += unknown(one, other, f"{at}[{number}]")
    return found


def stage_mistakes(spec: dict[str, Any]) -> list[str]:
    """Tasks that are no stages of the run, or in another order; a template, config or cluster that is not there."""
    values = {each["name"]: each["value"] for each in spec["arguments"]["parameters"]}
    templates = {each["name"]: each for each in spec["templates"]}
    tasks = templates[spec["entrypoint"]]["dag"]["tasks"]
    config, _ = load_config("run", ["--config", values["config"]])
    assert isinstance(config, RunConfig)
    wanted = [stage.verb for stage in config.stages]
    found = [] if [task["name"] for task in tasks] == wanted else ["tasks are not the run's stages"]
    for before, task in zip([None, *wanted], tasks, strict=False):
        if task.get("dependencies", [None]) != [before]:
            found.append(f"{task['name']} does not wait for {before}")
        if task["arguments"]["parameters"] != [{"name": "stage", "value": task["name"]}]:
            found.append(f"{task['name']} runs another stage")
        command, args = (
            templates[task["template"]]["container"]["command"],
            templates[task["template"]]["container"]["args"],
        )
        for name, value in {**values, "stage": task["name"]}.items():
            args = [word.replace(f"{{{{workflow.parameters.{name}}}}}", value) for word in args]
            args = [word.replace(f"{{{{inputs.parameters.{name}}}}}", value) for word in args]
        verb, *words = [*command, *args][1:]
        submitted, _ = load_config(verb, words)
        load_config(*_split(submitted.split()))  # type: ignore[attr-defined]
    return found


def _split(parts: tuple[str, list[str]]) -> tuple[str, list[str]]:
    return parts[0], [str(config_file(word)) if word.endswith(".yaml") else word for word in parts[1]]


def test_the_example_is_what_argo_and_the_commands_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://bucket")
    assert mistakes(EXAMPLE) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("concurrencyPolicy", "concurencyPolicy"),
        ("retryStrategy", "retries"),
        ("dependencies: [align]", "dependencies: [featurize]"),
        ("value: evaluate", "value: adapt"),
        ("limit: \"2\"", "limits: \"2\""),
    ],
)  # fmt: skip
def test_a_mistake_is_found(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://bucket")
    assert EXAMPLE.count(right) == 1
    assert mistakes(EXAMPLE.replace(right, wrong)) != []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("- name: promote", "- name: publish"),
        ("gpu8.yaml", "gpu9.yaml"),
        ("--config\n", "--confg\n"),
        ("clusters/kubernetes", "clusters/k8s"),
    ],
)
def test_a_command_that_would_fail_is_found(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://bucket")
    assert EXAMPLE.count(right) == 1
    with pytest.raises((SystemExit, UserError)):
        mistakes(EXAMPLE.replace(right, wrong))
