"""Blocks of large remote files that stay on a node's disk while a run lasts: who reads them next fetches nothing."""

import logging
import os
import shutil
import stat
import tempfile
import time
import uuid
from functools import cached_property
from pathlib import Path

from aai.digest import digest
from pipelines.engine.cluster import is_connected

log = logging.getLogger(__name__)

FREE_SHARE = 0.1
"""Of the disk, which stays free whatever the limit is."""
UNFINISHED, STALE_S = ".part", 3600
"""A block that is being written, and after how long its writer is taken for dead."""


class KeptBlocks:
    """A folder of blocks that all processes of a run on this node share.

    What has not been used for longest goes first when it holds `limit_bytes`. A disk that is full or a folder that is
    somebody else's costs speed, never the run.
    """

    def __init__(self, run: str, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder_of(run), limit_bytes

    @cached_property
    def enabled(self) -> bool:
        """Whether there is a folder, made when it is first wanted."""
        return self.limit_bytes > 0 and _is_ours(self.folder)

    @property
    def in_use(self) -> bool:
        """Whether this process looked for a block, or kept one."""
        return bool(self.__dict__.get("enabled"))

    def get(self, name: str, size: int) -> bytes | None:
        """The block of a name, if it is here; `size` is what it must have."""
        if not self.enabled:
            return None
        try:
            data = (self.folder / name).read_bytes()
            os.utime(self.folder / name)
        except OSError:
            return None
        return data if len(data) == size else None

    def put(self, name: str, data: bytes) -> None:
        """Keeps a block, if there is room."""
        if not self.enabled:
            return
        unfinished = self.folder / f"{uuid.uuid4().hex}{UNFINISHED}"
        try:
            self._make_room(len(data))
            disk = shutil.disk_usage(self.folder)
            if disk.free - len(data) < FREE_SHARE * disk.total:
                return
            unfinished.write_bytes(data)
            unfinished.replace(self.folder / name)
        except OSError as error:
            log.debug("a block of %d bytes cannot be kept (%s)", len(data), error)
            unfinished.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        blocks = []
        for entry in os.scandir(self.folder):
            found = entry.stat()
            if entry.name.endswith(UNFINISHED) and found.st_mtime < time.time() - STALE_S:
                os.unlink(entry.path)
            else:
                blocks.append((found.st_mtime_ns, found.st_size, entry.path))
        held = sum(size for _, size, _ in blocks)
        for _, freed, path in sorted(blocks):
            if held + size <= self.limit_bytes:
                break
            Path(path).unlink(missing_ok=True)
            held -= freed


def folder_of(run: str) -> Path:
    """Where the blocks of a run lie on every node."""
    return Path(tempfile.gettempdir()) / f"aai-blocks-{os.getuid()}-{digest([run], 16)}"


def _is_ours(folder: Path) -> bool:
    """Makes the folder; whether it is one that nobody else can write to: what lies in it becomes training data."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        log.debug("no blocks are kept in %s (%s)", folder, error)
        return False
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    if not ours:
        log.warning("no blocks are kept in %s: it is another's, or others may write there; delete it", folder)
    return ours


def remove_kept(run: str) -> None:
    """Removes the blocks of a run on this machine, and on every node where Ray is connected."""
    _remove(run)
    if not is_connected():
        return
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    remove = ray.remote(num_cpus=0, max_retries=0)(_remove)
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in there]
    removals = [remove.options(scheduling_strategy=strategy).remote(run) for strategy in strategies]
    _, late = ray.wait(removals, num_returns=len(removals), timeout=30)
    if late:
        log.debug("blocks of files are left on %d of %d nodes, which do not answer", len(late), len(there))


def _remove(run: str) -> None:
    shutil.rmtree(folder_of(run), ignore_errors=True)
