"""The OpenAPI document says of every refusal what it is, and of every picture."""

from typing import Any

from aai.sampling import PaintRequest
from pipelines.service.guard import ApiError
from pipelines.service.openapi import REFUSALS, Refusal
from tests.pipelines.service.test_http import ask, code

PAINTING = {"/v1/generate": "post", "/v1/edit": "post", "/v1/stylize": "post"}
METHODS = {"/healthz": "get", "/v1/registry": "post", **PAINTING}


def document() -> dict[str, Any]:
    """What the service serves."""
    return dict(ask("GET", "/openapi.json").json())


def test_every_refusal_is_told_with_its_body() -> None:
    api = document()
    body = ApiError(422, "code", "message").response().body
    assert Refusal.model_validate_json(bytes(body)).error.code == "code"
    for path, method in METHODS.items():
        told = api["paths"][path][method]["responses"]
        assert path not in PAINTING or told.keys() == {"200", *map(str, REFUSALS)}
        for status, answer in told.items():
            if status in ("200", "202") or (status == "503" and path == "/healthz"):
                continue
            assert answer["content"]["application/json"]["schema"]["$ref"].endswith("/Refusal"), (path, status)


def test_pictures_are_told_with_their_types_and_keys() -> None:
    told = document()["paths"]["/v1/generate"]["post"]
    kinds = told["responses"]["200"]["content"]
    assert kinds["image/png"]["schema"] == {"type": "string", "format": "binary"}
    assert set(kinds["application/json"]["schema"]["properties"]) == {"seed", "model", "bundle", "images", "blocked"}
    assert told["security"] == [{"APIKeyHeader": []}, {"HTTPBearer": []}]
    assert "security" not in document()["paths"]["/healthz"]["get"]


def test_openapi_lists_the_fields_and_their_bounds() -> None:
    api = ask("GET", "/openapi.json").json()
    assert set(api["paths"]) == METHODS.keys()
    form = api["components"]["schemas"]["RepaintForm"]
    assert set(form["required"]) == {"audio", "image"}
    assert form["properties"]["steps"]["maximum"] == 100
    assert set(form["properties"]) == {"audio", "image", "mask", *PaintRequest.model_fields}


def test_the_webhook_is_told_with_its_signature() -> None:
    told = document()["paths"]["/v1/registry"]["post"]
    assert told["security"] == [{"Signature": []}]
    assert {each["name"] for each in told["parameters"]} == {"X-MLflow-Delivery-Id", "X-MLflow-Timestamp"}
    assert told["responses"].keys() == {"202", *map(str, REFUSALS)} - {"422"}


def test_another_method_is_told_which_ones_there_are_and_no_path_is_guessed() -> None:
    response = ask("PUT", "/v1/edit")
    assert code(response) == (405, "http_405")
    assert response.headers["allow"] == "POST"
    for path in ("/v1/generate/", "/static"):  # a redirect would follow the Host header
        assert ask("GET", path).status_code == 404


def test_every_status_and_null_picture_is_told() -> None:
    assert set(REFUSALS) == {400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 503}
    told = document()["paths"]
    assert told["/healthz"]["get"]["responses"].keys() == {"200", "403", "405", "500", "503"}
    several = told["/v1/generate"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert several["properties"]["images"]["items"]["type"] == ["string", "null"]
    assert set(several["required"]) == set(several["properties"])
