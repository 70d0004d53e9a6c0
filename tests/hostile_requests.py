"""Whole HTTP requests that were made to break the service, as bytes, and what comes back when they are sent."""

import http.client
import json
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests import hostile
from tests.hostile import png, wav
from tests.hostile_files import PICTURE_KINDS, SOUND_KINDS, mutations, picture_bombs, sound_bombs

FIELDS = (
    "prompt",
    "negative_prompt",
    "seed",
    "steps",
    "guidance_scale",
    "reuse_steps",
    "num_images",
    "names",
    "window",
    "mixing",
    "denoise_strength",
    "sound_strength",
    "repaint",
    "mask_threshold",
    "fresh_noise",
    "nosuch",
)
VALUES = (
    b"",
    b"nan",
    b"inf",
    b"-inf",
    b"1e400",
    b"1e-400",
    b"9" * 5000,
    b"-1",
    b"0x10",
    b"1_000",
    b"0.5",
    b"null",
    b"true",
    "\u0663".encode(),
    "\u00b2".encode(),
    b"1\0",
    b"\0" * 100,
    b"[1]",
    b"{}",
    b"[" * 3000,
    b'{"$ref": "#"}',
    b"\xff\xfe",
    b"\xed\xa0\x80",
    "\U0001f415\u202e".encode() * 50,
    b"<sound>" * 60,
    b"<sound*1e309>",
    b"<sound*99>",
    b"<sound*.0001>",
    b"<sound*0." + b"0" * 400 + b"1>",
    b"<" * 500,
    b"<elsewhere>",
    b"${jndi:ldap://x}",
    b"../../etc/passwd",
    b"%s%n%x",
    b"{{7*7}}",
    b"a\r\nX-Injected: 1",
    b"'; DROP TABLE models; --",
    b"a,b,c,d,e,f,g,h,i",
    b"x" * 900_000,
    b"x" * 2_000_000,
)
NAMES = (
    b"",
    b"../../../../etc/passwd",
    b"..\\..\\boot.ini",
    b"/etc/shadow",
    b"a\0.wav",
    b"a" * 5000,
    b"\xff\xfe.wav",
    "\U0001f415.wav".encode(),
    b"CON",
    b"|rm -rf /",
    b"$(reboot).wav",
    b"a.wav; filename=b.wav",
    b'a\\".wav',
    b"a\tb",
    b"%2e%2e%2fetc",
    b".",
    b"~root",
    b"a.wav/",
    b"https://example.org/a.wav",
    b"file:///etc/passwd",
)

STATUSES = {0, 200, 400, 401, 404, 405, 408, 413, 422, 429, 503}
PROXY = b"Invalid HTTP request received."
"""What the proxy's HTTP parser says of bytes that are no request; they reach no application."""


@dataclass(frozen=True)
class Case:
    """A request: its bytes in pieces, which may be endless, and a pause between them."""

    name: str
    pieces: Iterable[bytes]
    pause_s: float = 0


@dataclass(frozen=True)
class Outcome:
    """What came back; status 0: the connection was closed without an answer."""

    name: str
    status: int
    kind: str
    body: bytes
    seconds: float


def part(name: bytes, value: bytes, filename: bytes | None = None) -> bytes:
    """A part of a form with the boundary `b`."""
    more = b"" if filename is None else b'; filename="' + filename + b'"'
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + value + b"\r\n"


AUDIO, IMAGE, END = part(b"audio", wav(), b"a"), part(b"image", png(), b"a"), b"--b--\r\n"
QUICK = part(b"steps", b"1")
FORM = b"multipart/form-data; boundary=b"


def request(key: bytes, line: bytes, body: bytes = b"", kind: bytes = FORM, *more: bytes, length: bool = True) -> bytes:
    """A whole request with the key. line: method and path; more: further lines of the head."""
    head = [line + b" HTTP/1.1", b"Host: localhost", b"X-API-Key: " + key, b"Content-Type: " + kind, *more]
    head += [b"Content-Length: %d" % len(body)] if length else []
    return b"\r\n".join([*head, b"Connection: close", b"", b""]) + body


def uploads(key: bytes, count: int, seed: int) -> Iterator[Case]:
    """Bombs and forged files, then mutated ones, as sound, picture and mask."""
    sounds = {name: data for name, (data, _) in hostile.SOUNDS.items()} | sound_bombs()
    pictures = {name: data for name, (data, _) in hostile.PICTURES.items()} | hostile.HARMLESS | picture_bombs()
    mutated = mutations(count, seed, SOUND_KINDS + PICTURE_KINDS)
    files = [("audio", *item) for item in sounds.items()] + [("image", *item) for item in pictures.items()]
    files += [("image" if kind in PICTURE_KINDS else "audio", kind, data) for kind, data in mutated]
    for number, (field, name, data) in enumerate(files):
        form = part(field.encode(), data, b"a") + QUICK
        if field == "image":
            form += AUDIO
        if field == "image" and number % 2:
            form += part(b"image", png(), b"a").replace(b'"image"', b'"mask"') + part(b"repaint", b"invert")
        path = b"/v1/edit" if field == "image" else b"/v1/generate"
        yield Case(f"{field}: {name}", [request(key, b"POST " + path, form + END)])


def fields(key: bytes) -> Iterator[Case]:
    """Every field with every value, and every name of a file."""
    for field in FIELDS:
        for value in VALUES:
            steps = b"" if field == "steps" else QUICK
            body = AUDIO + part(field.encode(), value) + steps + END
            yield Case(f"field {field}={value[:30]!r}", [request(key, b"POST /v1/generate", body)])
    for name in NAMES:
        body = AUDIO.replace(b'filename="a"', b'filename="' + name + b'"') + QUICK + END
        yield Case(f"file name {name[:30]!r}", [request(key, b"POST /v1/generate", body)])
        body = part(name, b"1") + AUDIO + QUICK + END
        yield Case(f"field name {name[:30]!r}", [request(key, b"POST /v1/generate", body)])


def forms(key: bytes) -> Iterator[Case]:
    """Multipart bodies that are none, and bodies of other types."""
    good = AUDIO + QUICK + END
    bodies = {
        "no end": AUDIO + QUICK,
        "twice": good + good,
        "no parts": END,
        "empty": b"",
        "zeros": bytes(10_000),
        "two sounds": AUDIO * 2 + END,
        "nine sounds": AUDIO * 9 + END,
        "two steps": AUDIO + QUICK * 2 + END,
        "thousands of files": part(b"audio", b"", b"a") * 5000 + END,
        "thousands of fields": AUDIO + QUICK * 5000 + END,
        "no disposition": b"--b\r\n\r\nhello\r\n" + good,
        "no name": good.replace(b' name="audio";', b""),
        "endless header": b"--b\r\nX: " + b"a" * 500_000 + b"\r\n\r\n1\r\n" + good,
        "thousands of headers": b"--b\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n1\r\n" + good,
        "nested": part(b"audio", b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n", b"a") + good,
        "deep name": part(b"a[" * 5000 + b"]" * 5000, b"1") + good,
        "bare newlines": good.replace(b"\r\n", b"\n"),
        "text for a file": part(b"audio", b"text") + END,
        "a file for text": AUDIO + part(b"steps", b"1", b"a") + END,
        "encoded": good.replace(b"\r\n\r\nRIFF", b"\r\nContent-Transfer-Encoding: base64\r\n\r\nRIFF"),
        "json": json.dumps({"audio": [1]}).encode(),
        "deep json": b"[" * 100_000,
        "form": b"audio=1&" * 5000,
    }
    kinds = (
        FORM,
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=other",
        b"multipart/form-data; boundary=" + b"b" * 3000,
        b"multipart/form-data; boundary=b; charset=nosuch",
        b"multipart/mixed; boundary=b",
        b"application/json",
        b"application/x-www-form-urlencoded",
        b"text/plain",
        b"",
        b"\xff",
    )
    for name, body in bodies.items():
        for kind in kinds if name in ("json", "form", "no end", "deep json") else kinds[:1]:
            yield Case(f"form: {name} as {kind[:40]!r}", [request(key, b"POST /v1/generate", body, kind)])
    for kind in kinds[1:]:
        yield Case(f"form as {kind[:40]!r}", [request(key, b"POST /v1/edit", AUDIO + IMAGE + QUICK + END, kind)])


def large(key: bytes, size: int = 2**30) -> Iterator[Case]:
    """A gigabyte: declared, streamed under a smaller declaration's name, and in chunks without one."""
    head = part(b"audio", b"", b"a")[:-2]
    for path in (b"POST /v1/generate", b"POST /v1/edit", b"POST /v1/stylize"):
        start = request(key, path, b"", FORM, b"Content-Length: %d" % size, length=False) + head
        yield Case("a gigabyte, declared", _streamed(start, bytes(2**20), size))
        start = request(key, path, b"", FORM, b"Transfer-Encoding: chunked", length=False)
        yield Case("a gigabyte, in chunks", _streamed(start, b"100000\r\n" + bytes(2**20) + b"\r\n", size))
    start = request(key, b"POST /healthz", b"", FORM, b"Transfer-Encoding: chunked", length=False)
    yield Case("a gigabyte for health", _streamed(start, b"100000\r\n" + bytes(2**20) + b"\r\n", size))
    start = request(b"wrong", b"POST /v1/edit", b"", FORM, b"Transfer-Encoding: chunked", length=False)
    yield Case("a gigabyte without the key", _streamed(start, b"100000\r\n" + bytes(2**20) + b"\r\n", size))


def slow(key: bytes, count: int = 12) -> Iterator[Case]:
    """A head or a body that comes a byte a second."""
    body = request(key, b"POST /v1/generate", AUDIO + QUICK + END)
    for number in range(count):
        at = 60 if number % 4 == 0 else 400  # within the head, or the body
        yield Case(f"slow from byte {at}", _streamed(body[:at], b"x", 9), pause_s=1)


def _streamed(start: bytes, piece: bytes, size: int) -> Iterator[bytes]:
    yield start
    for _ in range(size // len(piece)):
        yield piece


def send(address: tuple[str, int], case: Case, timeout_s: float = 60) -> Outcome:
    """Sends a request until it is answered, and reads the answer."""
    begin = time.monotonic()
    link = socket.create_connection(address, timeout=timeout_s)
    with link:
        try:
            for piece in case.pieces:
                link.sendall(piece)
                time.sleep(case.pause_s)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was answered before it was read
        try:
            if case.name.startswith(("raw", "slow from byte 60")):  # no whole head: nobody answers that
                link.settimeout(3)
            answer = http.client.HTTPResponse(link)
            answer.begin()
            kind, body = answer.headers.get("content-type", ""), answer.read(2**24)
            return Outcome(case.name, answer.status, kind, body, time.monotonic() - begin)
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            return Outcome(case.name, 0, type(error).__name__, b"", time.monotonic() - begin)


def attack(address: tuple[str, int], given: list[Case], clients: int = 6) -> list[Outcome]:
    """Sends them all, some at a time."""
    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(lambda case: send(address, case), given))


def is_ours(outcome: Outcome) -> bool:
    """Whether a refusal has our JSON, or is the proxy's of what is no HTTP."""
    if outcome.status == 400 and outcome.body == PROXY:
        return True
    if outcome.name.startswith("method b'HEAD'") and not outcome.body:
        return True
    try:
        return set(json.loads(outcome.body)["error"]) == {"code", "message"}
    except (ValueError, KeyError, TypeError):
        return False


def wrong(outcomes: list[Outcome]) -> list[tuple[str, int, bytes]]:
    """Those that may not be: a status that is not documented, a refusal in another form, silence after a whole head."""
    found = []
    for each in outcomes:
        silent = each.status == 0 and not each.name.startswith(("raw", "slow from byte 60"))
        if silent or each.status not in STATUSES or (each.status >= 400 and not is_ours(each)):
            found.append((each.name[:80], each.status, each.body[:200]))
    return found
