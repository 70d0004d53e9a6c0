"""One at a time: who promotes or rolls back waits for its turn, which no other process has meanwhile.

A sqlite store is one machine's: a lock of its kernel, gone with the process that holds it. A server numbers the
versions of a registered model one by one, so that a version of `NAME-turns` is a ticket: a turn begins when no lower
ticket is open. A ticket whose holder was not heard of for LEASE_S is closed by whoever waits.
"""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aai.digest import digest
from aai.errors import UserError
from pipelines.registry.store import database
from pipelines.registry.tracking import OpenRun, attempt, unless
from pipelines.registry.versions import TURNS
from pipelines.settings import TrackingConfig

log = logging.getLogger(__name__)
PATIENCE_S = 600.0
"""How long one waits for its turn."""
LOOK_S = 0.25
LEASE_S, BEAT_S = 30.0, 5.0
"""A holder is taken for dead when its ticket has not changed for so long; how often it changes."""
STATE, BEAT = "state", "beat"


@dataclass(frozen=True)
class Claim:
    """What the body of `turn` is told."""

    number: int
    """Higher than those of all turns before."""
    check: Callable[[], None]
    """Raises UserError when the turn has been taken away: called right before what must not happen twice."""


@contextmanager
def turn(cfg: TrackingConfig, run: OpenRun, who: str) -> Iterator[Claim]:
    """The body runs while no other turn of this model does. run: of the attempt. Raises UserError after PATIENCE_S."""
    if cfg.uri.startswith("sqlite:///"):
        file = database(cfg).resolve()
        with _locked(cfg, file.with_name(f".{file.name}.{digest(cfg.model_name)}.turn")) as number:
            yield Claim(number, lambda: None)
    else:
        with _ticket(cfg, run, who) as mine:
            yield mine


def _busy(cfg: TrackingConfig, who: str) -> UserError:
    rule = f"{who} is promoting or rolling back {cfg.model_name}"
    return UserError("tracking.model_name", cfg.model_name, rule, "wait for its end, then try again")


@contextmanager
def _locked(cfg: TrackingConfig, file: Path) -> Iterator[int]:
    """Yields the number of the turn, which the file counts."""
    until_s = time.monotonic() + PATIENCE_S
    with _opened(cfg, file) as holder:
        while True:
            try:
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until_s:
                    raise _busy(cfg, "another process") from None
                time.sleep(LOOK_S)
        number = 1 + int(os.pread(holder, 64, 0) or 0)
        os.pwrite(holder, str(number).encode(), 0)  # a number never gets shorter: at no time is the file empty
        yield number


@contextmanager
def _opened(cfg: TrackingConfig, file: Path) -> Iterator[int]:
    try:
        holder = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        rule = f"{file} cannot be written ({error.strerror})"
        raise UserError("tracking.uri", cfg.uri, rule, "promote as a user who may write there") from error
    try:
        yield holder
    finally:
        os.close(holder)


# ---------------------------------------------------------------- on a server


@contextmanager
def _ticket(cfg: TrackingConfig, run: OpenRun, who: str) -> Iterator[Claim]:
    tickets = Tickets(cfg, run)
    number, ended = tickets.draw(who), threading.Event()
    beat = threading.Thread(target=tickets.beat, args=(number, ended), name="promotion-turn", daemon=True)
    beat.start()
    try:
        tickets.wait(number)
        tickets.check(number)  # one that was silent while it waited has lost its ticket
        yield Claim(number, lambda: tickets.check(number))
    finally:
        ended.set()
        beat.join()
        tickets.close(number)


class Tickets:
    """The tickets of a model: versions of NAME-turns, each with who drew it, its state and its holder's beat."""

    def __init__(self, cfg: TrackingConfig, run: OpenRun) -> None:
        self.cfg, self.run, self.client = cfg, run, run.client
        self.model = f"{cfg.model_name}{TURNS}"

    def draw(self, who: str) -> int:
        """A new ticket, higher than all there are."""
        exists = "RESOURCE_ALREADY_EXISTS"
        attempt(self.cfg, unless, exists, self.client.create_registered_model, self.model)
        source, tags = f"runs:/{self.run.run_id}/promote.json", {STATE: "open", BEAT: "0", "by": who}
        draw, of = self.client.create_model_version, self.run.run_id
        made = attempt(self.cfg, draw, self.model, source, of, tags=tags, await_creation_for=0)
        return int(made.version)

    def wait(self, number: int) -> None:
        """Returns when no lower ticket is open. Raises UserError after PATIENCE_S."""
        until_s = time.monotonic() + PATIENCE_S
        last: dict[int, tuple[str, float]] = {}
        """Of each open ticket its beat, and since when that has been so, on this process's clock."""
        looked_s = time.monotonic()
        while waiting := self._open_below(number):
            now_s = time.monotonic()
            if now_s - looked_s > BEAT_S:
                last.clear()  # the server was slow, or this machine asleep: others could not be heard of either
            looked_s = now_s
            for ticket in waiting:
                lower, beat = int(ticket.version), str(ticket.tags.get(BEAT))
                if last.get(lower, ("", 0.0))[0] != beat:
                    last[lower] = beat, now_s
                elif now_s - last[lower][1] > LEASE_S:
                    log.warning("promote: turn %d of %s is over, nothing was heard of it", lower, self._by(ticket))
                    self._tag(lower, STATE, "given up")
            if now_s > until_s:
                raise _busy(self.cfg, self._by(waiting[0]))
            time.sleep(LOOK_S)

    def beat(self, number: int, ended: threading.Event) -> None:
        """Changes a ticket until `ended`."""
        count = 0
        while not ended.wait(BEAT_S):
            count += 1
            try:
                self._tag(number, BEAT, str(count))
            except UserError as error:
                log.warning("promote: the registry was not told that this turn goes on (%s)", error)

    def check(self, number: int) -> None:
        """Raises UserError when somebody closed the ticket; a new beat gives the time to do what follows."""
        self._tag(number, BEAT, f"checked {time.time():.3f}")
        found = attempt(self.cfg, self.client.get_model_version, self.model, str(number))
        if found.tags.get(STATE) != "open":
            raise _busy(self.cfg, "another process, since nothing was heard of this one,")

    def close(self, number: int) -> None:
        """Lets the next ticket have its turn. A registry that is away is waited for by the others."""
        try:
            self._tag(number, STATE, "over")
        except UserError as error:
            log.warning("promote: turn %d could not be ended, the next one waits %d s (%s)", number, LEASE_S, error)

    def _open_below(self, number: int) -> list[Any]:
        """Open tickets below a number, the lowest first."""
        query, found = f"name = '{self.model}' and tags.{STATE} = 'open'", []
        token: str | None = ""
        while token is not None:
            page = attempt(self.cfg, self.client.search_model_versions, query, 1000, page_token=token or None)
            found += [ticket for ticket in page if int(ticket.version) < number]
            token = page.token or None
        return sorted(found, key=lambda ticket: int(ticket.version))

    def _by(self, ticket: Any) -> str:
        return str(ticket.tags.get("by", "somebody"))

    def _tag(self, number: int, key: str, value: str) -> None:
        attempt(self.cfg, self.client.set_model_version_tag, self.model, str(number), key, value)
