"""A move of an alias that breaks off at any write is finished or forgotten by the next command."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from aai.errors import UserError
from pipelines.registry import versions
from pipelines.registry.moves import Move, move_alias, named, previous_of, settle
from tests.pipelines.workshop import Workshop


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:
    return Workshop(tmp_path, empty_store)


WRITES = ("set_registered_model_alias", "delete_registered_model_alias", "set_registered_model_tag")
WRITES += ("delete_registered_model_tag", "set_model_version_tag")


def break_off(patch: pytest.MonkeyPatch, number: int) -> None:
    """The process dies at its `number`-th write to the registry, before that has any effect."""
    count = 0

    def dying(write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            write(*args, **kwargs)

        return call

    for name in WRITES:
        patch.setattr(MlflowClient, name, dying(getattr(MlflowClient, name)))


def broken(shop: Workshop, number: int, **settings: Any) -> bool:
    """Whether promoting bundle 3 (or rolling back) has that many writes, and so broke off."""
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, number)
        try:
            shop.promote(3, **settings)
        except KeyboardInterrupt:
            return True
    return False


@pytest.fixture
def three(shop: Workshop) -> Workshop:
    """Champion 2, previous 1, and a version 3 that was refused."""
    shop.bundle(1), shop.bundle(2), shop.bundle(3, generation__sound__object=0.1)
    shop.promote(1), shop.promote(2)
    with pytest.raises(UserError, match="champion stays version 2"):
        shop.promote(3)
    shop.evaluate(3)
    return shop


def test_a_promotion_broken_off_anywhere_keeps_the_way_back(three: Workshop) -> None:
    ends = []
    while not ends or ends[-1][0]:
        shop = three.fork(f"fault-{len(ends) + 1}")
        died = broken(shop, len(ends) + 1)
        moved = shop.aliases()["champion"] == 3
        ends.append((died, moved))
        if len(ends) % 2:  # the next command promotes again, or (every second time) rolls back
            shop.promote(3)
        else:
            back = {"champion": 2, "previous": 3} if moved else {"champion": 1, "previous": 2}
            shop.promote(1, rollback=True)
            assert shop.aliases() == {"candidate": 3} | back
            shop.promote(1, rollback=True)
            shop.promote(3)
        assert shop.aliases() == {"candidate": 3, "champion": 3, "previous": 2}
        assert shop.figure(3) == 0.8
        assert versions.version_tags(shop.cfg, 3)["gates_passed"] == "true"
        assert versions.model_tags(shop.cfg) == {}
    assert len(ends) > 8
    assert {moved for died, moved in ends if died} == {True, False}


def test_a_rollback_broken_off_anywhere_can_be_taken_back(three: Workshop) -> None:
    ends = []
    while not ends or ends[-1][0]:
        shop = three.fork(f"fault-{len(ends) + 1}")
        died = broken(shop, len(ends) + 1, rollback=True)
        moved = shop.aliases()["champion"] == 1
        ends.append((died, moved))
        shop.promote(1, rollback=True)
        swapped = {"champion": 2, "previous": 1} if moved else {"champion": 1, "previous": 2}
        assert shop.aliases() == {"candidate": 3} | swapped
        assert versions.model_tags(shop.cfg) == {}
    assert {moved for died, moved in ends if died} == {True, False}


def test_a_first_promotion_broken_off_is_finished_or_forgotten(shop: Workshop) -> None:
    versions.register(shop.cfg, shop.bundle(3).folder, {}, {})
    number, died = 0, True
    while died:
        number += 1
        other = shop.fork(f"fault-{number}")
        died = broken(other, number)
        if "champion" in other.aliases():
            assert other.promote(3, rollback=True)["champion"] is None
            assert other.aliases() == {"candidate": 1, "previous": 1}
        other.promote(3)
        assert other.aliases() == {"candidate": 1, "champion": 1}


def test_settling_finishes_a_move_after_the_alias_and_forgets_one_before(shop: Workshop) -> None:
    cfg = shop.cfg
    for seed in (1, 2):
        versions.register(cfg, shop.bundle(seed).folder, {}, {})
    settle(cfg, "champion")  # there is nothing to settle
    move_alias(cfg, "champion", Move(version=1, previous=None, tags={"metrics-champion": {"a": 0.5}}))
    assert shop.aliases() == {"champion": 1}
    assert versions.version_tags(cfg, 1)["metrics-champion"] == '{"a": 0.5}'
    versions.set_model_tag(cfg, "move-champion", Move(version=2, previous=1).model_dump_json())
    settle(cfg, "champion")
    assert (shop.aliases(), versions.model_tags(cfg)) == ({"champion": 1}, {})
    versions.set_model_tag(cfg, "move-champion", Move(version=2, previous=1).model_dump_json())
    versions.set_alias(cfg, "champion", 2)
    settle(cfg, "champion")
    assert (shop.aliases(), versions.model_tags(cfg)) == ({"champion": 2, "previous": 1}, {})


def test_names() -> None:
    assert (previous_of("champion"), previous_of("staging")) == ("previous", "previous-staging")
    assert (named(None), named(3)) == ("unset", "version 3")
