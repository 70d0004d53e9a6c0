"""Promotions on what a team runs: an MLflow server over PostgreSQL and S3; and promoters that are really killed.

The accept runs print their figures, which stand in docs/promotion.md.
"""

import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from aai.errors import UserError
from pipelines.registry import tickets, versions
from pipelines.registry.history import attempts
from tests.e2e.test_promotions import check_history, shop  # noqa: F401
from tests.pipelines.conftest import empty_store, python  # noqa: F401
from tests.pipelines.registry.test_versions import serving
from tests.pipelines.workshop import Workshop
from tests.postgres import INITDB, postgres

needs_postgres = pytest.mark.skipif(INITDB is None, reason="PostgreSQL is not installed (no initdb)")
BUNDLES = range(1, 6)


@contextmanager
def team(shop: Workshop, s3: str) -> Iterator[Workshop]:  # noqa: F811
    """The workshop on a server of two processes over PostgreSQL; artifacts go through it to S3."""
    with postgres() as database, serving(shop.folder, database, artifacts=s3, workers=2) as address:
        shop.cfg = shop.cfg.model_copy(update={"uri": address, "experiment": "served"})
        yield shop


def at_once(calls: list[Callable[[], Any]]) -> list[BaseException | None]:
    """Runs them in threads that begin together; what each raised."""
    start, raised = threading.Barrier(len(calls)), list[BaseException | None]([None] * len(calls))

    def take_part(place: int) -> None:
        start.wait()
        try:
            calls[place]()
        except BaseException as error:
            raised[place] = error

    threads = [threading.Thread(target=take_part, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    return raised


def race(shop: Workshop, draw: random.Random, number: int) -> str:  # noqa: F811
    """Two or three that expect the champion of now, maybe one who goes back: one of them wins. Returns what it did."""
    before = shop.aliases()
    expected, known = before.get("champion", 0), number_of(shop)
    others = [seed for seed in BUNDLES if known.get(seed) != expected]
    calls: list[Callable[[], Any]] = []
    for seed in draw.sample(others, draw.choice((2, 3))):
        out = str(shop.folder / f"out-{number}-{seed}")
        calls.append(lambda seed=seed, out=out: shop.promote(seed, out=out, expected_current=expected))
    back = bool(before.keys() & {"champion", "previous"}) and draw.random() < 0.5
    if back:
        out = str(shop.folder / f"out-{number}-back")
        calls.append(lambda: shop.promote(1, out=out, rollback=True, expected_current=expected))
    raised = at_once(calls)
    losers = [error for error in raised if error is not None]
    for error in losers:
        assert isinstance(error, UserError), error
        assert "somebody else moved it" in str(error), error
    assert len(losers) == len(calls) - 1, "exactly one wins"
    after = shop.aliases()
    assert after.get("champion", 0) != expected
    won = raised.index(None)
    return "rollback" if back and won == len(calls) - 1 else "promotion"


def number_of(shop: Workshop) -> dict[int, int]:  # noqa: F811
    """The version of each bundle that is registered."""
    found = {version.tags.get("data_fingerprint"): version.version for version in versions.listing(shop.cfg)}
    return {seed: found[f"d{seed}"] for seed in BUNDLES if f"d{seed}" in found}


def races(shop: Workshop, count: int, seed: int) -> Counter[str]:  # noqa: F811
    """That many races; what won them. The history must tell the same."""
    draw, won = random.Random(seed), Counter[str]()
    for bundle in BUNDLES:
        shop.bundle(bundle)
    for number in range(count):
        won[race(shop, draw, number)] += 1
    assert check_history(shop.cfg, shop) == count
    told = Counter(row["outcome"] for row in attempts(shop.cfg, 1000))
    assert (told["promoted"], told["rolled back"]) == (won["promotion"], won["rollback"])
    assert versions.model_tags(shop.cfg) == {}
    return won + Counter({"told that another was first": told["error"]})


@needs_postgres
def test_races_on_postgresql_and_s3_have_one_winner_each(shop: Workshop, s3: str) -> None:  # noqa: F811
    with team(shop, s3):
        races(shop, 2, seed=7)


@pytest.mark.accept
@pytest.mark.timeout(3600)
@needs_postgres
@pytest.mark.parametrize("quarter", range(4))
def test_m1_a_hundred_races_on_postgresql_and_s3(shop: Workshop, s3: str, quarter: int) -> None:  # noqa: F811
    begin_s = time.monotonic()
    with team(shop, s3):
        won = races(shop, 25, seed=quarter)
    print(f"quarter {quarter}: 25 races, {dict(won)}, {time.monotonic() - begin_s:.0f} s")


PROMOTER = """
    import sys
    from pipelines import promote
    from pipelines.__main__ import main
    from pipelines.registry import tracking
    tracking.mlflow().pyfunc  # before it is told to go: the kill shall meet the promotion
    move_alias = promote.move_alias
    promote.move_alias = lambda *how: (print("moving", flush=True), move_alias(*how))
    print("go", flush=True)
    sys.stdin.readline()
    sys.exit(main(["promote", "--config", sys.argv[1], *sys.argv[2:]]))
"""


def promoter(shop: Workshop, seed: int, *flags: str) -> Any:  # noqa: F811
    """A process of its own that is about to run `aai promote`."""
    config = shop.folder / f"promote-{seed}.yaml"
    config.write_text(shop.config(seed).to_yaml())
    process = python(PROMOTER, str(config), *flags, stdin=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n", process.communicate()[1]
    return process


def kill(shop: Workshop, seed: int, back: bool, moving: bool, after_s: float) -> float:  # noqa: F811
    """SIGKILL to a promoter so long after it began (or began to move the alias), if it has not ended before.

    Returns the seconds that it lived from then.
    """
    process = promoter(shop, seed, *(["--rollback"] if back else []))
    process.stdin.write("\n")
    process.stdin.flush()
    if moving:
        assert process.stdout.readline() == "moving\n"
    begin_s = time.monotonic()
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
    lived_s = time.monotonic() - begin_s
    _, err = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), err
    return lived_s


def kills(shop: Workshop, count: int, seed: int) -> Counter[str]:  # noqa: F811
    """Promoters that die at a random time, half once they move the alias. Each leaves what was, or what it made."""
    draw, seen = random.Random(seed), Counter[str]()
    for bundle in BUNDLES:
        shop.bundle(bundle)
    shop.promote(1), shop.promote(2)
    whole_s = {moving: kill(shop, seed, False, moving, after_s=300) for seed, moving in ((3, False), (4, True))}
    for number in range(count):
        champion, previous = (shop.aliases().get(name) for name in ("champion", "previous"))
        known = number_of(shop)
        bundle = draw.choice([seed for seed in BUNDLES if known.get(seed) not in (champion, previous)])
        back, moving = draw.random() < 0.3, number % 4 > 1
        at_s = draw.uniform(0, whole_s[moving])
        ended = kill(shop, bundle, back, moving, at_s) < at_s
        target = previous if back else number_of(shop).get(bundle)
        now = shop.aliases().get("champion")
        assert now in (champion, target), "one meaning: the old one or the new one"
        moved = now != champion
        begun = bool(versions.model_tags(shop.cfg))
        seen["ended" if ended else f"{'after' if moved else 'before'} the move" + ", in it" * begun] += 1
        # The next command goes on: every other time it goes back, which must lead to what the alias named before.
        if number % 2:
            result = shop.promote(1, rollback=True)
            expected = (champion, now) if moved else (previous, champion)
            assert (result["champion"], result["previous"]) == expected, number
        else:
            result = shop.promote(bundle)
            assert result["champion"] == number_of(shop)[bundle]
        aliases = shop.aliases()
        assert (aliases["champion"], aliases["previous"]) == (result["champion"], result["previous"])
        assert versions.model_tags(shop.cfg) == {}
    return seen


def test_a_promoter_that_is_killed_leaves_one_meaning(shop: Workshop) -> None:  # noqa: F811
    kills(shop, 2, seed=5)


@pytest.mark.accept
@pytest.mark.timeout(3600)
def test_m1_twenty_kills(shop: Workshop) -> None:  # noqa: F811
    print("20 kills on sqlite:", dict(kills(shop, 20, seed=1)))


@pytest.mark.accept
@pytest.mark.timeout(3600)
@needs_postgres
@pytest.mark.parametrize("half", range(2))
def test_m1_twenty_kills_on_postgresql_and_s3(
    shop: Workshop,  # noqa: F811
    s3: str,
    half: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tickets, "LEASE_S", 8.0)  # of who comes next: ten leases of 30 s prove no more
    with team(shop, s3):
        print(f"half {half}, 10 kills on PostgreSQL and S3:", dict(kills(shop, 10, seed=half)))
