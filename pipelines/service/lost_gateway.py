"""A middleware in Serve's proxy: who asked a gateway whose process ended is told to come again.

Serve's proxy itself says nothing then, of which its web server makes a 500. It takes middlewares from the function that
the environment of its process names; `aai serve` sets that for the Ray that it starts.
"""

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipelines.service.guard import Limits, busy

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "pipelines.service.lost_gateway:middlewares"


class LostGateway:
    """ASGI middleware: a request to which nothing was said is answered with 503 and Retry-After."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one ASGI connection."""
        started = scope["type"] != "http"

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        await self._app(scope, receive, noted)
        if not started:
            error = busy(503, "no_gateway", "the gateway went away; try again", Limits().retry_after_s)
            await error.response()(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve calls in the process of its proxy."""
    return [Middleware(LostGateway)]
