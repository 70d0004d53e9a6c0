"""A store, a clock and processes within one Python process: what the protocol does under any order of events.

The code that runs is the product's own. Instead of S3 it reaches `SimulatedS3`, instead of threads and sleep the
greenlets and the clock of a `World`. At every request to the store another task may go on, a process may die, a write
may be under way for a while, arrive twice, or arrive after its process is gone. A seed says all of it.
"""

import contextlib
import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
from fsspec import AbstractFileSystem
from greenlet import getcurrent, greenlet

LATE_S = 14.0
"""No write arrives later than this after it was asked for: what the protocol takes for granted."""


FOREVER_S = float("inf")
REGISTRY = "registry"
"""Requests to MLflow: they are answered within some seconds, and are not sent twice."""


class Killed(BaseException):
    """Raised in every task of a process that died; no code of the product catches it."""


class Process:
    """A driver, or the workers of one."""

    def __init__(self, name: str, owner: str, skew_s: float) -> None:
        self.name, self.owner, self.skew_s = name, owner, skew_s
        self.is_dead = self.has_slept = False
        self.ops = 0
        self.dies_at: int | None = None
        """Number of the request before which it dies."""
        self.workers: list[Process] = []
        self.error: Exception | None = None
        """What its command ended with."""


class Task(greenlet):
    """A thread of a process."""

    def __init__(self, process: Process, run: Callable[[], Any], hub: greenlet) -> None:
        super().__init__(run, hub)
        self.process, self.wake_s = process, 0.0
        self.is_beat = self.is_asking = False


@dataclass
class Write:
    """A request that changes the store, on its way."""

    due_s: float
    apply: Callable[[], None]
    by: Process
    path: str
    task: Task | None
    again_s: float | None = None
    """When it arrives once more: its sender did not hear the answer, sent it again, and goes on after that one."""
    landed: bool = False
    error: Exception | None = None


class World:
    """The store's content, the clock, and all tasks."""

    def __init__(self, rng: random.Random, calm: bool = False, conditional: bool = True) -> None:
        """calm: nothing is late and nothing is sent twice. conditional: whether the store honours conditions."""
        self.rng, self.calm, self.conditional = rng, calm, conditional
        self.now_s = 1e6
        self.files: dict[str, tuple[bytes, str]] = {}
        self.tasks: list[Task] = []
        self.writes: list[Write] = []
        self.processes: list[Process] = []
        self.hub = getcurrent()
        self.version = 0
        self.requests = 0
        self.broken: list[str] = []
        """What must never be and was."""
        self.entered: str | None = None
        self.owner_of: Callable[[World], str | None] = lambda world: None
        """Whose the output is, by its lock."""
        self.out = ""

    # ------------------------------------------------------------ processes

    def process(self, name: str, owner: str | None = None) -> Process:
        """A new one; owner: the driver that workers belong to."""
        skew_s = 0.0 if self.calm else self.rng.choice((0.0, 0.0, -300.0, 300.0))
        self.processes.append(made := Process(name, owner or name, skew_s))
        return made

    def spawn(self, process: Process, run: Callable[[], Any], after_s: float = 0.0) -> Task:
        """A task that begins by and by."""

        def guarded() -> Any:
            with contextlib.suppress(Killed):
                if process.is_dead:
                    raise Killed
                run()

        task = Task(process, guarded, self.hub)
        task.wake_s = self.now_s + after_s
        self.tasks.append(task)
        return task

    def kill(self, process: Process) -> None:
        """SIGKILL: nothing that it would still do happens; what is on its way may arrive."""
        process.is_dead = True
        for worker in process.workers:  # they are other processes: these end a little later, if at all soon
            if self.rng.random() < 0.5:
                self.kill(worker)
        for task in self.tasks:
            if task.process is process:
                task.wake_s = self.now_s  # to be told

    # ------------------------------------------------------------ the schedule

    def run(self) -> None:
        """Until all tasks have ended and every write has arrived."""
        while self.tasks or self.writes:
            self.step()

    def step(self) -> None:
        """Whatever is next: of events of the same time, the choice is the generator's."""
        self.tasks = [task for task in self.tasks if not task.dead]
        times = [task.wake_s for task in self.tasks] + [write.due_s for write in self.writes]
        if not times:
            return
        self.now_s = max(self.now_s, min(times))
        ready: list[Task | Write] = [task for task in self.tasks if task.wake_s <= self.now_s]
        ready += [write for write in self.writes if write.due_s <= self.now_s]
        chosen = ready[self.rng.randrange(len(ready))] if len(ready) > 1 else ready[0]
        if isinstance(chosen, Write):
            self._land(chosen)
        else:
            chosen.switch()

    def pause(self, seconds: float) -> None:
        """The calling task sleeps."""
        task = self._me()
        if task is None:
            return
        task.wake_s = self.now_s + seconds
        self._yield(task)

    def _me(self) -> Task | None:
        task = getcurrent()
        return task if isinstance(task, Task) else None

    def _yield(self, task: Task) -> None:
        if not task.process.is_dead:
            self.hub.switch()
        if task.process.is_dead:
            raise Killed

    # ------------------------------------------------------------ requests

    def request(self, path: str, writes: bool = False) -> Process | None:
        """Called at every request: others may go on first, or this process dies."""
        task = self._me()
        if task is None:  # set-up and checks
            return None
        process = task.process
        if process.is_dead:
            raise Killed
        self.requests += 1
        process.ops += 1
        if process.ops == process.dies_at:
            self.kill(process)
            raise Killed
        may_sleep = task.is_beat or not (writes or path.endswith("/_lock"))  # else a write comes late after its check
        late_s = 0.0
        if may_sleep and not self.calm and self.rng.random() < (0.04 if task.is_beat else 0.01):
            late_s = self.rng.choice((5.0, 200.0))  # a thread that gets no core
            process.has_slept = True
            if self.rng.random() < 0.5:
                self._sleep(process, late_s)  # a machine that sleeps
        self.pause(late_s)
        if path.startswith(self.out) and not path.endswith("/_lock") and self.owner_of(self) == process.owner:
            self.entered = process.owner
        return process

    def _sleep(self, process: Process, seconds: float) -> None:
        """Nothing of a process goes on for a while; never between its asking for the lock and its write."""
        tasks = [task for task in self.tasks if task.process is process]
        if not any(task.is_asking for task in tasks):
            for task in tasks:
                task.wake_s = max(task.wake_s, self.now_s + seconds)

    def read(self, path: str, get: Callable[[], Any]) -> Any:
        """A request that changes nothing."""
        self.request(path)
        return get()

    def write(self, path: str, apply: Callable[[], None]) -> None:
        """A request that changes one file; returns when its sender has the answer."""
        task = self._me()
        if task is None:
            apply()
            return
        task.is_asking = True
        process = self.request(path, writes=True)
        task.is_asking = False
        write = Write(self.now_s, apply, process, path, task)
        most_s = LATE_S if self.conditional else 0.9
        if path == REGISTRY:
            most_s = 5.0
        if not self.calm and (luck := self.rng.random()) < 0.2:
            write.due_s += self.rng.random() * most_s
            if luck < 0.06 and path != REGISTRY:
                write.again_s = write.due_s + self.rng.random() * (self.now_s + most_s - write.due_s)
        self.writes.append(write)
        while not write.landed:
            task.wake_s = FOREVER_S
            self._yield(task)
        if write.error:
            raise write.error

    def _land(self, write: Write) -> None:
        self.writes.remove(write)
        if self.out and write.path.startswith(self.out) and not write.path.endswith("/_lock"):
            owner = self.owner_of(self)
            if owner is not None and owner == self.entered and owner != write.by.owner:
                self.broken.append(f"{write.by.name} wrote {write.path} while the output is {owner}'s")
        write.error = None
        try:
            write.apply()
        except Exception as error:
            write.error = error
        if write.again_s is not None:
            write.due_s, write.again_s = write.again_s, None
            self.writes.append(write)
            return
        write.landed = True
        if write.task is not None and not write.task.dead:
            write.task.wake_s = self.now_s

    # ------------------------------------------------------------ the store

    def get(self, path: str) -> tuple[bytes, str]:
        """Content and tag of a file. Raises FileNotFoundError."""
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def put(self, path: str, data: bytes, new: bool, over: str | None) -> None:
        """What a PUT does when it arrives."""
        now = self.files.get(path)
        if self.conditional and ((new and now is not None) or (over and (now is None or now[1] != over))):
            raise FileExistsError(path)
        self.version += 1
        self.files[path] = data, f'"{self.version}"'

    def under(self, path: str) -> list[str]:
        """The files of a folder, or the file."""
        return sorted(name for name in self.files if name == path or name.startswith(f"{path.rstrip('/')}/"))


WORLD: World
"""The one that requests go to."""


def about(path: str) -> dict[str, Any]:
    """What s3fs tells of a file. Raises FileNotFoundError."""
    data, tag = WORLD.get(path)
    return {"name": path, "size": len(data), "type": "file", "ETag": tag}


class SimulatedS3(AbstractFileSystem):  # type: ignore[misc]
    """What aai.storage asks of s3fs."""

    protocol = "s3"

    def pipe_file(self, path: str, value: bytes, **condition: str) -> None:
        new, over = "IfNoneMatch" in condition, condition.get("IfMatch")
        WORLD.write(path, lambda: WORLD.put(path, bytes(value), new, over))

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm(self, path: str, recursive: bool = False) -> None:
        for file in WORLD.under(path):
            WORLD.write(file, lambda file=file: WORLD.files.pop(file, None))  # type: ignore[misc]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        return bytes(WORLD.read(path, lambda: WORLD.get(path)[0])[start:end])

    def open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        return io.BytesIO(self.cat_file(path))

    def exists(self, path: str, **_: Any) -> bool:
        return bool(WORLD.read(path, lambda: WORLD.under(path)))

    def find(self, path: str, detail: bool = False, **_: Any) -> Any:
        found = WORLD.read(path, lambda: {name: about(name) for name in WORLD.under(path)})
        return found if detail else list(found)

    def call_s3(self, _method: str, Bucket: str, Prefix: str, **_: Any) -> dict[str, Any]:
        """`list_objects_v2` of one folder; all of it is one page."""
        listed = self.find(f"{Bucket}/{Prefix}", detail=True).values()
        return {"Contents": [{"Key": each["name"].split("/", 1)[1], "ETag": each["ETag"], "Size": each["size"]}
                             for each in listed]}  # fmt: skip

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return dict(WORLD.read(path, lambda: about(path)))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        return list(self.find(path, detail=True).values())


# ---------------------------------------------------------------- time and threads, as the product's modules see them


class Event:
    """threading.Event by the world's clock."""

    def __init__(self) -> None:
        self.is_on, self.waiting = False, [*()]

    def set(self) -> None:
        self.is_on = True
        for task in self.waiting:
            task.wake_s = WORLD.now_s

    def wait(self, timeout: float = FOREVER_S) -> bool:
        if not self.is_on:
            self.waiting.append(getcurrent())
            WORLD.pause(timeout)
            self.waiting.remove(getcurrent())
        return self.is_on


class Thread:
    """threading.Thread as a task of the process that starts it."""

    def __init__(self, target: Callable[..., Any], args: tuple[Any, ...] = (), **_: Any) -> None:
        self.run, self.ended = lambda: target(*args), Event()

    def start(self) -> None:
        me = getcurrent()

        def run() -> None:
            self.run()
            self.ended.set()

        WORLD.spawn(me.process, run).is_beat = True

    def join(self) -> None:
        self.ended.wait()


def _skewed() -> float:
    me = getcurrent()
    return WORLD.now_s + (me.process.skew_s if isinstance(me, Task) else 0.0)


TIME = SimpleNamespace(time=_skewed, monotonic=lambda: WORLD.now_s, sleep=lambda seconds: WORLD.pause(seconds))
THREADING = SimpleNamespace(Thread=Thread, Event=Event, current_thread=lambda: None, main_thread=lambda: THREADING,
                            ident=0)  # fmt: skip
SIGNAL = SimpleNamespace(pthread_kill=lambda *_: None)
"""A driver that lost its lease is not even stopped here: its writes must be refused."""


@contextlib.contextmanager
def entered(world: World) -> Iterator[World]:
    """While the body runs, s3:// is this world's."""
    global WORLD
    WORLD = world
    before = fsspec.get_filesystem_class("s3")
    fsspec.register_implementation("s3", SimulatedS3, clobber=True)
    try:
        yield world
    finally:
        for process in world.processes:
            world.kill(process)
        while world.tasks:
            world.step()
        fsspec.register_implementation("s3", before, clobber=True)
