"""MLflow's webhook: the registry says that an alias moved, so that nobody has to ask it all the time.

Deliveries are signed as MLflow 3 signs them (mlflow.webhooks.delivery, after standardwebhooks.com): HMAC-SHA256 over
`id.timestamp.body`. What a delivery says is not read: whoever is told looks at the registry itself.
"""

import base64
import hmac
import os
import re
import time

from starlette.requests import ClientDisconnect, Request

from pipelines.service.guard import ApiError, busy

SECRET_VARIABLE = "AAI_WEBHOOK_SECRET"
MAX_BYTES = 64 * 1024
AGE_S = 300
"""How far a delivery's time may be from ours."""
AT_ONCE = 8
"""Bodies that are received at once: anybody may begin to send one."""
DELIVERY_ID, SECONDS = re.compile(r"[\w-]{1,64}", re.ASCII), re.compile(r"\d{1,12}", re.ASCII)
"""Without dots, which join what is signed: else one signature would fit several ways to part it."""


def webhook_secret() -> str | None:
    """The secret of the registry's webhook from the environment; never a setting, as the keys."""
    return os.environ.get(SECRET_VARIABLE) or None


def signature(secret: str, delivery_id: str, timestamp: str, body: bytes) -> str:
    """What MLflow writes into X-MLflow-Signature."""
    digest = hmac.digest(secret.encode(), f"{delivery_id}.{timestamp}.".encode() + body, "sha256")
    return "v1," + base64.b64encode(digest).decode()


class Webhook:
    """Tells what MLflow sent from what others did. secret: None = nothing is taken."""

    def __init__(self, secret: str | None, retry_after_s: int) -> None:
        self._secret, self._retry_after_s = secret, retry_after_s
        self._receiving = 0

    async def check(self, request: Request) -> None:
        """Raises ApiError unless this was signed with the secret, not long ago. Most is refused before it is read."""
        if self._secret is None:
            raise ApiError(404, "http_404", f"no webhook: set {SECRET_VARIABLE}, and let the service follow an alias")
        given, delivery_id, timestamp = (
            request.headers.get(f"x-mlflow-{name}", "") for name in ("signature", "delivery-id", "timestamp")
        )
        if not given:
            raise ApiError(401, "bad_signature", "X-MLflow-Signature is missing; give MLflow's webhook the secret")
        if not DELIVERY_ID.fullmatch(delivery_id) or not SECONDS.fullmatch(timestamp):
            rule = "X-MLflow-Delivery-Id must be 1 to 64 letters, digits, - and _; X-MLflow-Timestamp Unix seconds"
            raise ApiError(400, "bad_delivery", rule)
        if abs(time.time() - int(timestamp)) > AGE_S:
            rule = f"X-MLflow-Timestamp is more than {AGE_S} s from the clock here; compare the clocks"
            raise ApiError(401, "stale_delivery", rule)
        wanted = signature(self._secret, delivery_id, timestamp, await self._body(request))
        if not hmac.compare_digest(wanted.encode(), given.encode("latin-1")):
            raise ApiError(401, "bad_signature", f"X-MLflow-Signature is not by the secret in {SECRET_VARIABLE}")

    async def _body(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BYTES:
            raise _too_large()
        if self._receiving >= AT_ONCE:
            raise busy(429, "too_many_uploads", f"{AT_ONCE} deliveries are being received", self._retry_after_s)
        self._receiving += 1
        body = b""
        try:
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_BYTES:
                    raise _too_large()
        except ClientDisconnect:
            raise ApiError(400, "http_400", "the body ended early") from None
        finally:
            self._receiving -= 1
        return body


def _too_large() -> ApiError:
    rule = f"the delivery is over the limit of {MAX_BYTES} bytes"
    return ApiError(413, "upload_too_large", rule, {"Connection": "close"})
