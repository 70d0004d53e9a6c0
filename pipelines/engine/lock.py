"""One driver at a time writes an output folder; a second one is told who the first is.

On disk the kernel holds the lock (flock on OUT/_lock) and drops it with the process, however that ends. Under s3://,
and on a file system without locks, OUT/_lock is a lease: its holder refreshes it, and one that was not refreshed for
LEASE_S is taken over. Of two drivers that start at once the server's conditional write lets one through; where the
server ignores conditions, both write, wait SETTLE_S, and the one that is read back goes on.

Workers outlive a killed driver for a while. So whatever is written into the folder, by the driver or by a worker,
first looks whether OUT/_lock is still that driver's (`Fence`), and who takes a folder over waits until what was on its
way has arrived. docs/protocol.md has the whole of it.
"""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from aai import fencing, storage
from aai.errors import UserError

log = logging.getLogger(__name__)

LOCK = "_lock"
BEAT_S = 10.0
"""How often a lease is refreshed."""
LEASE_S = 60.0
"""How long after its last refresh a lease can be taken over."""
WATCH_BEATS = 4
"""How long it is watched before, in beats: two beats in a row may each arrive 14 s late, and are one apart."""
SETTLE_S = 1.0
"""How long a write that has no condition is given to be seen by the other driver."""
LATE_S = 1.0
"""On disk, how long a write of a killed driver's worker is given to be over; under s3:// 1.5 beats."""
LOOK_S = 0.05
"""How long who only looks whether a folder is locked may have a share of its lock."""
LOST = signal.SIGUSR1
"""What a driver sends itself when its lease was taken over."""
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
C = TypeVar("C")
Record = dict[str, Any]
"""What the file says of the holder: holder (unique), host, pid, started (UTC), beat (time of the last refresh, s)."""


def locked(run: Callable[[C], dict[str, Any]]) -> Callable[[C], dict[str, Any]]:
    """A verb's `run(config)` under the lock of `config.out`."""

    @wraps(run)
    def alone(config: C) -> dict[str, Any]:
        with output_lock(config.out):  # type: ignore[attr-defined]
            return run(config)

    return alone


@contextmanager
def output_lock(out: str) -> Iterator[None]:
    """While the body runs, no other driver gets the lock of the folder or s3:// prefix `out`. Raises UserError."""
    out = storage.absolute(out).rstrip("/")
    with ExitStack() as stack:
        if out.startswith("s3://") or not stack.enter_context(_kernel_lock(out)):
            stack.enter_context(_lease(out))
        yield


@dataclass(frozen=True)
class Fence:
    """Lets a driver's and its workers' writes through as long as the lock of `out` is that driver's."""

    out: str
    holder: str

    def __call__(self, uri: str) -> None:
        """See `aai.fencing.Guard`. Raises UserError when another driver took the folder over, or this one let it go."""
        where = storage.join(self.out, LOCK)
        if not uri.startswith(f"{self.out}/") or uri == where:
            return
        found = _surely_read(where)
        if found.get("holder") != self.holder:
            raise _busy(self.out, found, "was taken over by")


@dataclass(frozen=True)
class LockState:
    """What a lock says of the driver that holds it, or that ended without giving it back."""

    host: str
    pid: int
    started: str
    """UTC."""
    is_held: bool
    beat_age_s: float | None
    """How long ago a lease was refreshed, by both hosts' clocks; None where the kernel holds the lock."""


def holding(out: str) -> LockState | None:
    """Who holds the lock of a folder, without taking it; None where there is none."""
    where = storage.join(storage.absolute(out), LOCK)
    record = _read(where)
    if not record or "holder" not in record:
        return None
    age_s: float | None = max(0.0, time.time() - float(record["beat"]))
    held = None if where.startswith("s3://") else _is_locked(where)
    if held is None:
        held = cast(float, age_s) < LEASE_S
    else:
        age_s = None
    return LockState(str(record["host"]), int(record["pid"]), str(record["started"]), held, age_s)


def _is_locked(path: str) -> bool | None:
    """Whether a process has a file locked; None where the file system knows no locks.

    It is asked for a share, which is let go at once: a driver that begins in this very moment tries twice.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    finally:
        os.close(descriptor)
    return False


def is_empty(out: str) -> bool:
    """Whether a folder holds nothing but its lock."""
    return all(file.rsplit("/", 1)[1] == LOCK for file in storage.list_files(out))


def _record() -> Record:
    started = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    who = {"holder": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    return who | {"started": started, "beat": time.time()}


def _busy(out: str, record: Record | None, rule: str = "is being written by") -> UserError:
    who = "another process"
    if record and "holder" in record:
        who = f"process {record['pid']} on {record['host']} since {record['started']}"
    return UserError("out", out, f"{rule} {who}", "wait for its end, or give another folder")


def _tell_of_takeover(where: str, found: Record) -> None:
    log.warning("%s: process %s on %s has ended without giving it back", where, found.get("pid"), found.get("host"))


def _parsed(data: bytes) -> Record:
    try:
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


# ---------------------------------------------------------------- on disk


@contextmanager
def _kernel_lock(out: str) -> Iterator[bool]:
    """Yields False where the file system knows no locks."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError("out", out, "is a file", "give a folder")
    was_there, mine = folder.is_dir(), _record()
    try:
        descriptor, before = _locked_file(out, mine)
    except OSError as error:
        if error.errno in _READ_ONLY and was_there:
            yield True  # nobody can write here; a finished result can be read
        elif error.errno in _NO_LOCKS:
            yield False
        else:
            raise
        return
    try:
        if before:
            _tell_of_takeover(str(folder / LOCK), before)
            time.sleep(LATE_S)
        with fencing.guarded(Fence(out, mine["holder"])):
            yield True
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # before it is unlocked: it is still ours
        os.close(descriptor)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def _locked_file(out: str, mine: Record) -> tuple[int, Record]:
    """The descriptor of OUT/_lock, locked, with our record in it; and the record that a killed driver left there."""
    path = Path(out) / LOCK
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock_alone(descriptor)
            held = _parsed(os.pread(descriptor, 4096, 0))
            if os.fstat(descriptor).st_size and "holder" not in held:
                raise UserError("out", out, f"holds a file {LOCK} of something else", "choose another folder")
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(mine).encode(), 0)
                return descriptor, held
        except BlockingIOError as error:
            busy = _busy(out, _holder_of(descriptor))
            os.close(descriptor)
            raise busy from error
        except FileNotFoundError:
            pass
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _NO_LOCKS and not os.fstat(descriptor).st_size:
                path.unlink(missing_ok=True)  # a lease begins with no file
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and our locking: try the new one


def _lock_alone(descriptor: int) -> None:
    """Raises BlockingIOError when another process has the lock, but not for one that only looked (`holding`)."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOOK_S)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder_of(descriptor: int) -> Record:
    """What stands in a file that another process has locked; it may be about to write that."""
    for _ in range(20):
        if found := _parsed(os.pread(descriptor, 4096, 0)):
            break
        time.sleep(0.05)
    return found


# ---------------------------------------------------------------- by lease


@contextmanager
def _lease(out: str) -> Iterator[None]:
    where, mine = storage.join(out, LOCK), _record()
    _take(out, where, mine)
    ended = threading.Event()
    beat = threading.Thread(target=_refresh, args=(where, mine, ended), name="output-lock", daemon=True)
    with _stoppable(), fencing.guarded(Fence(out, mine["holder"])):
        beat.start()
        try:
            yield
        finally:
            ended.set()
            beat.join()
            _give_back(where, mine)


@contextmanager
def _stoppable() -> Iterator[None]:
    """While the body runs, LOST ends the main thread's work; SIGINT would not where a script started us with `&`."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets no other thread set a handler; the process then ends of the signal
        return
    before = signal.signal(LOST, stop)
    try:
        yield
    finally:
        signal.signal(LOST, before)


def _give_back(where: str, mine: Record) -> None:
    try:
        if (_read(where) or {}).get("holder") == mine["holder"]:
            storage.remove(where)
    except Exception as error:  # the lease runs out by itself; how the work ended must not be hidden by this
        log.warning("the lock %s could not be removed (%s)", where, error)


def _read(where: str) -> Record | None:
    try:
        return _parsed(storage.read_bytes(where))
    except FileNotFoundError:
        return None


def _surely_read(where: str) -> Record:
    """The record; {} where there is none for a while: some servers show a file that is written over as empty."""
    for wait_s in (0.0, 0.1, 0.5, 1.0):
        time.sleep(wait_s)
        if found := _read(where):
            return found
    return {}


def _take(out: str, where: str, mine: Record) -> None:
    """Writes our record; raises UserError when the lease is another's."""
    tag, found = storage.tag_of(where), _read(where)  # in this order: a tag never is of a later content than is read
    if found is not None and not _is_over(where, found):
        raise _busy(out, found)
    data = json.dumps(mine).encode()
    if found is not None:
        _written(where, data, over=tag)
        _tell_of_takeover(where, found)
        time.sleep(1.5 * BEAT_S)
    elif _written(where, data, new=True) and _written(where, data, new=True):  # only where conditions are ignored
        time.sleep(SETTLE_S)
    now = _read(where)
    if (now or {}).get("holder") != mine["holder"]:
        raise _busy(out, now)


def _written(where: str, data: bytes, new: bool = False, over: str | None = None) -> bool:
    try:
        storage.write_bytes(where, data, new, over)
    except FileExistsError:
        return False
    return True


def _is_over(where: str, found: Record) -> bool:
    """Whether a lease's holder is gone: by its clock, and as seen by ours, since clocks of two hosts may differ."""
    watch_s = WATCH_BEATS * BEAT_S
    if time.time() - found.get("beat", float("inf")) < LEASE_S - watch_s:
        return False
    time.sleep(watch_s)
    return _read(where) in (found, None)


def _refresh(where: str, mine: Record, ended: threading.Event) -> None:
    while not ended.wait(BEAT_S):
        try:
            tag, found = storage.tag_of(where), _surely_read(where)
            if found.get("holder") != mine["holder"]:
                log.error("%s was taken over by process %s on %s", where, found.get("pid"), found.get("host"))
                signal.pthread_kill(threading.main_thread().ident or 0, LOST)  # ends even a waiting call
                return
            _written(where, json.dumps(mine | {"beat": time.time()}).encode(), over=tag)  # else the next beat tells
        except Exception as error:  # the network may be away for a while; the lease is longer than a few beats
            log.warning("the lock %s could not be refreshed (%s)", where, error)
