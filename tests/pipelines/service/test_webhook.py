"""Deliveries of a registry's webhook: what MLflow signed makes painters look, and nothing else does."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from pipelines.service.keys import Keys
from pipelines.service.webhook import AGE_S, AT_ONCE, MAX_BYTES, signature
from tests.pipelines.service.test_http import DECODERS, LIMITS, Echo, build_http, code
from tests.pipelines.test_serve import WEBHOOK_SECRET as SECRET

BODY = b'{"entity": "model_version_alias", "action": "created", "data": {"name": "toy", "alias": "champion"}}'


def signed(body: bytes = BODY, secret: str = SECRET, age_s: float = 0, **changes: str) -> dict[str, str]:
    """The headers of a delivery as MLflow sends them; changes: made after it was signed, empty = left out."""
    told = {"delivery-id": "5e9c-1", "timestamp": str(int(time.time() - age_s))}
    told["signature"] = signature(secret, told["delivery-id"], told["timestamp"], body)
    told |= {name.replace("_", "-"): value for name, value in changes.items()}
    return {f"X-MLflow-{name}": value for name, value in told.items() if value}


def deliver(
    backend: Echo, headers: dict[str, str], body: Any = BODY, path: str = "/v1/registry", count: int = 1, **app: Any
) -> list[httpx.Response]:
    """Deliveries at the same time. app: keys, secret, root_path."""
    secret, root = app.get("secret", SECRET), app.get("root_path", "")

    async def send() -> list[httpx.Response]:
        http = build_http(backend, LIMITS, app.get("keys"), DECODERS, secret)
        transport = httpx.ASGITransport(http, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            bodies = [body() if callable(body) else body for _ in range(count)]
            return list(await asyncio.gather(*(client.post(root + path, content=b, headers=headers) for b in bodies)))

    return asyncio.run(send())


def test_the_signature_is_that_of_mlflow() -> None:
    """By mlflow.webhooks.delivery._generate_hmac_signature of MLflow 3.17.2."""
    assert signature("s3cret", "5e9c-1", "1764409999", b'{"a": 1}') == "v1,+8DlO1KnQvGCO5JYXtbOgU4tqAuBXdWQh5XiHeIrppw="


@pytest.mark.parametrize("root_path", ["", "/aai", "/v1"])
def test_what_is_signed_needs_no_key_and_makes_painters_look(root_path: str) -> None:
    """Also below a prefix, and where a browser would be sent away; what it says is not read."""
    for keys in (None, Keys(key="secret")):
        backend = Echo()
        for body, more in ((BODY, {}), (b"", {"Origin": "https://mlflow.example"}), (b"\xff" * MAX_BYTES, {})):
            (answer,) = deliver(backend, signed(body) | more, body, keys=keys, root_path=root_path)
            assert (answer.status_code, answer.json()) == (202, {"status": "accepted"})
        assert backend.moves == 3


@pytest.mark.parametrize(
    ("told", "refused"),
    [
        ({"signature": ""}, (401, "bad_signature")),
        ({"secret": "another"}, (401, "bad_signature")),
        ({"body": BODY + b" "}, (401, "bad_signature")),
        ({"delivery_id": "5e9c-2"}, (401, "bad_signature")),
        ({"signature": "v1,\u00e9"}, (401, "bad_signature")),
        ({"age_s": AGE_S + 5}, (401, "stale_delivery")),
        ({"age_s": -AGE_S - 60}, (401, "stale_delivery")),
        ({"timestamp": ""}, (400, "bad_delivery")),
        ({"timestamp": "9" * 5000}, (400, "bad_delivery")),
        ({"timestamp": "\u0661"}, (400, "bad_delivery")),
        ({"timestamp": "-1"}, (400, "bad_delivery")),
        ({"delivery_id": ""}, (400, "bad_delivery")),
        ({"delivery_id": "5e9c.1764409999"}, (400, "bad_delivery")),  # parts the signed words elsewhere
        ({"timestamp": "", "signature": "", "delivery_id": ""}, (401, "bad_signature")),
    ],
)
@pytest.mark.parametrize("keys", [None, Keys(key="secret")])
def test_what_is_not_signed_now_is_refused_and_nobody_looks(
    told: dict[str, Any], refused: tuple[int, str], keys: Keys | None
) -> None:
    backend = Echo()
    sent: Any = [(name, value.encode()) for name, value in signed(**told).items()] + [("X-API-Key", b"secret")]
    (answer,) = deliver(backend, sent, keys=keys)
    assert (code(answer), backend.moves) == (refused, 0)
    assert SECRET not in answer.text


def test_a_time_that_was_changed_is_no_longer_signed() -> None:
    backend = Echo()
    late = signed(timestamp=str(int(time.time()) - 10))
    assert (code(deliver(backend, late)[0]), backend.moves) == ((401, "bad_signature"), 0)


def test_a_delivery_that_is_too_large_is_refused_before_it_is_there() -> None:
    backend, sent = Echo(), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 10_000
            yield bytes(10_000)

    large = bytes(MAX_BYTES + 1)
    assert code(deliver(backend, signed(large), large)[0]) == (413, "upload_too_large")
    assert code(deliver(backend, signed(), endless)[0]) == (413, "upload_too_large")
    assert sent <= MAX_BYTES + 10_000
    sent = 0
    assert code(deliver(backend, signed(age_s=9999), endless)[0]) == (401, "stale_delivery")
    assert (sent, backend.moves) == (0, 0)


def test_only_so_many_are_received_at_once() -> None:
    """Anybody may begin to send one."""
    backend = Echo()

    async def slow() -> AsyncIterator[bytes]:
        yield BODY[:10]
        await asyncio.sleep(0.3)
        yield BODY[10:]

    answers = deliver(backend, signed(), slow, count=AT_ONCE + 2)
    assert [answer.status_code for answer in answers] == [202] * AT_ONCE + [429] * 2
    assert (code(answers[-1])[1], answers[-1].headers["retry-after"]) == ("too_many_uploads", "2")


def test_without_a_secret_there_is_no_webhook() -> None:
    for keys in (None, Keys(key="secret")):
        backend = Echo()
        (answer,) = deliver(backend, signed(), keys=keys, secret=None)
        assert (code(answer), backend.moves) == ((404, "http_404"), 0)
        assert "AAI_WEBHOOK_SECRET" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/v1/registry/", "/v1/Registry", "//v1/registry", "/v1/registry/../edit", "/v1//registry", "/v1/edit"]
)
def test_no_other_path_goes_without_a_key(path: str) -> None:
    backend = Echo()
    assert deliver(backend, signed(), path=path, keys=Keys(key="secret"))[0].status_code in (401, 404, 405)
    page = {"Sec-Fetch-Site": "cross-site"}
    assert deliver(backend, signed() | page, path=path)[0].status_code in (403, 404)
    assert (backend.moves, backend.calls) == (0, [])
