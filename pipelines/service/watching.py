"""Following the registry: when an alias names another version, painters take it up without a restart."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from aai.errors import UserError
from pipelines.registry import versions
from pipelines.service.http import ServedModel
from pipelines.settings import StoreConfig

logger = logging.getLogger(__name__)

STALE_S = 60.0
"""After which a painter that told nothing is gone."""


class Watcher:
    """Looks at an alias from time to time and hands on the version that it names, when that is another one.

    take: loads, tries and takes up a version, or raises; then the old one stays and the reason is in `refused`. It is
    tried again when the alias has named another one meanwhile, or at the next look when the registry was away.
    """

    def __init__(
        self, uri: str, store: StoreConfig, served: ServedModel, take: Callable[[str, ServedModel], None]
    ) -> None:
        self.uri, self.store, self.served = uri, store, served
        self._take = take
        self.refused: dict[str, str] = {}
        """{version: why}"""
        self.trouble = ""
        """Why the registry cannot be asked, or that the alias names nothing."""

    def look(self) -> None:
        """Looks once. Never raises: whatever happens, what is served goes on."""
        try:
            pinned, _, version, _ = versions.pin_bundle(self.uri, self.store)
        except Exception as error:
            self._note(f"{error}")
            return
        self._note("")
        if version == self.served.version:
            self.refused = {}
        elif version not in self.refused:
            self._try(pinned, version)

    def _try(self, pinned: str, version: str) -> None:
        begin = time.monotonic()
        found = self.served.model_copy(update={"version": version})
        try:
            self._take(pinned, found)
        except Exception as error:
            if getattr(error, "setting", "") == "tracking.uri":  # the server, not the version: another time
                self._note(f"{error}")
                return
            self.refused = {version: f"{type(error).__name__}: {error}"[:500]}
            logger.warning("painter: version %s is refused, %s stays (%s)", version, self.served.label(), error)
        else:
            self.refused = {}
            logger.info("painter: %s after %.1f s", self.served.label(), time.monotonic() - begin)

    def _note(self, trouble: str) -> None:
        if trouble and not self.trouble:
            said = "painter: %s goes on being served, but %s cannot be followed (%s)"
            logger.warning(said, self.served.label(), self.uri, trouble)
        self.trouble = trouble

    def start(self, every_s: float, told: Callable[[], None]) -> None:
        """Looks every so many seconds, in a thread that ends with the process; `told` is called after each look."""

        def watch() -> None:
            main, due = threading.main_thread(), time.monotonic() + every_s
            while main.is_alive():  # no daemon: a process that ends within torch would abort
                if time.monotonic() < due:
                    time.sleep(0.2)
                    continue
                self.look()
                told()
                due = time.monotonic() + every_s

        threading.Thread(target=watch, name="watcher").start()


class Noticeboard:
    """What each painter serves: they tell it, the gateway reads it. An actor, since Serve asks only one of many."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[float, dict[str, Any]]] = {}

    def tell(self, painter: str, row: dict[str, Any]) -> None:
        """A painter's state: model, refused, trouble."""
        self._rows[painter] = time.monotonic(), row

    def read(self) -> list[dict[str, Any]]:
        """The states of all painters that are there."""
        fresh = time.monotonic() - STALE_S
        self._rows = {painter: row for painter, row in self._rows.items() if row[0] > fresh}
        return [row for _, row in self._rows.values()]


def refuse_other(setting: str, ours: object, theirs: object) -> None:
    """Raises UserError where a version differs in what cannot be changed while others are painted."""
    if ours != theirs:
        rule = f"the service runs with {ours}"
        raise UserError(setting, theirs, rule, "start the service again to serve this version")
