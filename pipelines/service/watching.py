"""Following the registry: when an alias names another version, painters take it up without a restart."""

import logging
import threading
import time
from collections.abc import Callable

from aai.errors import UserError
from pipelines.registry import store, versions
from pipelines.service.answers import ServedModel
from pipelines.settings import StoreConfig

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas

AGAIN_S, AT_MOST_S = 60.0, 900.0
"""How long after a refusal a version is tried again, twice as long after each; what failed may have been a disk."""


class Watcher:
    """Looks at an alias from time to time and hands on the version that it names, when that is another one.

    take: loads, tries and takes up a version, or raises; then the old one stays. It is tried again after AGAIN_S, when
    the alias has named another one meanwhile, or at the next look when it was the registry that was away.
    """

    def __init__(
        self, uri: str, registry: StoreConfig, served: ServedModel, take: Callable[[str, ServedModel], None]
    ) -> None:
        self.uri, self.store, self.served = uri, registry, served
        self._take = take
        self.refused: dict[str, str] = {}
        """{version: kind of error}; the log has all of it"""
        self.trouble = ""
        """Kind of error for which the alias cannot be followed; the log has all of it."""
        self._again_s, self._wait_s = 0.0, AGAIN_S

    def look(self) -> None:
        """Looks once. Never raises: whatever happens, what is served goes on."""
        try:
            store.alive(self.store)  # MLflow itself would try for minutes
            pinned, _, version, _ = versions.pin_bundle(self.uri, self.store)
        except Exception as error:
            lacks = getattr(error, "setting", "") == "bundle" and self._lacking()
            self._note(None if lacks else error)
            return
        if version == self.served.version:
            self.refused = {}
            self._note(None)
        elif version not in self.refused or time.monotonic() > self._again_s:
            self._try(pinned, version)

    def _try(self, pinned: str, version: str) -> None:
        begin = time.monotonic()
        found = self.served.model_copy(update={"version": version})
        try:
            self._take(pinned, found)
        except Exception as error:
            if getattr(error, "setting", "") == "tracking.uri":  # the server, not the version: another time
                self._note(error)
                return
            self._wait_s = min(2 * self._wait_s, AT_MOST_S) if version in self.refused else AGAIN_S
            self._again_s = time.monotonic() + self._wait_s
            self.refused = {version: _kind(error)}
            said = "painter: version %s is refused, %s stays; next try in %.0f s (%s)"
            logger.warning(said, version, self.served.label(), self._wait_s, error)
        else:
            self.refused = {}
            logger.info("painter: %s after %.1f s", self.served.label(), time.monotonic() - begin)
        self._note(None)

    def _lacking(self) -> bool:
        """The alias names nothing. Returns whether that is as it should be."""
        return False

    def _note(self, error: Exception | None) -> None:
        if error is not None and not self.trouble:
            said = "painter: %s goes on being served, but %s cannot be followed (%s)"
            logger.warning(said, self.served.label(), self.uri, error)
        self.trouble = "" if error is None else _kind(error)

    def start(self, every_s: float, told: Callable[[], None], moved: Callable[[float], bool]) -> None:
        """Looks every so many seconds, or when the alias moved, in a thread that ends with the process.

        told: called before and after each look. moved: waits for so many seconds at most; whether to look at once.
        """

        def watch() -> None:
            main, due = threading.main_thread(), time.monotonic() + every_s
            while main.is_alive():  # no daemon: a process that ends within torch would abort
                if not moved(0.2) and time.monotonic() < due:
                    continue
                told()  # a look may take long
                self.look()
                told()
                # What failed may be well before the next one is due.
                due = time.monotonic() + (min(every_s, AGAIN_S) if self.trouble or self.refused else every_s)

        threading.Thread(target=watch, name="watcher").start()


def _kind(error: Exception) -> str:
    """What everybody may know of an error: /healthz needs no key."""
    setting = getattr(error, "setting", "")
    return f"{type(error).__name__}: {setting}" if setting else type(error).__name__


def refuse_other(setting: str, ours: object, theirs: object) -> None:
    """Raises UserError where a version differs in what cannot be changed while others are painted."""
    if ours != theirs:
        rule = f"the service runs with {ours}"
        raise UserError(setting, theirs, rule, "start the service again to serve this version")
