"""Which trainings made a bundle, as MLflow has it."""

import shutil
from pathlib import Path

import pytest

from pipelines.registry import origins, tracking
from pipelines.registry.origins import TrainingRun, descended, made_by, trainings
from pipelines.settings import TrackingConfig


@pytest.fixture
def cfg(tmp_path: Path, empty_store: Path) -> TrackingConfig:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")


def of(made: str, *parents: str, stage: str = "align", fingerprint: str = "f", status: str = "FINISHED") -> TrainingRun:
    return TrainingRun(f"run-{made}", "e", stage, status, 0, "/features", fingerprint, made, parents)


def test_trainings_of_all_experiments_are_known_and_nothing_else(cfg: TrackingConfig) -> None:
    params = {"features": "/a", "fingerprint": "f1", "aligned": "/b"}
    with tracking.run(cfg, "align", params) as first:
        first.set_tags({origins.MADE: "b1"})
    other = cfg.model_copy(update={"experiment": "another"})
    with tracking.run(other, "adapt", params) as second:
        second.set_tags({origins.MADE: "b2", origins.PARENTS: "b1 b0"})
    with tracking.run(cfg, "align", {"lr": 1}), tracking.run(cfg, "evaluate", {"features": "/a"}):
        pass
    found = trainings(cfg)
    assert [training.run_id for training in found] == [second.run_id, first.run_id]
    assert found[0].experiment == "another"
    assert (found[0].made, found[0].parents, found[0].features, found[0].aligned) == ("b2", ("b1", "b0"), "/a", "/b")
    assert (found[1].stage, found[1].status, found[1].fingerprint) == ("align", "FINISHED", "f1")


def test_the_way_back_goes_through_all_parents() -> None:
    known = [of("d", "b", "c"), of("c", "a"), of("b"), of("a"), of("x")]
    assert [training.made for training in made_by("d", "", known)] == ["d", "b", "c", "a"]
    assert made_by("y", "f", known) == []  # all of these told what they made
    silent = [of("", fingerprint="g"), of("", fingerprint="g", status="KILLED")]
    assert made_by("y", "g", [*known, *silent]) == silent


def test_the_way_on_goes_through_all_children() -> None:
    known = [of("d", "b", "c"), of("c", "a"), of("b"), of("a"), of("x"), of("")]
    assert [training.made for training in descended([known[3]], known)] == ["a", "c", "d"]
    assert descended([known[5]], known) == [known[5]]  # a run that made nothing has no children
