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
_SIGNED = "Standard base64 of HMAC-SHA256 over ID.TIMESTAMP.BODY, after `v1,`"
DELIVERY: dict[str, Any] = {
    "status_code": 202,
    "responses": {
        **{status: REFUSALS[status] for status in (403, 405, 408, 429, 500)},
        202: {"description": "Painters were told to look at the alias", **_STATE},
        400: {**REFUSALS[400], "description": "The delivery's id or time cannot be read, or its body ended early"},
        401: {**REFUSALS[401], "description": "Signature missing or wrong, or the delivery's time is not now"},
        404: {**REFUSALS[404], "description": "The service has no secret, or follows no alias"},
        413: {**REFUSALS[413], "description": "Over 64 KiB"},
        503: {**REFUSALS[503], "description": "Painters cannot be told now; Retry-After says when to come back"},
    },
    "dependencies": [
        Security(
            APIKeyHeader(name="X-MLflow-Signature", auto_error=False, scheme_name="Signature", description=_SIGNED)
        )
    ],
    "openapi_extra": {
        "parameters": [
            {"name": "X-MLflow-Delivery-Id", "in": "header", "required": True, "schema": {"type": "string"}},
            {"name": "X-MLflow-Timestamp", "in": "header", "required": True, "schema": {"type": "integer"}},
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}},
    },
}
"""How MLflow's webhook is told; `Webhook` looks at it."""
