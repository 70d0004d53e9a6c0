"""Several operators at once: every promotion and rollback starts from what the one before left (accept: 100 races).

The accept runs print how many there were and what came of them.
"""

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry.history import attempts
from pipelines.settings import TrackingConfig
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
    assert errors == []


def check_history(cfg: TrackingConfig, shop: Workshop) -> int:
    """Each attempt found what the one before it left; the aliases are what the last one left. Returns how many."""
    champion = 0
    found = [row for row in reversed(attempts(cfg, 1000)) if row["outcome"] in ("promoted", "rolled back")]
    for row in sorted(found, key=lambda row: row["turn"]):
        assert row["was"] == champion, row
        champion = row["version"]
    assert shop.aliases().get("champion", 0) == champion
    return len(found)


@pytest.fixture
def shop(tmp_path: Path, empty_store: Path) -> Workshop:
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
