"""What the driver sees of a running training: a progress line, history, skipped steps, pictures, and who listens."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm

from aai import storage
from pipelines.engine.cluster import native_stderr_held

log = logging.getLogger(__name__)

HISTORY = "history.jsonl"
SKIPPED = "skipped.jsonl"
"""Steps that were not taken, with the clips that are suspected."""
SAMPLES = "samples"
"""Folder of the pictures that a task makes with its evaluations, one file each."""
SHOWN_CLIPS = 5
POLL_S = 0.5
RETRY_S, PATIENCE_S = 15.0, 600.0
"""When a training has ended: between two tries to write its figures, and for how long."""

Entry = dict[str, Any]
OnLog = Callable[[int, dict[str, float]], None]
OnPicture = Callable[[int, bytes], None]
OnCheckpoint = Callable[[], None]


def history(out: str) -> list[Entry]:
    """The entries of history.jsonl by step; empty before the first."""
    return _read(out, HISTORY)


def samples(out: str) -> list[tuple[int, bytes]]:
    """(step, PNG file) of the pictures made so far, by step."""
    files = sorted(storage.list_files(storage.join(out, SAMPLES), ".png"))
    return [(int(file.rsplit("-", 1)[1].removesuffix(".png")), storage.read_bytes(file)) for file in files]


class Follower:
    """Takes what the ranks have posted on the board, shows it and writes it down."""

    def __init__(
        self,
        name: str,
        board: Any,
        out: str,
        bar: Any,
        on_log: OnLog,
        on_picture: OnPicture,
        on_checkpoint: OnCheckpoint = lambda: None,
    ) -> None:
        """Entries of earlier, interrupted calls are kept."""
        self.name, self.board, self.out, self.bar = name, board, out, bar
        self.on_log, self.on_picture, self.on_checkpoint = on_log, on_picture, on_checkpoint
        self.entries = {_key(entry): entry for entry in history(out)}
        self.skipped = {(entry["step"], entry["rank"]): entry for entry in _read(out, SKIPPED)}
        self._unwritten: set[str] = set()
        self._unheard: list[Entry] = []
        self._pictures: list[Entry] = []

    def poll(self) -> None:
        """Takes what is new. What could not be written, because storage was away, is written by a later call."""
        for entry in ray.get(self.board.take.remote()):
            if "clips" in entry:
                self._skip(entry)
            elif "picture" in entry:
                self._pictures.append(entry)
            elif "checkpoint" in entry:
                self.on_checkpoint()
            else:
                self._log(entry)
        for file, entries in ((HISTORY, self.entries), (SKIPPED, self.skipped)):
            if file in self._unwritten:
                lines = [json.dumps(entries[key]) for key in sorted(entries)]
                storage.write_bytes(storage.join(self.out, file), ("\n".join(lines) + "\n").encode())
                self._unwritten.remove(file)
        while self._pictures:
            step, png = int(self._pictures[0]["step"]), self._pictures[0]["picture"]
            storage.write_bytes(storage.join(self.out, SAMPLES, f"step-{step:07d}.png"), png)
            self._pictures.pop(0)
            self.on_picture(step, png)
        while self._unheard:  # the history has an entry before anybody hears of it, and ends the run by it
            entry = self._unheard.pop(0)
            self.on_log(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})

    def _skip(self, entry: Entry) -> None:
        clips = entry["clips"]
        some = ", ".join(clips[:SHOWN_CLIPS]) or "(not named)"
        more = f" and {len(clips) - SHOWN_CLIPS} more" if len(clips) > SHOWN_CLIPS else ""
        log.warning("%s: step %d was left out, not finite: clips %s%s", self.name, entry["step"], some, more)
        self.skipped[entry["step"], entry["rank"]] = entry
        self._unwritten.add(SKIPPED)

    def _log(self, entry: Entry) -> None:
        # After a restart steps come again: the newer entry counts.
        self.entries[_key(entry)] = entry
        self._unwritten.add(HISTORY)
        self.bar.n = int(entry["step"])
        if "loss" in entry:
            self.bar.set_postfix(loss=f"{entry['loss']:.3f}", refresh=False)
        self.bar.refresh()
        self._unheard.append(entry)


@contextmanager
def following(
    name: str,
    board: Any,
    out: str,
    steps: int,
    on_log: OnLog,
    on_picture: OnPicture = lambda step, png: None,
    on_checkpoint: OnCheckpoint = lambda: None,
) -> Iterator[None]:
    """While the body runs, a thread follows the training; what is left at its end is taken then.

    on_checkpoint is called when one is in the run's storage.
    """
    stop = threading.Event()
    with (
        native_stderr_held() as terminal,
        tqdm(total=steps, desc=name, unit="step", mininterval=1.0, file=terminal) as bar,
    ):
        follower = Follower(name, board, out, bar, on_log, on_picture, on_checkpoint)

        def watch() -> None:
            told = False
            while not stop.wait(POLL_S):
                try:
                    follower.poll()
                    told = False
                except Exception as error:  # storage may be away for a while; the training goes on
                    if not told:
                        log.warning("%s: figures cannot be written to %s for now (%s)", name, out, error)
                    told = True

        thread = threading.Thread(target=watch, name="training-progress", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            stop.set()
            thread.join()
            with contextlib.suppress(Exception):  # what went wrong before must not be hidden
                follower.poll()
            raise
        stop.set()
        thread.join()
        _finish(follower)


def _finish(follower: Follower) -> None:
    """Takes what is left; storage that is away is waited for."""
    gives_up_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            follower.poll()
            return
        except Exception as error:
            if time.monotonic() > gives_up_s:
                raise
            log.warning("%s: figures cannot be written to %s for now (%s)", follower.name, follower.out, error)
            time.sleep(RETRY_S)


def _read(out: str, name: str) -> list[Entry]:
    where = storage.join(out, name)
    lines = storage.read_bytes(where).decode().splitlines() if storage.exists(where) else []
    return [json.loads(line) for line in lines]


def _key(entry: Entry) -> tuple[int, bool]:
    """A step may have two entries: training, then validation."""
    return int(entry["step"]), "learning_rate" not in entry
