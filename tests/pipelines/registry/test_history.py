"""What was tried with a model's aliases, as its runs tell."""

from pathlib import Path

from pipelines.registry import tracking
from pipelines.registry.history import attempts
from tests.pipelines.workshop import Workshop


def test_attempts_on_this_model_alone_and_those_that_broke_off(tmp_path: Path, empty_store: Path) -> None:
    shop = Workshop(tmp_path, empty_store)
    assert attempts(shop.cfg, 5) == []
    shop.bundle(1)
    shop.promote(1, reason="why not")
    other = {"tracking": {"model_name": "other"}, "alias": "champion"}
    with tracking.run(shop.cfg, "promotion", other, {"outcome": "promoted"}):
        pass
    with tracking.run(shop.cfg, "promotion", {**other, "tracking": {"model_name": "aai-demo"}}):
        pass  # killed before it said what came of it
    found = attempts(shop.cfg, 5)
    assert [(row["outcome"], row["version"], row["was"]) for row in found] == [("broke off", 0, 0), ("promoted", 1, 0)]
    assert (found[1]["alias"], found[1]["reason"]) == ("champion", "why not")
    assert found[1]["at"].startswith("20")
    assert attempts(shop.cfg, 1) == found[:1]
    for turn in (7, 0, 3):  # the one of turn 3 began last: it had waited less long; the second never had a turn
        with tracking.run(shop.cfg, "promotion", {"tracking": {"model_name": "aai-demo"}}, {"turn": turn}):
            pass
    assert [row["turn"] for row in attempts(shop.cfg, 5)] == [0, 7, 3, 0, 1]
    assert attempts(shop.cfg.model_copy(update={"experiment": "another"}), 5) == []
