"""HTTP heads that no client sends: lengths that disagree, methods, paths and headers that are none."""

from collections.abc import Iterator

import numpy as np

from tests.hostile_requests import AUDIO, END, FORM, QUICK, Case, fields, forms, large, request, slow, uploads

GOOD = AUDIO + QUICK + END
SIZE, CHUNKED = b"Content-Length: %d" % len(GOOD), b"Transfer-Encoding: chunked"
CHUNK = b"%x\r\n" % len(GOOD) + GOOD + b"\r\n0\r\n\r\n"
HEADS = {
    "two lengths": (GOOD, SIZE, SIZE),
    "two other lengths": (GOOD, SIZE, b"Content-Length: 5"),
    "length and chunks": (CHUNK, SIZE, CHUNKED),
    "chunks and length": (CHUNK, CHUNKED, b"Content-Length: 4"),
    "chunked twice": (CHUNK, CHUNKED, CHUNKED),
    "no such encoding": (CHUNK, b"Transfer-Encoding: xchunked"),
    "encoding of two": (CHUNK, b"Transfer-Encoding: gzip, chunked"),
    "space before": (CHUNK, b"Transfer-Encoding : chunked"),
    "chunk of 2**64": (b"ffffffffffffffff\r\n" + GOOD, CHUNKED),
    "negative chunk": (b"-1\r\n" + GOOD, CHUNKED),
    "chunk extension": (b"1;" + b"a" * 100_000 + b"\r\nx\r\n0\r\n\r\n", CHUNKED),
    "no chunk": (b"xyz\r\n", CHUNKED),
    "trailers": (CHUNK[:-2] + b"X-API-Key: other\r\n\r\n", CHUNKED),
    "negative length": (GOOD, b"Content-Length: -1"),
    "length +5": (GOOD, b"Content-Length: +5"),
    "length in hex": (GOOD, b"Content-Length: 0x10"),
    "length of 2**70": (GOOD, b"Content-Length: 1180591620717411303424"),
    "length too short": (GOOD, b"Content-Length: 50"),
    "folded": (GOOD, SIZE, b"X-A: b\r\n c"),
    "no colon": (GOOD, SIZE, b"nonsense"),
    "NUL": (GOOD, SIZE, b"X-A: \0"),
    "two hosts": (GOOD, SIZE, b"Host: evil"),
    "two keys": (GOOD, SIZE, b"X-API-Key: wrong"),
    "expect": (GOOD, SIZE, b"Expect: 100-continue"),
    "a thousand headers": (GOOD, SIZE, *[b"X-%d: a" % i for i in range(1000)]),
    "long header": (GOOD, SIZE, b"X-A: " + b"a" * 60_000),
    "very long header": (GOOD, SIZE, b"X-A: " + b"a" * 2_000_000),
    "upgrade": (GOOD, SIZE, b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    "range": (GOOD, SIZE, b"Range: bytes=0-1,0-1,0-1"),
    "accept": (GOOD, SIZE, b"Accept: " + b"*/*;q=0.1," * 4000),
    "forwarded": (GOOD, SIZE, b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-Prefix: /../", b"Forwarded: host=evil"),
    "request id": (GOOD, SIZE, b"X-Request-ID: " + b"\xff" * 300),
    "multiplexed": (GOOD, SIZE, b"Serve-Multiplexed-Model-Id: ../x"),
}
"""Name -> a body, and the lines of a head."""
METHODS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"TRACE", b"CONNECT", b"FOO", b"post", b"A" * 3000)
PATHS = (
    b"/static/../../../../etc/passwd",
    b"/static/%2e%2e/%2e%2e/etc/passwd",
    b"/static/%00",
    b"/static/\xff",
    b"//evil/v1",
    b"/v1/../v1/generate",
    b"/V1/GENERATE",
    b"/v1/generate/",
    b"/%",
    b"/%zz",
    b"/" + b"a" * 10_000,
    b"/" + b"a" * 200_000,
    b"*",
    b"http://evil/v1/generate",
    b"/?" + b"a=b&" * 10_000,
    b"/healthz?" + b"[" * 3000,
    b"/v1",
    b"/v1/nosuch",
    b"/-/nosuch",
    b"/openapi.json/..",
    b"/static/index.html%20",
    b"/static/..\\http.py",
    b"/docs%0d%0aX-A:%20b",
    b"/static",
)
SOCKETED = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)
RAW = (
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET / HTTP/3.7\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\0\1",
    bytes(5000),
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.0\r\n\r\n",
    b"POST /v1/generate HTTP/1.0\r\n\r\n" + GOOD,
    b"\xff" * 3000,
    b"GET / HTTP/1.1\nHost: localhost\n\n",
    b"GET / HTTP/1.1\r\nHost: a\xff\r\n\r\n",
)


def oddities(key: bytes) -> Iterator[Case]:
    """All of them."""
    for name, (body, *more) in HEADS.items():
        yield Case(f"head: {name}", [request(key, b"POST /v1/generate", body, FORM, *more, length=False)])
    for method in METHODS:
        yield Case(f"method {method[:20]!r}", [request(key, method + b" /v1/generate", GOOD)])
        yield Case(f"method {method[:20]!r} of health", [request(key, method + b" /healthz")])
    for path in PATHS:
        yield Case(f"path {path[:40]!r}", [request(key, b"GET " + path)])
        yield Case(f"path {path[:40]!r} posted", [request(key, b"POST " + path, GOOD)])
    yield Case("websocket", [request(key, b"GET /v1/generate", b"", FORM, *SOCKETED, length=False)])
    for each in RAW:
        yield Case(f"raw {each[:30]!r}", [each])


def cases(key: str, mutated: int = 300, seed: int = 1) -> list[Case]:
    """All of them, in an order of chance."""
    secret = key.encode()
    found = [
        *uploads(secret, mutated, seed),
        *fields(secret),
        *forms(secret),
        *oddities(secret),
        *large(secret),
        *slow(secret),
    ]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]
