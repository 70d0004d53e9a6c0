"""Decoding in a child process that knows nothing but one file's bytes, and whose death costs only one clip of it.

Over the child's stdin and stdout go messages: a length (8 bytes) and a body. A request is JSON: `task`, `timeout_s`,
the task's arguments, and as `content` SENT, when the file's bytes are the next message, HELD, when the child has them
from the request before, or the size of a file of which it asks for ranges (two numbers, answered by the bytes). With
`still` the bytes of a picture follow. An
answer is an empty message, by which the child greets, too, and an Arrow stream of one row (`measure`), JSON (`probe`),
or a line of JSON and the numbers (`sound`, `still`).
"""

import json
import logging
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import pyarrow as pa

import aai
from aai.media.decode import decode_audio
from aai.media.limits import ClipError, DecodeConfig
from aai.media.measure import MEASURED_ROW, VIDEO, MeasuredRow, Shown, failed_row, measure_bytes
from aai.media.ranged import AskedRanges, Content, Ranges, hash_of
from aai.media.shots import Probe, probe_bytes, probe_from_json, probe_to_json
from aai.media.still import decode_still

log = logging.getLogger(__name__)

GRACE_S = 2.0
"""The kernel ends a clip this long after its soft limit, the parent after twice as long."""
DEATHS = ("TIMEOUT", "CRASHED")
"""What becomes of a clip whose child died."""
START_S = 120.0
"""A child must greet within this time; only a broken installation takes longer."""
_LENGTH, _RANGE = struct.Struct("<Q"), struct.Struct("<QQ")
SENT, HELD = "sent", "held"
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")  # no keys, no addresses


def _send(pipe: BinaryIO, *parts: bytes | memoryview) -> None:
    """One message, of which large parts need not be put together first."""
    pipe.write(_LENGTH.pack(sum(map(len, parts))))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: BinaryIO) -> bytes:
    """The next message; raises EOFError when the other side is gone."""
    head = pipe.read(_LENGTH.size)
    size = _LENGTH.unpack(head)[0] if len(head) == _LENGTH.size else None
    body = b"" if size is None else pipe.read(size)
    if size is None or len(body) < size:
        raise EOFError
    return body


# ---------------------------------------------------------------- the parent's side


class MediaChild:
    """`measure_bytes` and `probe_bytes` in a child: `with MediaChild(cfg) as child: row = child.measure(data, 0, 10)`.

    Use it from one thread. The bytes of a file are sent once for all its clips, if each is asked for with the same
    object; of Ranges, which may raise ClipError, a clip gets what it asks for. A child that died is replaced, and so is
    one that has done `cfg.recycle_after` requests. What it was killed at from outside (SIGKILL) is tried once more,
    unless it was abandoned.
    """

    def __init__(self, cfg: DecodeConfig) -> None:
        self.cfg = cfg
        self.process: subprocess.Popen[bytes] | None = None
        self.files = 0
        self.held: bytes | None = None
        self.abandoned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self) -> None:
        """Starts the child before the first file comes. Raises RuntimeError if none can be started."""
        if self.process is None:
            self._start()

    def abandon(self) -> None:
        """Ends it for good, from another thread too, whose call then raises at once: nobody waits for that file."""
        self.abandoned = True
        if (process := self.process) is not None:
            process.kill()

    def close(self) -> None:
        """Ends the child; the next request starts another."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()  # it holds nothing that could be lost
        process.wait()
        for pipe in (process.stdin, process.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except BrokenPipeError:  # the rest of a request that nobody will read
                continue

    def measure(
        self,
        data: Content,
        start_s: float | None,
        end_s: float | None,
        content_hash: str | None = None,
        shown: Shown = VIDEO,
    ) -> MeasuredRow:
        """The MEASURED_ROW of a clip, as `measure_bytes` gives it; a child's death becomes TIMEOUT or CRASHED.

        Raises RuntimeError if no child can be started at all.
        """
        content_hash = content_hash or hash_of(data)
        request = {"task": "measure", "start_s": start_s, "end_s": end_s, "content_hash": content_hash}
        request |= {"must_be_video": shown.must_be_video, "still": shown.still is not None}
        answer = self._ask(request, data, self.cfg.timeout_s, shown.still)
        if isinstance(answer, ClipError):
            stage = "decode" if answer.code in DEATHS else "read"
            return failed_row(content_hash, start_s, end_s, answer, stage, shown.still_hash)
        row: MeasuredRow = pa.ipc.open_stream(answer).read_all().to_pylist()[0]
        self._drop_if_full(row["code"])
        return row

    def probe(
        self, data: Content, shot_threshold: float | None, max_file_s: float, timeout_s: float
    ) -> Probe | ClipError:
        """What `probe_bytes` finds; a child's death becomes TIMEOUT or CRASHED. Raises as `measure` does."""
        request = {"task": "probe", "shot_threshold": shot_threshold, "max_file_s": max_file_s}
        answer = self._ask(request, data, timeout_s)
        if isinstance(answer, ClipError):
            return answer
        found = probe_from_json(json.loads(answer))
        if isinstance(found, ClipError):
            self._drop_if_full(found.code)
        return found

    def sound(self, data: bytes, max_duration_s: float, max_bytes: int, sample_rate_hz: int) -> np.ndarray:
        """`decode_audio` within `cfg.timeout_s`: float32 [S]. Raises ClipError as that does, and for a child's death.

        The codes of a death: TIMEOUT, CRASHED, OUT_OF_MEMORY, UNEXPECTED. Raises RuntimeError as `measure` does.
        """
        limits = {"max_duration_s": max_duration_s, "max_bytes": max_bytes, "sample_rate_hz": sample_rate_hz}
        return self._array({"task": "sound", **limits}, data)

    def still(self, data: bytes, max_pixels: int, backdrop: str | None = None) -> np.ndarray:
        """`decode_still` within `cfg.timeout_s`: uint8 [H, W, 3]. Raises as `sound` does."""
        return self._array({"task": "still", "max_pixels": max_pixels, "backdrop": backdrop}, data)

    def _array(self, request: dict[str, Any], data: bytes) -> np.ndarray:
        answer = self._ask(request, data, self.cfg.timeout_s)
        if isinstance(answer, ClipError):
            raise answer
        end = answer.index(b"\n")
        told = json.loads(answer[:end])
        if "code" in told:
            self._drop_if_full(told["code"])
            raise ClipError(**told)
        return np.frombuffer(answer, told["dtype"], offset=end + 1).reshape(told["shape"])

    def _drop_if_full(self, code: str | None) -> None:
        if code == "OUT_OF_MEMORY":
            self.close()  # what it could not free would be missing for the next file

    def _ask(
        self, request: dict[str, Any], data: Content, timeout_s: float, still: bytes | None = None
    ) -> bytes | ClipError:
        answer = self._ask_once(request, data, timeout_s, still)
        killed = isinstance(answer, ClipError) and answer.code == "CRASHED" and answer.transient
        if killed and not self.abandoned:
            return self._ask_once(request, data, timeout_s, still)  # killed from outside: that says nothing of the file
        return answer

    def _ask_once(
        self, request: dict[str, Any], data: Content, timeout_s: float, still: bytes | None
    ) -> bytes | ClipError:
        if self.process is None or self.process.poll() is not None or self.files >= self.cfg.recycle_after:
            self._start()
        self.files += 1
        content = HELD if data is self.held else SENT if isinstance(data, bytes) else len(data)
        self.held = data if request["task"] == "measure" and isinstance(data, bytes) else None
        body = json.dumps(request | {"timeout_s": timeout_s, "content": content}).encode()
        try:
            answer, overdue = self._within(
                timeout_s + 2 * GRACE_S, lambda stdin, stdout: _exchange(stdin, stdout, body, content, data, still)
            )
        except ClipError as error:  # of the ranges, for which the child now waits in vain
            self.close()
            return error
        return self._died(overdue, timeout_s) if answer is None else answer

    def _start(self) -> None:
        if (code := self._start_once()) == -signal.SIGKILL:
            code = self._start_once()  # killed from outside
        if code is not None:
            raise RuntimeError(f"the decoding child does not start (exit code {code}); its stderr says why")

    def _start_once(self) -> int | None:
        """Starts a child; its exit code if it ends before it greets."""
        self.close()
        paths = [str(Path(aai.__file__).parents[1]), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "aai.media.child", self.cfg.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is the parent's
        )
        if self.abandoned:  # while it started
            self.process.kill()
        self.files, self.held = 0, None
        greeting, _ = self._within(START_S, lambda _, stdout: _receive(stdout))
        if greeting is not None:
            return None
        code = self.process.wait()
        self.close()
        return code

    def _within(self, limit_s: float, talk: Callable[[BinaryIO, BinaryIO], bytes]) -> tuple[bytes | None, bool]:
        """(the child's answer or None if it is gone, whether it was killed here for being late)."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None  # noqa: PT018
        late = threading.Event()

        def kill() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(limit_s, kill)
        watchdog.start()
        try:
            return talk(process.stdin, process.stdout), False  # type: ignore[arg-type]
        except (BrokenPipeError, EOFError):
            process.wait()
            return None, late.is_set()
        finally:
            watchdog.cancel()
            watchdog.join()

    def _died(self, overdue: bool, timeout_s: float) -> ClipError:
        code = self.process.wait() if self.process else 0
        self.close()
        if overdue or code == -signal.SIGALRM:
            return ClipError("TIMEOUT", f"still not done after {timeout_s:g} s, and ended", transient=True)
        if code == -signal.SIGKILL:
            return ClipError("CRASHED", "the decoder was killed (SIGKILL), perhaps for want of memory", transient=True)
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return ClipError("CRASHED", f"the decoder crashed ({name})")


def _exchange(
    stdin: BinaryIO, stdout: BinaryIO, request: bytes, content: str | int, data: Content, still: bytes | None
) -> bytes:
    _send(stdin, request)
    if content == SENT:
        _send(stdin, cast(bytes, data))
    if still is not None:
        _send(stdin, still)
    while wanted := _receive(stdout):
        _send(stdin, cast(Ranges, data).read(*_RANGE.unpack(wanted)))
    return _receive(stdout)


# ---------------------------------------------------------------- the child's side


def _confine(cfg: DecodeConfig) -> None:
    memory = cfg.max_memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside native code
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})


def _to_bytes(row: MeasuredRow) -> bytes:
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_pylist([row], schema=MEASURED_ROW)
    with pa.ipc.new_stream(sink, MEASURED_ROW) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _numbers(request: dict[str, Any], data: bytes, cfg: DecodeConfig) -> tuple[bytes, memoryview]:
    """A sound or a picture, or why there is none; its dtype must not leave room for doubt on the other side."""
    task, timeout_s = request.pop("task"), request.pop("timeout_s")
    try:
        array = decode_audio(data, **request, timeout_s=timeout_s) if task == "sound" else _pixels(data, **request)
        head = json.dumps({"shape": array.shape, "dtype": array.dtype.str}).encode() + b"\n"
        return head, np.ascontiguousarray(array).data.cast("B")
    except ClipError as error:
        failure = error
    except MemoryError:
        failure = ClipError("OUT_OF_MEMORY", f"the file needs more than the limit of {cfg.max_memory_mb} MB")
    except Exception as error:  # of a library, over what nobody foresaw: it is this file's
        log.exception("unexpected error in a %s of %d bytes", task, len(data))
        failure = ClipError("UNEXPECTED", f"cannot be decoded ({type(error).__name__})")
    told = {"code": failure.code, "message": failure.message, "transient": failure.transient}
    return json.dumps(told).encode() + b"\n", memoryview(b"")


def _pixels(data: bytes, max_pixels: int, backdrop: str | None) -> np.ndarray:
    return np.asarray(decode_still(data, max_pixels, backdrop=backdrop))


def _answer(request: dict[str, Any], data: Content, cfg: DecodeConfig) -> tuple[bytes | memoryview, ...]:
    if request["task"] == "probe":
        arguments = request["shot_threshold"], request["max_file_s"]
        found = probe_bytes(data, *arguments, cfg, request["timeout_s"])
        return (json.dumps(probe_to_json(found)).encode(),)
    if request["task"] in ("sound", "still"):
        return _numbers(request, cast(bytes, data), cfg)
    start_s, end_s, content_hash = request["start_s"], request["end_s"], request["content_hash"]
    shown = Shown(request["must_be_video"], request["still"])
    try:
        return (_to_bytes(measure_bytes(data, start_s, end_s, cfg, content_hash, shown)),)
    except MemoryError:
        failure = ClipError("OUT_OF_MEMORY", f"the clip needs more than the limit of {cfg.max_memory_mb} MB")
    return (_to_bytes(failed_row(content_hash, start_s, end_s, failure, still_hash=shown.still_hash)),)


def _content(told: str | int, held: bytes, requests: BinaryIO, answers: BinaryIO) -> Content:
    """What a request is about."""

    def ask(start: int, end: int) -> bytes:
        _send(answers, _RANGE.pack(start, end))
        return _receive(requests)

    if isinstance(told, int):
        return AskedRanges(told, ask)
    return held if told == HELD else _receive(requests)


def main() -> None:
    """Answers requests on stdin until it closes; argv: a DecodeConfig as JSON."""
    cfg = DecodeConfig.parse(json.loads(sys.argv[1]))
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get among the answers
    _confine(cfg)
    warnings.simplefilter("ignore")  # each broken file would write its own into the log
    try:
        _send(answers, b"")
        held = b""
        while True:
            request = json.loads(_receive(requests))
            data = _content(request.pop("content"), held, requests, answers)
            if request.get("still") is not None:
                request["still"] = _receive(requests) if request["still"] else None
            held = data if request["task"] == "measure" and isinstance(data, bytes) else b""
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + GRACE_S)
            answer = _answer(request, data, cfg)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(answers, b"")
            _send(answers, *answer)
            del data, answer  # while it waits
    except (EOFError, BrokenPipeError):  # the parent is done, or gone
        os._exit(0)  # nothing is left to flush


if __name__ == "__main__":
    main()
