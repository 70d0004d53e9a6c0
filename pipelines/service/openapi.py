"""What the OpenAPI document tells of the answers."""

from typing import Any

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPBearer

from aai.config import Config


class Fault(Config):
    """Why a request was refused."""

    code: str
    """Stable, for programs."""
    message: str
    """For people: the field, the rule, the remedy."""


class Refusal(Config):
    """Body of every answer that is not what was asked for."""

    error: Fault


_SAYS = {
    400: "The body is no form that can be read",
    401: "Key missing or wrong",
    403: "Without a key, another host than localhost was named, or another page asks",
    404: "No such path",
    405: "The path takes other methods; Allow names them",
    408: "The upload is too slow",
    413: "Request body over the limit",
    422: "A field, the sound or the picture is not usable; the message says why",
    429: "Queue full; Retry-After says when to come back",
    500: "A fault of the service; its log has the reason",
    503: "No painter or decoder, or no picture in time; Retry-After says when to come back",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": says, "model": Refusal} for status, says in _SAYS.items()
}
"""By status, for FastAPI's `responses`."""
_STATE = {"content": {"application/json": {"schema": {"type": "object"}}}}
HEALTHZ: dict[int | str, dict[str, Any]] = {
    **{status: REFUSALS[status] for status in (403, 405, 500)},
    200: {"description": "Model, bundle, painters and queue", **_STATE},
    503: {"description": "The same, while no painter is ready", **_STATE},
}
"""The same for /healthz."""
SEVERAL = {
    "type": "object",
    "required": ["seed", "model", "bundle", "images", "blocked"],
    "properties": {
        "seed": {"type": "integer"},
        "model": {"type": "string"},
        "bundle": {"type": "string"},
        "images": {"type": "array", "items": {"type": ["string", "null"], "contentEncoding": "base64"}},
        "blocked": {
            "type": "array",
            "items": {"type": "integer"},
            "description": "Places of pictures that the safety checker stopped",
        },
    },
}
"""Several pictures as JSON."""
KEYS = [
    Security(APIKeyHeader(name="X-API-Key", auto_error=False, description="The service's key")),
    Security(HTTPBearer(auto_error=False, description="The service's key")),
]
"""Either of them; `Guard` looks at it, these only tell it."""
