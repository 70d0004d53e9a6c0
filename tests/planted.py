"""Bugs of the protocol, planted one at a time: the simulation must find every one of them."""

import inspect
import sys
import textwrap
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from aai import storage
from pipelines import curate, evaluate, featurize, promote
from pipelines.curation import ledger
from pipelines.engine import lock, shards
from pipelines.registry import moves, tickets


@dataclass(frozen=True)
class Bug:
    """A change of one function; `protocol` is the one that runs into it."""

    protocol: str
    module: ModuleType
    function: str
    changes: tuple[tuple[str, str], ...]

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Puts the changed function into its place. A text that is no longer there is an error."""
        *inside, name = self.function.split(".")
        place: Any = getattr(self.module, inside[0]) if inside else self.module
        source = textwrap.dedent(inspect.getsource(getattr(place, name)))
        for old, new in self.changes:
            assert source.count(old) == 1, f"{self.function} holds {old!r} {source.count(old)} times"
            source = source.replace(old, new)
        names = dict(vars(self.module))
        exec(compile(source, f"<{self.function}>", "exec"), names)
        right = getattr(place, name)
        patch.setattr(place, name, names[name])
        for module in [each for key, each in sys.modules.items() if key.startswith("pipelines.")]:
            if vars(module).get(name) is right:  # imported by its name
                patch.setattr(module, name, names[name])


def bug(protocol: str, module: ModuleType, function: str, *changes: tuple[str, str]) -> Bug:
    """See Bug."""
    return Bug(protocol, module, function, changes)


BUGS = {
    "the lock of another is not heeded": bug(
        "lock", lock, "_take", ("and not _is_over(where, found)", "and False"), ("time.sleep(1.5 * BEAT_S)", "pass")
    ),
    "two drivers race for the lock": bug(
        "lock", lock, "_take",
        ("elif _written(where, data, new=True) and _written(where, data, new=True):",
         "elif _written(where, data) and False:"),
    ),
    "who takes over does not wait for late writes": bug("lock", lock, "_take", ("time.sleep(1.5 * BEAT_S)", "pass")),
    "no beat": bug("lock", lock, "_lease", ("beat.start()", "ended.set(), beat.start()")),
    "a lease is judged by one look at the clock": bug(
        "lock", lock, "_is_over", ("time.sleep(watch_s)", "pass"), ("_read(where) in (found, None)", "True")
    ),
    "a driver writes without asking": bug(
        "lock", lock, "Fence.__call__", ('found.get("holder") != self.holder', "False")
    ),
    "workers write without asking": bug(
        "curate", shards, "_Actor.work", ("fencing.guarded(*self.guards)", "fencing.guarded()")
    ),
    "batches named by count are overwritten": bug(
        "ledger", ledger, "Ledger.add", ("if storage.exists(batch):", "if False:"), ("new=True", "new=False")
    ),
    "a batch is looked for, then written": bug("ledger", ledger, "Ledger.add", ("new=True", "new=False")),
    "a shard is done by its name": bug(
        "curate", curate, "_split",
        ('found.get(shard.name, ("", 0))[0] != shard.digest', "shard.name not in found"),
    ),
    "a shard is done by one of its two tables": bug(
        "curate", curate, "_split", ("in made_of.values()", "in [made_of[ACCEPTED]]")
    ),
    "rejects of a shard that nobody wants stay": bug(
        "curate", curate, "_split", ("in made_of.items()", "in [(ACCEPTED, made_of[ACCEPTED])]")
    ),
    "curate.json stays while the tables change": bug("curate", curate, "run", ("storage.remove(where)", "pass")),
    "the feature manifest stays while the table changes": bug(
        "featurize", featurize, "run", ("storage.remove(storage.join(config.out, MANIFEST))", "pass")
    ),
    "a feature file is done when it is there": bug(
        "featurize", featurize, "_done",
        ('metadata.get(METADATA_KEY, b"").decode() == digest and shapes.get("input") == shard.fingerprint', "True"),
    ),
    "features of clips that are gone stay": bug(
        "featurize", featurize, "run", ("if storage.absolute(file) not in wanted:", "if False:")
    ),
    "a part shows before it is whole": bug(
        "compact", storage, "writing",
        ("fs.put_file(str(local), path)", 'fs.pipe_file(path, b"PAR1"), fs.put_file(str(local), path)'),
    ),
    "shards are numbered by another size": bug("evaluate", evaluate, "settled", ("before.get(name, value)", "value")),
    "previous moves before the alias": bug(
        "promote", moves, "move_alias",
        ("_point(cfg, alias, move.version)", "_point(cfg, previous_of(alias), move.previous)"),
        ("_finish(cfg, alias, move)", "_point(cfg, alias, move.version), _finish(cfg, alias, move)"),
    ),
    "a move is not written down": bug(
        "promote", moves, "move_alias",
        ("versions.set_model_tag(cfg, _move_tag(alias), move.model_dump_json())", "pass"),
    ),
    "nobody finishes a move that broke off": bug("promote", promote, "_my_turn", ("settle(cfg, config.alias)", "pass")),
    "a move that broke off late is forgotten": bug(
        "promote", moves, "settle", ("versions.get_alias(cfg, alias) == move.version", "False")
    ),
    "who lost its turn moves the alias": bug(
        "promote", tickets, "Tickets.check", ('found.tags.get(STATE) != "open"', "False")
    ),
    "nobody waits for its turn": bug("promote", tickets, "Tickets.wait", ("self._open_below(number)", "[]")),
}  # fmt: skip
