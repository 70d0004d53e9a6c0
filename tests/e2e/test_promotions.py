"""Several operators at once: every promotion and rollback starts from what the one before left (accept: 100 races).

The accept runs print how many there were and what came of them.
"""

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry.history import attempts
from pipelines.settings import TrackingConfig
from tests.pipelines.conftest import empty_store  # noqa: F401
from tests.pipelines.registry.test_versions import serving
from tests.pipelines.workshop import Workshop


def race(shop: Workshop, bundles: list[int], rollback: bool) -> None:
    """Promotes bundles, and maybe rolls back, at the same time."""
    errors: list[BaseException] = []

    def take_part(number: int, **settings: Any) -> None:
        try:
            out = str(shop.folder / f"promote-{threading.get_ident()}")
            shop.promote(number, out=out, **settings)
        except UserError as error:
            if "has no champion yet" not in str(error):
                errors.append(error)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=take_part, args=(number,)) for number in bundles]
    if rollback:
        threads.append(threading.Thread(target=take_part, args=(bundles[0],), kwargs={"rollback": True}))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    assert errors == []


def check_history(cfg: TrackingConfig, shop: Workshop) -> int:
    """Each attempt found what the one before it left; the aliases are what the last one left. Returns how many."""
    champion = 0
    found = [row for row in reversed(attempts(cfg, 1000)) if row["outcome"] in ("promoted", "rolled back")]
    assert [row["turn"] for row in found] == sorted({row["turn"] for row in found} - {0}), "each its own, in order"
    for row in found:
        assert row["was"] == champion, row
        champion = row["version"]
    assert shop.aliases().get("champion", 0) == champion
    return len(found)


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:  # noqa: F811
    return Workshop(tmp_path, empty_store)


def test_three_at_once_on_a_server(shop: Workshop, tmp_path: Path) -> None:
    with serving(tmp_path, shop.cfg.uri) as address:
        shop.cfg = shop.cfg.model_copy(update={"uri": address, "experiment": "served"})
        for number in (1, 2, 3):
            shop.bundle(number)
        race(shop, [1, 2], rollback=False)
        race(shop, [3, 1], rollback=True)
        assert check_history(shop.cfg, shop) == 5


@pytest.mark.accept
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("where", ["sqlite", "server"])
def test_m1_a_hundred_races(shop: Workshop, tmp_path: Path, where: str) -> None:
    draw = random.Random(0)

    def all_races() -> None:
        for number in range(1, 6):
            shop.bundle(number)
        for _ in range(100):
            race(shop, draw.sample(range(1, 6), draw.choice((2, 3))), rollback=draw.random() < 0.5)
        print(where, check_history(shop.cfg, shop), "promotions and rollbacks in 100 races")

    if where == "sqlite":
        all_races()
        return
    with serving(tmp_path, shop.cfg.uri) as address:
        shop.cfg = shop.cfg.model_copy(update={"uri": address, "experiment": "served"})
        all_races()


Figures = Callable[[random.Random], dict[str, Any]]
BAD: dict[str, tuple[Figures, str]] = {
    "hears less": (
        lambda draw: {"generation__sound__object": 0.8 - draw.uniform(0.08, 0.5)},
        r"sound\.object=0\.\d+: must be >=",
    ),
    "finds less": (
        lambda draw: {"retrieval__same_object_r1": 0.9 - draw.uniform(0.08, 0.5)},
        r"same_object_r1=0\.\d+: must be >=",
    ),
    "no figure": (
        lambda draw: {draw.choice(("retrieval__overlap", "retrieval__near_overlap")): None},
        "=missing: must be <= 0",
    ),
    "no number": (
        lambda draw: {"generation__sound__ambience": draw.choice(("0.9", True, float("nan")))},
        "ambience=missing",
    ),
    "a ceiling of nothing": (
        lambda draw: {"generation__ceiling__object": draw.choice((0, -1.0))},
        "but it must be above 0",
    ),
    "knows the test": (lambda draw: {"retrieval__overlap": draw.randint(1, 50)}, r"overlap=\d+: must be <= 0"),
    "looks at its batch": (
        lambda draw: {"retrieval__batch_invariance_max_abs": draw.uniform(1e-3, 1)},
        "must be <= 0.0001",
    ),
    "a lookup": (
        lambda draw: {"generation__uncaptioned__above_nearest_caption__low": draw.uniform(-1, 0.04)},
        "must be >= 0.05",
    ),
    "a kind judge": (lambda draw: {"generation__random_token__object": draw.uniform(0.3, 1)}, "must be <= 0.2"),
    "other clips": (lambda draw: {"data_fingerprint": f"other{draw.random()}"}, "no evaluation on record"),
    "other settings": (lambda draw: {"config": f"other{draw.random()}"}, "no evaluation on record"),
}
"""Ways to be no better, or to be incomparable, and what the refusal says."""
TAMPERED = {
    "changed": "was changed after",
    "another's": "was changed after",
    "unrecorded": "on record in no finished run",
    "unsealed": "by an older release",
}


def tampered(shop: Workshop, number: int, how: str) -> None:
    """Makes of an honest evaluation one that is no evidence."""
    file = shop.folder / str(number) / "evaluate.json"
    result = json.loads(file.read_text())
    if how == "changed":
        result["generation"]["sound"]["object"] = 1.0
    elif how == "another's":
        result = json.loads((shop.folder / "0" / "evaluate.json").read_text()) | {"bundle": result["bundle"]}
    elif how == "unrecorded":
        result = shop.evaluate(number, record=False, generation__sound__object=0.99)
    else:
        del result["sha"]
    file.write_text(json.dumps(result))


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_m1_bad_candidates_are_refused_and_honest_ones_promoted(shop: Workshop) -> None:
    draw = random.Random(0)
    rules = {"not_worse_than_champion": {"generation.sound.object": 0.03, "retrieval.same_object_r1": 0.03}}
    shop.bundle(0)
    shop.promote(0, **rules)
    reasons: list[str] = []
    for number in range(1, 51):
        how = draw.choice([*BAD, *TAMPERED])
        figures, rule = BAD[how] if how in BAD else (lambda _: {}, TAMPERED[how])
        shop.bundle(number, **figures(draw))
        if how in TAMPERED:
            tampered(shop, number, how)
        with pytest.raises(UserError, match=rule) as error:
            shop.promote(number, **rules)
        reasons.append(f"{how}: {error.value}")
    assert shop.aliases()["champion"] == 1
    print("\n".join(reasons))
    champion, best = 0, 0.8
    for number in range(51, 71):
        best += 0.005
        shop.bundle(number, generation__sound__object=best)
        champion = shop.promote(number, **rules)["champion"]
        assert shop.aliases()["champion"] == champion
    check_history(shop.cfg, shop)
