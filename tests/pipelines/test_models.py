"""What the registry holds, as `aai models` shows it."""

from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines import models
from pipelines.__main__ import main
from pipelines.models import ModelsConfig
from pipelines.registry.history import attempts
from tests.pipelines.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:
    """Version 1 champion again after 2 was rolled back; 3 refused."""
    shop = Workshop(tmp_path, empty_store)
    shop.bundle(1), shop.bundle(2, generation__sound__object=0.85), shop.bundle(3, retrieval__overlap=7)
    shop.promote(1, reason="first")
    shop.promote(2)
    shop.promote(1, rollback=True, reason="too loud")
    with pytest.raises(UserError, match="overlap=7"):
        shop.promote(3)
    return shop


def settings(shop: Workshop, **more: object) -> ModelsConfig:
    return ModelsConfig.parse({"tracking": shop.cfg.model_dump(), **more})


def test_versions_and_attempts_newest_first(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    found = models.run(settings(shop))
    assert (found["versions"], found["aliases"]) == (3, {"candidate": 3, "champion": 1, "previous": 2})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:6] == ["version", "aliases", "registered", "bundle", "gates", "retrieval.same_object_r1"]
    assert [line.split()[0] for line in lines[1:4]] == ["3", "2", "1"]
    assert "candidate" in lines[1]
    assert "refused" in lines[1]
    assert lines[2].split()[-3:] == ["0.900", "0.850", "0.800"]
    assert "champion" in lines[3]
    assert "passed" in lines[3]
    outcomes = [(move["outcome"], move["version"], move["was"], move["reason"]) for move in found["attempts"]]
    assert outcomes == [
        ("refused", 3, 1, ""), ("rolled back", 1, 2, "too loud"), ("promoted", 2, 1, ""), ("promoted", 1, 0, "first"),
    ]  # fmt: skip
    assert found["attempts"] == attempts(shop.cfg, 20)
    short = models.run(settings(shop, newest=1))
    assert len(short["attempts"]) == 1
    assert "2 older versions: --newest 3" in capsys.readouterr().out


def test_all_that_is_known_of_a_version(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    found = models.run(settings(shop, version=2))
    assert (found["version"], found["aliases"], found["data_fingerprint"]) == (2, ["previous"], "d2")
    assert found["metrics-champion"]["generation.sound.object"] == 0.85
    assert found["evaluation-champion"].keys() == {"sha", "run"}
    told = capsys.readouterr().out
    assert "gates:" in told
    assert "retrieval.near_overlap" in told
    with pytest.raises(UserError, match="aai-demo has the versions 1 to 3"):
        models.run(settings(shop, version=9))


def test_an_empty_registry_says_what_to_do(
    tmp_path: Path, empty_store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop = Workshop(tmp_path, empty_store)
    assert main(["models", "--set", f"tracking.uri={shop.cfg.uri}"]) == 2
    assert "no model 'aai-demo' is registered" in capsys.readouterr().err
    assert main(["models", "--dry-run"]) == 0
