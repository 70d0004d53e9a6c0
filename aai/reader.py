"""Feeds a training: seeded batches of a FeatureTable for one of many ranks, read ahead on threads."""

import copy
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from aai import storage
from aai.aligned import AlignedCache
from aai.errors import UserError
from aai.features import ARRAYS, FeatureManifest, arrays_of, open_table, read_group, rows_of, tensor_of

Batch = dict[str, Any]
READY_BATCHES = 4
"""Batches that are made before they are asked for."""
INDEX_THREADS = 16
"""On S3 nearly all the time of opening files is waiting."""


class FeatureReader:
    """Endless seeded batches of one split for one rank.

    Each epoch the row groups are put in a random order and cut into equal, consecutive parts, one for each rank: all
    ranks take the same number of steps, and no row is decoded twice. A rank shuffles its part within windows of whole
    row groups, and reads the next window while it hands out this one. The batch of a step depends on the seed, the
    step, the number of ranks and `shuffle_clips` alone: a resumed run sees the same clips.
    """

    def __init__(
        self,
        uri: str,
        split: str,
        batch_size: int,
        clip_samples: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        columns: Sequence[str] = ARRAYS,
        shuffle_clips: int = 2048,
        threads: int = 2,
        cache: AlignedCache | None = None,
        pictures_only: bool = False,
    ) -> None:
        """batch_size: clips per step of this rank; clip_samples: length sounds are padded or cut to; shuffle_clips:
        least size of a window, of which two are in memory; cache: where the column `aligned` is; pictures_only: without
        clips that have no picture.

        Raises UserError when the table is not there, is mixed, or has fewer rows in the split than one step takes.
        """
        self.manifest = FeatureManifest.read(uri)
        self.batch_size, self.clip_samples, self.columns = batch_size, clip_samples, tuple(columns)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self.split, self.shuffle_clips, self.threads, self.cache = split, shuffle_clips, threads, cache
        self.pictures_only = pictures_only
        self.groups = self._index(uri)
        self.num_rows = sum(len(rows) for _, _, rows in self.groups)
        self.steps_per_epoch = self.num_rows // (batch_size * world_size)
        if self.steps_per_epoch == 0:
            raise UserError(
                "fit.batch_size",
                batch_size * world_size,
                f"is more than the {self.num_rows} rows of split {split!r}{' with a picture' * pictures_only}",
                "lower it, or featurize more clips",
            )

    def of_rank(self, rank: int) -> "FeatureReader":
        """The reader of another rank; what both know of the table is read once."""
        other = copy.copy(self)
        other.rank = rank
        return other

    def _index(self, uri: str) -> list[tuple[str, int, np.ndarray]]:
        """(file, row group, its rows of the split) for every row group with such rows, in table order."""
        files = storage.list_files(uri, ".parquet")
        groups: list[tuple[str, int, np.ndarray]] = []
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            for found in pool.map(self._index_file, files):
                groups += found
        return groups

    def _index_file(self, file: str) -> list[tuple[str, int, np.ndarray]]:
        table = open_table(file, self.manifest)
        groups = []
        for number in range(table.num_row_groups):
            rows = np.flatnonzero(rows_of(table, number, self.split, self.pictures_only))
            if len(rows):
                groups.append((file, number, rows))
        return groups

    def order(self, epoch: int) -> list[np.ndarray]:
        """This rank's rows of an epoch, window by window: int64 [W, 2] of (group, position within its rows)."""
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.groups))
        sizes = np.array([len(self.groups[group][2]) for group in shuffled])
        ends = np.cumsum(sizes)
        share = self.steps_per_epoch * self.batch_size
        first, last = self.rank * share, (self.rank + 1) * share
        rng = np.random.default_rng([self.seed, epoch, 1 + self.rank])
        windows: list[np.ndarray] = []
        parts: list[np.ndarray] = []
        for group, size, end in zip(shuffled, sizes, ends, strict=True):
            low, high = max(first, end - size), min(last, end)
            if low >= high:
                continue  # another rank's
            position = np.arange(low, high) - (end - size)
            parts.append(np.stack([np.full(len(position), group), position], axis=1))
            if sum(len(part) for part in parts) >= self.shuffle_clips or high == last:
                windows.append(rng.permutation(np.concatenate(parts), axis=0))
                parts = []
        return windows

    def batches(self, first_step: int = 0) -> Iterator[Batch]:
        """The batch of every step from `first_step` on (from 0), without end.

        Tensors audio float32 [B, S], image_features [B, K, D], text_features [B, T, D], latents [B, C, h, w], aligned
        [B, D] (as chosen by `columns`), caption_id and clip_hash int64 [B], has_picture bool [B], and the lists of
        texts clip_id and caption.
        """
        with ThreadPoolExecutor(self.threads) as pool:
            windows = self._windows(first_step)
            following = self._start(pool, next(windows))
            rows: list[tuple[Batch, int]] = []
            for window in windows:
                loading, following = following, self._start(pool, window)
                for part, row in loading:
                    rows.append((part.result(), row))
                    if len(rows) == self.batch_size:
                        yield self._batch(rows)
                        rows = []

    def _windows(self, first_step: int) -> Iterator[np.ndarray]:
        """The windows of all epochs from a step on; of the first one, what is left."""
        epoch, step = divmod(first_step, self.steps_per_epoch)
        passed = step * self.batch_size
        while True:
            for window in self.order(epoch):
                if passed < len(window):
                    yield window[passed:]
                passed = max(0, passed - len(window))
            epoch += 1

    def _start(self, pool: ThreadPoolExecutor, window: np.ndarray) -> list[tuple["Future[Batch]", int]]:
        """Begins to read a window's row groups: where each of its rows will be, (arrays, row in them)."""
        parts: dict[int, Future[Batch]] = {}
        begins: dict[int, int] = {}
        for group in dict.fromkeys(window[:, 0].tolist()):
            positions = window[window[:, 0] == group, 1]
            begins[group] = int(positions.min())
            parts[group] = pool.submit(self._read, group, begins[group], int(positions.max()) + 1)
        return [(parts[group], position - begins[group]) for group, position in window.tolist()]

    def _read(self, number: int, first: int, last: int) -> Batch:
        """Some rows of a row group as arrays."""
        file, group, rows = self.groups[number]
        names = ["clip_id", "caption", "content_hash", *self.columns]
        table = read_group(open_table(file, self.manifest), file, group, names, self.cache)
        wanted = rows[first:last]
        if wanted[-1] - wanted[0] + 1 == len(wanted):
            table = table.slice(wanted[0], len(wanted))  # nothing is copied
        else:
            table = table.take(pa.array(wanted))
        return arrays_of(table, self.manifest, self.clip_samples, self.columns)

    def _batch(self, rows: list[tuple[Batch, int]]) -> Batch:
        batch: Batch = {name: [arrays[name][row] for arrays, row in rows] for name in ("clip_id", "caption")}
        for name in (*self.columns, "caption_id", "clip_hash", "has_picture"):
            batch[name] = tensor_of(name, np.stack([arrays[name][row] for arrays, row in rows]))
        return batch


def joined(parts: Sequence[Iterator[Batch]]) -> Iterator[Batch]:
    """The batches of several ranks, step by step, as one: the first rows of all, then the second ones, and so on."""
    if len(parts) == 1:
        yield from parts[0]
        return
    for batches in zip(*parts, strict=True):
        whole: Batch = {}
        for name, first in batches[0].items():
            rows = [batch[name] for batch in batches]
            if isinstance(first, torch.Tensor):
                whole[name] = torch.stack(rows, dim=1).flatten(0, 1)
            else:
                whole[name] = list(itertools.chain(*zip(*rows, strict=True)))
        yield whole


def ranks_of(worker: int, workers: int, ranks: int) -> range:
    """The ranks whose clips one of `workers` takes: `ranks` are shared out evenly, none is without."""
    return range(worker * ranks // workers, (worker + 1) * ranks // workers)


def read_ahead(batches: Iterator[Batch], pin: bool = False, ready: int = READY_BATCHES) -> Iterator[Batch]:
    """The same batches, made on a thread of their own while the device computes.

    pin: in page-locked memory, from which a GPU copies while it computes. An error of `batches` is raised here.
    """
    line: queue.Queue[Batch | BaseException | None] = queue.Queue(ready)
    ended = threading.Event()

    def given_up() -> bool:
        return ended.is_set() or not threading.main_thread().is_alive()

    def put(item: Batch | BaseException | None) -> None:
        while not given_up():
            try:
                line.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(_pinned(batch) if pin else batch)
                if given_up():
                    return
            put(None)
        except BaseException as error:  # whatever it is, the training must hear of it
            put(error)

    # The process waits for it before it ends: a daemon thread that then is within torch would abort the process.
    threading.Thread(target=work, name="read-ahead", daemon=False).start()
    try:
        while (item := line.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()


def _pinned(batch: Batch) -> Batch:
    return {name: x.pin_memory() if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
