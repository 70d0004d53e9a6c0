"""`aai promote` and its `--rollback` against a simulated registry: turns by tickets, moves of an alias."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import promote
from pipelines.registry import tickets, versions
from tests import simulation
from tests.protocols import Protocol
from tests.simulation import THREADING, TIME, World

MODEL = "m"
ALIAS, PREVIOUS = "champion", "previous"


class Page(list[Any]):
    """An answer of MLflow in pages."""

    token = None


class Registry:
    """What is asked of mlflow.MlflowClient, one request each; it keeps the moves of the champion."""

    def __init__(self) -> None:
        self.models: dict[str, Any] = {}
        self.moves: list[tuple[str | None, str | None]] = [("4", "1")]

    def _model(self, name: str) -> Any:
        return self.models.setdefault(name, SimpleNamespace(aliases={}, tags={}, versions=[]))

    def _read(self, get: Any) -> Any:
        return simulation.WORLD.read(simulation.REGISTRY, get)

    def _write(self, apply: Any) -> None:
        simulation.WORLD.write(simulation.REGISTRY, apply)

    def create_registered_model(self, name: str) -> None:
        self._write(lambda: self._model(name))

    def create_model_version(self, name: str, source: str, run_id: str, tags: dict[str, str], **_: Any) -> Any:
        made: list[Any] = []

        def create() -> None:
            all_there = self._model(name).versions
            made.append(SimpleNamespace(version=str(len(all_there) + 1), tags=dict(tags)))
            all_there.append(made[-1])

        self._write(create)
        return made[-1]

    def search_model_versions(self, query: str, max_results: int, page_token: str | None = None) -> Page:
        name = query.split("'")[1]
        return Page(self._read(lambda: [v for v in self._model(name).versions if v.tags.get("state") == "open"]))

    def get_model_version(self, name: str, version: str) -> Any:
        return self._read(lambda: self._model(name).versions[int(version) - 1])

    def set_model_version_tag(self, name: str, version: str, key: str, value: str) -> None:
        self._write(lambda: self._model(name).versions[int(version) - 1].tags.update({key: value}))

    def get_registered_model(self, name: str) -> Any:
        return self._read(lambda: self._model(name))

    def set_registered_model_tag(self, name: str, key: str, value: str) -> None:
        self._write(lambda: self._model(name).tags.update({key: value}))

    def delete_registered_model_tag(self, name: str, key: str) -> None:
        self._write(lambda: self._model(name).tags.pop(key, None))

    def set_registered_model_alias(self, name: str, alias: str, version: str | None) -> None:
        def move() -> None:
            aliases = self._model(name).aliases
            before = aliases.get(alias)
            if version is None:
                aliases.pop(alias, None)
            else:
                aliases[alias] = version
            if alias == ALIAS and before != version:
                self.moves.append((before, version))

        self._write(move)

    def delete_registered_model_alias(self, name: str, alias: str) -> None:
        self.set_registered_model_alias(name, alias, None)


class Audit:
    """An open run that nobody looks at."""

    run_id = "run"

    def __init__(self, client: Registry) -> None:
        self.client = client

    def set_tags(self, tags: Any) -> None:
        """Nothing."""

    log_metrics = set_tags

    def log_json(self, name: str, value: Any) -> None:
        """Nothing."""

    def tag(self, key: str) -> None:
        """Nothing."""


class PromoteProtocol(Protocol):
    """Promotions of four versions, and rollbacks: the way back is always to what was there before."""

    name = "promote"
    variants = 5

    def __init__(self) -> None:
        tracking = {"uri": "http://sim", "model_name": MODEL}
        base = {
            "tracking": tracking,
            "out": "s3://sim/promote",
            "evaluation": "e",
            "gates": [{"metric": "m", "max": 0}],
        }
        settings = [{"bundle": str(number)} for number in (1, 2, 3, 4)] + [{"bundle": "1", "rollback": True}]
        self.configs = [promote.PromoteConfig.parse({**base, **each}) for each in settings]

    def prepare(self, world: World) -> None:
        global REGISTRY
        REGISTRY = self.registry = Registry()
        model = self.registry._model(MODEL)
        model.versions += [SimpleNamespace(version=str(n), tags={versions.SHA_TAG: f"sha-{n}"}) for n in range(1, 5)]
        model.aliases.update({ALIAS: "1", PREVIOUS: "4"})

    def drive(self, variant: int) -> None:
        promote.run(self.configs[variant])

    def marker(self) -> Any:
        return "always"

    def state(self) -> Any:
        return None

    def wrong(self, expected: list[tuple[Any, Any]]) -> list[str]:
        """Once nothing is half done, the way back leads to where the champion came from."""
        model = self.registry._model(MODEL)
        if any(tag.startswith("move-") for tag in model.tags):
            return []
        before, now = self.registry.moves[-1]
        named = model.aliases.get(ALIAS), model.aliases.get(PREVIOUS)
        found = [] if named == (now, before) else [f"champion and previous are {named}, moved was {before} to {now}"]
        if now in ("2", "3") and "gates_passed" not in model.versions[int(now) - 1].tags:
            found.append(f"version {now} is not marked as promoted")
        return found


REGISTRY: Registry


@contextmanager
def _audit(*_: Any, **__: Any) -> Iterator[Audit]:
    yield Audit(REGISTRY)


def registry_is_simulated(patch: pytest.MonkeyPatch) -> None:
    """No MLflow: its client is a Registry, and bundles and evaluations are good."""
    for module in (versions, tickets):
        patch.setattr(module, "attempt", lambda cfg, call, *args, **kwargs: call(*args, **kwargs))
        patch.setattr(module, "unless", lambda code, call, *args, **kwargs: call(*args, **kwargs))
    patch.setattr(versions, "connect", lambda cfg: REGISTRY)
    patch.setattr(tickets, "time", TIME)
    patch.setattr(tickets, "threading", THREADING)
    adapter = SimpleNamespace(adapter=1)
    replaced = {
        "read_bundle": lambda uri: SimpleNamespace(config=adapter, folder=uri, meta={}, sha=f"sha-{uri}"),
        "check": lambda *_: "",
        "recorded_evaluation": lambda *_: SimpleNamespace(figures={"sha": "e"}, run_id="r"),
        "_judge": lambda *_: [],
        "_registered": lambda config, *_: int(config.bundle),
        "_fetch": lambda *_: None,
        "tracking": SimpleNamespace(run=_audit, OpenRun=Audit),
    }
    for name, value in replaced.items():
        patch.setattr(promote, name, value)
