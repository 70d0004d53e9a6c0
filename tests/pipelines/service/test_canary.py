"""A version on trial: which requests fall to it, and what its gates and its alias allow."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from aai.errors import UserError
from aai.sampling import PaintRequest
from pipelines.registry import versions
from pipelines.serve import ServeConfig
from pipelines.service.answers import ServedModel
from pipelines.service.canary import CanaryConfig, Trial, distance, part_of
from pipelines.service.http import PaintJob
from pipelines.settings import TrackingConfig
from tests.pipelines.registry.test_versions import make_bundle


def job(seed: int, sound: str = "ab") -> PaintJob:
    return PaintJob("generate", {"sound": np.zeros(8)}, PaintRequest(seed=seed), given={"sounds": {"sound": sound}})


def test_requests_fall_to_it_by_what_they_ask() -> None:
    assert part_of(job(3)) == part_of(job(3))
    assert len({part_of(job(3)), part_of(job(4)), part_of(job(3, "cd"))}) == 3
    config, jobs = CanaryConfig(share=0.2, shadow=0.3), [job(seed) for seed in range(3000)]
    answered = {each.request.seed for each in jobs if config.answers(each)}
    unseen = {each.request.seed for each in jobs if config.shadows(each)}
    assert 0.17 < len(answered) / 3000 < 0.23
    assert 0.27 < len(unseen) / 3000 < 0.33
    assert not answered & unseen
    everything = CanaryConfig(share=1)
    assert all(map(everything.answers, jobs))
    assert not any(map(everything.shadows, jobs))
    nothing = CanaryConfig()
    assert not nothing.is_on
    assert not any(nothing.answers(each) or nothing.shadows(each) for each in jobs)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"canary": {"share": 0.7, "shadow": 0.4}}, "are more than all requests"),
        ({"canary": {"share": 1.1}}, "less than or equal to 1"),
        ({"canary": {"share": 0.1, "alias": "champion"}}, "is what the service serves"),
        ({"canary": {"shadow": 0.1}, "bundle": "some/folder"}, "goes with a bundle of the registry"),
        ({"canary": {"shadow": 0.1}, "follow_s": 0}, "follow_s above 0"),
    ],
)
def test_settings_that_cannot_act_are_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        ServeConfig.parse(changes)
    assert ServeConfig.parse({"canary": {"share": 0.1}, "bundle": "models:/aai/3"}).canary.is_on


def test_pictures_differ_by_their_mean_difference() -> None:
    black, white, red = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white", "red"))
    assert distance([(black, black)]) == 0
    assert distance([(black, white), (white, white)]) == pytest.approx(0.5)
    assert distance([(red, black)]) == pytest.approx(1 / 3)


class Tried:
    """A registry with three versions, version 1 champion, and a trial."""

    def __init__(self, folder: Path, store: Path, **settings: float) -> None:
        shutil.copy(store, folder / "mlflow.db")
        self.cfg = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model_name="toy")
        for number in (1, 2, 3):
            versions.register(self.cfg, make_bundle(folder / str(number), number).folder, {}, {})
        served = ServedModel(name="toy", version="1", alias="champion", sha="s", sample_rate_hz=16_000)
        config = CanaryConfig(**(settings or {"share": 0.5}))  # type: ignore[arg-type]
        self.trial = Trial(config, self.cfg, served, self.take, lambda: self.ends.append(self.trial.served.version))
        self.bad: set[str] = set()
        self.ends: list[str] = []

    def take(self, pinned: str, model: ServedModel) -> None:
        assert not self.trial.may_answer  # whatever the one before was allowed
        if model.version in self.bad:
            raise ValueError("a shape")
        self.trial.served = model

    def look(self) -> tuple[str, bool, str]:
        self.trial.look()
        return self.trial.served.label(), self.trial.may_answer, self.trial.trouble


@pytest.fixture
def tried(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Tried:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)  # Serve's own setup takes it from pytest
    return Tried(tmp_path, empty_store)


def test_only_a_version_whose_gates_passed_answers(tried: Tried) -> None:
    assert tried.look() == ("toy/none@candidate", False, "")  # no alias is no trouble
    versions.set_alias(tried.cfg, "candidate", 2)
    assert tried.look() == ("toy/2@candidate", False, "")
    versions.set_version_tags(tried.cfg, 2, {"gates_passed": "true"})  # they are judged after it got the alias
    assert tried.look() == ("toy/2@candidate", True, "")
    versions.set_version_tags(tried.cfg, 3, {"gates_passed": "false"})
    versions.set_alias(tried.cfg, "candidate", 3)
    assert tried.look() == ("toy/3@candidate", False, "")
    versions.set_version_tags(tried.cfg, 3, {"forced": "true"})
    assert tried.look() == ("toy/3@candidate", True, "")
    versions.delete_alias(tried.cfg, "candidate")
    assert tried.look() == ("toy/none@candidate", False, "")
    assert tried.ends[-1] == "3"


def test_a_version_that_cannot_be_loaded_leaves_nothing_on_trial(tried: Tried) -> None:
    versions.set_alias(tried.cfg, "candidate", 2)
    versions.set_version_tags(tried.cfg, 2, {"gates_passed": "true"})
    tried.look()
    tried.bad = {"3"}
    versions.set_alias(tried.cfg, "candidate", 3)
    tried.ends.clear()
    for _ in range(2):
        assert tried.look() == ("toy/none@candidate", False, "")
        assert tried.trial.refused == {"3": "ValueError"}
    assert tried.ends == ["2"]  # and it is not tried at every look
    versions.set_alias(tried.cfg, "candidate", 2)
    assert tried.look() == ("toy/2@candidate", True, "")


def test_a_registry_that_is_away_changes_nothing(tried: Tried, tmp_path: Path) -> None:
    versions.set_alias(tried.cfg, "candidate", 2)
    versions.set_version_tags(tried.cfg, 2, {"gates_passed": "true"})
    tried.look()
    tried.ends.clear()
    tried.trial.store = TrackingConfig(uri="http://127.0.0.1:9", wait_s=0)
    label, may_answer, trouble = tried.look()
    assert (label, may_answer, tried.ends) == ("toy/2@candidate", True, [])
    assert trouble
    tried.trial.store = tried.cfg
    assert tried.look() == ("toy/2@candidate", True, "")
