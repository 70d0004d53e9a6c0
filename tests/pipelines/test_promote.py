"""Promotion: what is registered, which alias names it, and what is on record of every attempt."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from aai.bundle import read_bundle
from aai.errors import UserError
from aai.version import code_version
from pipelines.__main__ import CONFIGS, main
from pipelines.promote import PromoteConfig
from pipelines.registry import versions
from pipelines.registry.evaluations import sealed
from tests.pipelines.registry.test_versions import make_bundle
from tests.pipelines.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:
    return Workshop(tmp_path, empty_store)


def test_the_demo_config_is_valid_and_its_plan_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "--dry-run", "--rollback"]) == 0
    assert "champion <-> previous" in capsys.readouterr().out
    config = PromoteConfig.load(CONFIGS / "demo" / "promote.yaml", ["run_dir=/x"])
    assert (config.bundle, config.evaluation) == ("/x/adapt/bundle", "/x/evaluate/evaluate.json")
    assert (config.tracking.uri, config.out) == ("sqlite:////x/mlflow.db", "/x/promote")
    assert len(config.gates) == 9


def test_promotes_and_tells(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    made = shop.bundle(1)
    with caplog.at_level(logging.INFO):
        result = shop.promote(1, reason="first one")
    assert shop.aliases() == {"candidate": 1, "champion": 1}
    expected = {"name": "aai-demo", "version": 1, "alias": "champion", "previous": None, "passed": True}
    assert expected.items() <= result.items()
    assert json.loads((shop.folder / "promote" / "promote.json").read_text()) == result
    assert [gate["passed"] for gate in result["gates"]] == [True] * 9
    assert "promote: aai-demo version 1 is champion (was unset); 9 of 9 gates passed" in caplog.text
    assert re.search(r">= 0\.75 x generation\.ceiling\.ambience \(0\.95\) +pass", caplog.text)
    tags = versions.version_tags(shop.cfg, 1)
    assert (tags["bundle_sha"], tags["data_fingerprint"], tags["reason"]) == (made.sha, "d1", "first one")
    assert json.loads(tags["metrics"])["generation.sound.object"] == 0.8
    assert len(json.loads(tags["gates"])) == 9
    assert tags["by"]
    assert tags["at"].startswith("20")
    assert tags["written_by"] == result["written_by"] == code_version()
    (audit,) = shop.audits()
    assert (audit.data.tags["outcome"], audit.data.tags["version"], audit.data.tags["was"]) == ("promoted", "1", "0")
    assert audit.data.metrics["retrieval.same_object_r1"] == 0.9
    assert read_bundle(versions.resolve_bundle("models:/aai-demo@champion", shop.cfg)).sha == made.sha


def test_second_champion_rollback_and_forward_again(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2)
    shop.promote(1)
    assert shop.promote(2)["previous"] == 1
    assert shop.aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    back = shop.promote(1, rollback=True, reason="too loud")
    assert (back["champion"], back["previous"], back["reason"]) == (1, 2, "too loud")
    assert shop.aliases() == {"candidate": 2, "champion": 1, "previous": 2}
    shop.promote(1, rollback=True)
    assert shop.aliases() == {"candidate": 2, "champion": 2, "previous": 1}
    outcomes = [audit.data.tags["outcome"] for audit in shop.audits()]
    assert outcomes == ["promoted", "promoted", "rolled back", "rolled back"]


def test_rollback_withdraws_the_first_champion_and_promote_sets_it_again(shop: Workshop) -> None:
    shop.bundle(1)
    with pytest.raises(UserError, match="has no champion yet"):
        shop.promote(1, rollback=True)
    shop.promote(1)
    assert shop.promote(1, rollback=True)["champion"] is None
    assert shop.aliases() == {"candidate": 1, "previous": 1}
    with pytest.raises(UserError, match="champion"):
        versions.resolve_bundle("models:/aai-demo@champion", shop.cfg)
    assert shop.promote(1, rollback=True)["champion"] == 1
    assert shop.aliases() == {"candidate": 1, "champion": 1}
    shop.promote(1, rollback=True)
    assert shop.promote(1)["previous"] is None
    assert shop.aliases() == {"candidate": 1, "champion": 1}


def test_the_same_bundle_is_not_registered_twice(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2)
    shop.promote(1)
    assert shop.promote(1)["previous"] is None  # the champion is never its own predecessor
    shop.promote(2)
    assert shop.promote(1)["version"] == 1
    assert shop.aliases() == {"candidate": 1, "champion": 1, "previous": 2}


def test_each_alias_has_its_own_way_back(shop: Workshop) -> None:
    for seed in (1, 2, 3, 4):
        shop.bundle(seed)
    shop.promote(1), shop.promote(2)
    shop.promote(3, alias="staging"), shop.promote(4, alias="staging")
    both = {"candidate": 4, "champion": 2, "previous": 1, "staging": 4, "previous-staging": 3}
    assert shop.aliases() == both
    assert shop.promote(1, rollback=True)["champion"] == 1
    assert shop.aliases() == both | {"champion": 1, "previous": 2}
    back = shop.promote(1, rollback=True, alias="staging")
    assert (back["champion"], back["previous"]) == (3, 4)
    assert shop.aliases() == both | {"champion": 1, "previous": 2, "staging": 3, "previous-staging": 4}


RULES = {"not_worse_than_champion": {"generation.sound.object": 0.03}}
SOFT = [{"metric": "generation.sound.object", "min": 0}]
WORSE = r"sound\.object=0\.77: must be >= champion's - 0\.03 \(-0\.030, 95 %"


def test_only_a_promotion_changes_the_figures_that_a_champion_is_measured_by(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2, generation__sound__object=0.77)
    shop.promote(1, reason="first")
    shop.evaluate(1, generation__sound__object=0.1)
    with pytest.raises(UserError, match="champion stays version 1"):
        shop.promote(1, **RULES)  # refused
    shop.promote(1, **RULES, gates=SOFT)  # passes, but is champion already
    shop.promote(1, gates=SOFT, alias="staging")  # promoted, but to something else
    assert (shop.figure(1), shop.figure(1, "staging")) == (0.8, 0.1)
    assert versions.version_tags(shop.cfg, 1)["gates_passed"] == "true"
    with pytest.raises(UserError, match=WORSE):
        shop.promote(2, **RULES)
    assert shop.aliases()["champion"] == 1
    shop.promote(2)
    shop.evaluate(1, generation__sound__object=0.79)
    shop.promote(1, **RULES, reason="again")
    assert (shop.figure(1), versions.version_tags(shop.cfg, 1)["reason"]) == (0.79, "again")


def test_a_champion_is_compared_by_an_evaluation_of_the_same_settings_and_clips(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2, config="other")
    shop.promote(1)
    with pytest.raises(UserError, match=r"comparable .* version 1 has no evaluation on record .*; evaluate the bundle"):
        shop.promote(2, **RULES)
    shop.evaluate(1, config="other", generation__sound__object=0.9)
    with pytest.raises(UserError, match=r"must be >= champion's - 0\.03 \(-0\.100"):
        shop.promote(2, **RULES)
    shop.evaluate(1, config="other", generation__sound__object=0.1)  # a later one does not count
    with pytest.raises(UserError, match=r"\(-0\.100"):
        shop.promote(2, **RULES)
    shop.evaluate(2, config="other", data_fingerprint="e")
    with pytest.raises(UserError, match="version 1 has no evaluation on record with these settings on these clips"):
        shop.promote(2, **RULES)


def test_a_version_without_an_evaluation_on_record_cannot_be_compared(shop: Workshop) -> None:
    """As an older release promoted them."""
    first = make_bundle(shop.folder / "1", 1)
    versions.set_alias(shop.cfg, "champion", versions.register(shop.cfg, first.folder, {}, {"metrics": "{}"}))
    shop.bundle(2)
    with pytest.raises(UserError, match="comparable with the champion's, but version 1 has no evaluation on record"):
        shop.promote(2, **RULES)
    shop.evaluate(1)
    assert shop.promote(2, **RULES)["champion"] == 2


def test_a_failed_gate_keeps_the_champion(shop: Workshop) -> None:
    shop.bundle(1)
    shop.promote(1)
    shop.bundle(2, retrieval__overlap=None, generation__sound__object=0.1)
    with pytest.raises(UserError, match=r"^retrieval\.overlap=missing: must be <= 0, 7 of 9 gates passed") as error:
        shop.promote(2)
    assert "champion stays version 1" in str(error.value)
    assert shop.aliases() == {"candidate": 2, "champion": 1}
    result = json.loads((shop.folder / "promote" / "promote.json").read_text())
    assert (result["passed"], result["alias"], result["champion"]) == (False, "candidate", 1)
    assert [audit.data.tags["outcome"] for audit in shop.audits()] == ["promoted", "refused"]
    assert versions.version_tags(shop.cfg, 2)["gates_passed"] == "false"


def test_force_promotes_what_gates_refuse_and_says_so(shop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    shop.bundle(1), shop.bundle(2, retrieval__overlap=3)
    shop.promote(1)
    for settings in ({}, {"reason": " "}, {"reason": "x", "rollback": True}):
        with pytest.raises(UserError, match="force goes with a reason"):
            shop.promote(2, force=True, **settings)
    result = shop.promote(2, force=True, reason="the service is down")
    assert (result["passed"], result["forced"], result["champion"], result["previous"]) == (False, True, 2, 1)
    assert "although these gates failed: retrieval.overlap" in caplog.text
    tags = versions.version_tags(shop.cfg, 2)
    assert (tags["gates_passed"], tags["forced"], tags["reason"]) == ("false", "true", "the service is down")
    assert [audit.data.tags["outcome"] for audit in shop.audits()] == ["promoted", "forced"]
    with pytest.raises(UserError, match="overlap=3"):
        shop.promote(2)
    assert versions.version_tags(shop.cfg, 2)["forced"] == "true", "its record stays"
    assert shop.promote(1, force=True, reason="all well")["forced"] is False, "nothing had to be forced"
    assert shop.promote(2, rollback=True)["champion"] == 2


def test_command_line_exit_codes(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    shop.bundle(1)
    shop.bundle(2, retrieval__overlap=3)
    config = shop.folder / "promote.yaml"
    for seed, code in ((1, 0), (2, 2)):
        config.write_text(shop.config(seed).to_yaml())
        assert main(["promote", "--config", str(config), "--reason", "test"]) == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("aai promote: error: retrieval.overlap=3: must be <= 0")
    assert shop.aliases()["champion"] == 1
    assert versions.version_tags(shop.cfg, 1)["reason"] == "test"


def test_not_worse_than_champion(shop: Workshop) -> None:
    shop.bundle(1)
    shop.promote(1, **RULES)  # there is no champion yet
    shop.bundle(2, generation__sound__object=0.77)
    with pytest.raises(UserError, match=WORSE):
        shop.promote(2, **RULES)
    shop.bundle(3, generation__sound__object=0.79)
    assert shop.promote(3, **RULES)["champion"] == 3
    with pytest.raises(UserError, match=r"^retrieval\.unheard_of=missing: must be comparable .* no such figure"):
        shop.promote(2, not_worse_than_champion={"retrieval.unheard_of": 1.0})


def test_compare_and_set(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2)
    shop.promote(1, expected_current=0)
    for settings in ({"expected_current": 0}, {"expected_current": 7}, {"expected_current": 7, "rollback": True}):
        with pytest.raises(UserError, match="champion is version 1 now: somebody else moved it"):
            shop.promote(2, **settings)
    assert shop.aliases() == {"candidate": 1, "champion": 1}
    assert shop.promote(2, expected_current=1)["champion"] == 2


def test_evaluations_that_do_not_count(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2)
    other = str(shop.folder / "2" / "evaluate.json")
    with pytest.raises(UserError, match=r"is about bundle .*, this is bundle .*; run `aai evaluate` on this bundle"):
        shop.promote(1, evaluation=other)
    with pytest.raises(UserError, match="no such file"):
        shop.promote(1, evaluation=str(shop.folder / "absent.json"))
    for text, rule in (("{", "is not JSON"), ("[]", "is not a JSON object"), ("{}", "is about bundle None")):
        (shop.folder / "1" / "evaluate.json").write_text(text)
        with pytest.raises(UserError, match=rule):
            shop.promote(1)
    assert shop.aliases() == {}


def test_an_evaluation_that_was_changed_or_never_recorded_is_no_evidence(shop: Workshop) -> None:
    made, other = shop.bundle(1), shop.bundle(2)
    file = shop.folder / "1" / "evaluate.json"
    honest = json.loads(file.read_text())

    def refused(result: dict[str, Any], rule: str) -> None:
        file.write_text(json.dumps(result))
        with pytest.raises(UserError, match=rule):
            shop.promote(1)

    theirs = json.loads((shop.folder / "2" / "evaluate.json").read_text())
    refused({**theirs, "bundle": made.sha}, "was changed after `aai evaluate` wrote it")
    refused({**honest, "generation": {**honest["generation"], "sound": {"object": 1.0}}}, "was changed")
    refused({name: value for name, value in honest.items() if name != "sha"}, "by an older release")
    again = {name: value for name, value in {**theirs, "bundle": made.sha}.items() if name not in ("sha", "marks")}
    refused(sealed(again, b""), "is on record in no finished run")
    refused(shop.evaluate(1, record=False, generation__sound__object=0.95), "is on record in no finished run")
    assert shop.aliases() == {}
    file.write_text(json.dumps(honest))
    shop.promote(1)
    assert json.loads(versions.version_tags(shop.cfg, 1)["evaluation-champion"])["sha"] == honest["sha"]
    assert other.sha != made.sha


def test_files_of_a_run_that_were_changed_are_no_evidence(shop: Workshop) -> None:
    shop.bundle(1)
    for name in ("marks.parquet", "evaluate.json"):
        (file,) = shop.folder.glob(f"mlartifacts/**/{name}")
        honest = file.read_bytes()
        for spoiled in (honest + b"x", honest[: len(honest) // 2], b"[]", b"{}"):
            file.write_bytes(spoiled)
            with pytest.raises(UserError, match="are not those that `aai evaluate` put on record"):
                shop.promote(1)
        file.write_bytes(honest)
    shop.promote(1)


def meta_of(shop: Workshop, data: str) -> Path:
    """The file in the artifact store that describes the bundle of these data."""
    files = shop.folder.glob("mlartifacts/**/data/*/meta.json")
    return next(file for file in files if f'"{data}"' in file.read_text())


def test_a_version_whose_files_are_lost_or_others_is_registered_anew(
    shop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    shop.bundle(1), shop.bundle(2), shop.bundle(3)
    shop.promote(3), shop.promote(1)
    meta_of(shop, "d1").unlink()
    anew = shop.promote(1)
    assert (anew["version"], anew["previous"]) == (3, 1), "the version before stays the way back"
    assert "version 2 cannot be used, the bundle is registered anew" in caplog.text
    shutil.rmtree(meta_of(shop, "d1").parents[2])
    assert shop.promote(1)["version"] == 4
    second = read_bundle(shop.folder / "2" / "bundle")
    versions.set_version_tags(shop.cfg, 4, {versions.SHA_TAG: second.sha})  # somebody's label on another's files
    assert shop.promote(2)["version"] == 5
    assert read_bundle(versions.resolve_bundle("models:/aai-demo@champion", shop.cfg)).sha == second.sha


def test_a_rollback_to_a_version_whose_files_are_lost_is_refused(shop: Workshop) -> None:
    shop.bundle(1), shop.bundle(2)
    shop.promote(1), shop.promote(2)
    meta_of(shop, "d1").unlink()
    with pytest.raises(UserError, match="holds no bundle"):
        shop.promote(1, rollback=True)
    assert shop.aliases() == {"candidate": 2, "champion": 2, "previous": 1}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gates": []}, "at least 1 item"),
        ({"gates": [{"metric": "a"}]}, "a gate needs min, max, or min_ratio_of with ratio"),
        ({"gates": [{"metric": "a", "min_ratio_of": "b"}]}, "come together"),
        ({"gates": [{"metric": "a", "minn": 1}]}, "did you mean 'min'"),
        ({"alias": "previous"}, "has another meaning"),
        ({"alias": "v3"}, "cannot be one"),
        ({"alias": "V3"}, "cannot be one"),
        ({"alias": "Latest"}, "has another meaning"),
        ({"alias": "previous-staging"}, "has another meaning"),
        ({"alias": "a" * 201}, "at most 200 characters"),
        ({"not_worse_than_champion": {"a": -1}}, "greater than or equal to 0"),
        ({"bundle": "absent"}, "no such bundle"),
        ({"tracking.uri": "http://127.0.0.1:9", "tracking.wait_s": 0}, "no tracking server answers"),
    ],
)
def test_wrong_settings_are_one_line(shop: Workshop, settings: dict[str, Any], complaint: str) -> None:
    shop.bundle(1)
    with pytest.raises(UserError, match=complaint) as error:
        shop.promote(1, **settings)
    assert "\n" not in str(error.value)
