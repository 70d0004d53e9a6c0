"""The HTTP face of the painter: limits, key, forms and answers. It knows FastAPI, not Ray."""

import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import pydantic
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from aai.config import Config
from aai.errors import UserError
from aai.sampling import PaintRequest, check_repaint
from aai.sounds import MOST_SOUNDS, name_of
from pipelines.service.access import WEBHOOK
from pipelines.service.answers import EVENTS, INTERNAL, Answer, PaintProgress, ServedModel, live, pictures, unusable
from pipelines.service.guard import ApiError, Guard, Limits, deadline_of
from pipelines.service.keys import Keys
from pipelines.service.openapi import DELIVERY, HEALTHZ, KEYS, REFUSALS, SEVERAL
from pipelines.service.uploads import Decoders, read_audio, read_image
from pipelines.service.webhook import Webhook

logger = logging.getLogger(__name__)

Verb = Literal["generate", "edit", "stylize"]
STATIC = Path(__file__).parent / "static"
PNG = {"type": "string", "format": "binary"}
MULTIPART = Form(media_type="multipart/form-data")
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "image/png for one picture, for more JSON. Headers X-AAI-Model, X-AAI-Bundle, X-AAI-Seed. "
        "To Accept: text/event-stream events `progress` {step, steps, preview}, then `done` (the JSON) or `error` "
        "{status, error}.",
        "content": {
            "image/png": {"schema": PNG},
            "application/json": {"schema": SEVERAL},
            EVENTS: {"schema": {"type": "string"}},
        },
    },
    **REFUSALS,
}


class Health(Config):
    """State of the painters."""

    replicas: int
    """Painters that can paint."""
    queue_depth: int
    """Requests that wait for a painter."""
    painting: int
    """Requests that are being painted."""
    queued_steps: int = 0
    """Denoising steps of the pictures of both."""
    serving: dict[str, int] = pydantic.Field(default_factory=dict)
    """Painters by the version that they paint with; empty where no alias is followed."""
    canary: dict[str, int] = pydantic.Field(default_factory=dict)
    """Painters by the version that they have on trial."""
    refused: dict[str, str] = pydantic.Field(default_factory=dict)
    """Versions that the alias names and that no painter takes up, and why."""
    registry: str = ""
    """Why the registry cannot be followed now."""
    keys: str = ""
    """Why the new file of keys is not used."""


@dataclass(frozen=True)
class PaintJob:
    """A request, decoded: sounds float32 [S] by name, maybe a picture and a mask.

    given: hashes of what was handed in, which the pictures tell.
    """

    verb: Verb
    sounds: Mapping[str, np.ndarray]
    request: PaintRequest
    image: Image.Image | None = None
    mask: Image.Image | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """What paints: the Serve deployment, seen from the HTTP side."""

    model: ServedModel

    async def paint(self, wanted: PaintJob) -> Answer:
        """The pictures. Raises ApiError 429 when the queue is full, UserError for a bad request."""

    def paint_live(self, wanted: PaintJob) -> AsyncGenerator[PaintProgress | Answer, None]:
        """How far it is: at once when it is admitted, after each call of the UNet, and at last the pictures."""

    def full(self) -> bool:
        """Whether a request that came now would be refused."""

    async def health(self) -> Health:
        """Fresh figures; never waits for a picture."""

    async def moved(self) -> None:
        """The alias moved: all painters look at once. Raises ApiError 503 when they cannot be told."""


class _PaintForm(PaintRequest):
    def request(self) -> PaintRequest:
        """The settings without the files."""
        return PaintRequest(**{name: getattr(self, name) for name in PaintRequest.model_fields})


class GenerateForm(_PaintForm):
    """A sound or several, and how to paint them."""

    audio: list[UploadFile] = pydantic.Field(min_length=1, max_length=MOST_SOUNDS)
    """Sound file: WAV, FLAC, MP3, OGG, M4A, WebM, or the sound of a video. Repeat the field for several sounds."""
    names: str = pydantic.Field("", max_length=500)
    """Of several sounds, in their order, with commas: `dog,rain` for <dog> and <rain> in the prompt. Empty = sound,
    sound2, ..."""

    def files(self) -> dict[str, UploadFile]:
        """The sounds by name. Raises ApiError 422 unless there are as many names as files."""
        names = [name.strip() for name in self.names.split(",")] if self.names else []
        names = names or [name_of(i) for i in range(len(self.audio))]
        if len(set(names)) != len(self.audio) or len(names) != len(self.audio):
            rule = f"names: {self.names!r} are not {len(self.audio)} different names, one for each sound"
            raise ApiError(422, "invalid_field", rule)
        return dict(zip(names, self.audio, strict=True))


class RepaintForm(_PaintForm):
    """A sound, a picture, and how to paint it anew."""

    audio: UploadFile
    """Sound file, as for generate."""
    image: UploadFile
    """Picture: PNG, JPEG or WebP."""
    mask: UploadFile | None = None
    """Picture that is white where the given one may change, with repaint=invert."""

    def files(self) -> dict[str, UploadFile]:
        """See GenerateForm."""
        return {name_of(0): self.audio}


def build_http(
    backend: Backend, limits: Limits, keys: Keys | None, decoders: Decoders | None = None, secret: str | None = None
) -> ASGIApp:
    """The whole HTTP application around a backend: page, docs, /healthz and /v1.

    decoders: those to be used. secret: of the registry's webhook; None = there is none.
    """
    app = FastAPI(title="AAI on Ray", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_errors(app)
    _add_pages(app, backend)
    _add_verbs(app, backend, limits, decoders or Decoders(limits))
    _add_webhook(app, backend, Webhook(secret, limits.retry_after_s))
    return Guard(app, limits, keys, backend.full)


def _add_errors(app: FastAPI) -> None:
    """Every refusal has the same JSON body."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            told = dict(error.headers or {})  # Allow, of a 405
            error = ApiError(error.status_code, f"http_{error.status_code}", str(error.detail), told)
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return ApiError(422, "invalid_field", f"{field}: {first['msg']}").response()

    @app.exception_handler(UserError)
    async def useless(request: Request, error: UserError) -> Response:
        return unusable(error).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # it is raised again, and so logged
        return INTERNAL.response()


def _add_pages(app: FastAPI, backend: Backend) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html")

    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/healthz", summary="Model and queue; 503 while no painter is ready", responses=HEALTHZ)
    async def healthz() -> JSONResponse:
        health = await backend.health()
        model = backend.model.model_dump(include={"name", "version", "alias"})
        ready = health.replicas > 0
        status = "ready" if ready else "not ready"
        body: dict[str, Any] = {"status": status, "model": model, "bundle": backend.model.sha}
        body |= health.model_dump()
        return JSONResponse(body, 200 if ready else 503, {"Cache-Control": "no-store"})


def _add_verbs(app: FastAPI, backend: Backend, limits: Limits, decoders: Decoders) -> None:
    async def wanted(verb: Verb, form: GenerateForm | RepaintForm) -> PaintJob:
        if verb != "generate":
            check_repaint(form)
            if isinstance(form, RepaintForm) and form.mask and form.repaint != "invert":
                raise ApiError(422, "invalid_field", "mask: img2img changes the whole picture; send repaint=invert")
        files, rate_hz = form.files(), backend.model.sample_rate_hz
        sounds: dict[str, np.ndarray] = {}
        hashed: dict[str, str] = {}
        given: dict[str, Any] = {"sounds": hashed}
        image = mask = None
        async with decoders.one() as decoded:
            for name, file in files.items():
                sounds[name], hashed[name] = await decoded(read_audio, file, limits, rate_hz)
                total_s = sum(map(len, sounds.values())) / rate_hz
                if total_s > limits.max_audio_s + 0.1:
                    rule = f"audio: the sounds are {total_s:.1f} s together, the limit is {limits.max_audio_s:g} s"
                    raise ApiError(422, "too_long", rule)
            if isinstance(form, RepaintForm):
                image, given["image_sha256"] = await decoded(read_image, form.image, limits)
            if isinstance(form, RepaintForm) and form.mask:
                mask, given["mask_sha256"] = await decoded(read_image, form.mask, limits, "mask")
        return PaintJob(verb, sounds, form.request(), image, mask, given)

    async def answer(http: Request, verb: Verb, form: GenerateForm | RepaintForm) -> Response:
        asked = await wanted(verb, form)
        if EVENTS in http.headers.get("accept", ""):
            return await live(backend.paint_live(asked), form.seed, limits, deadline_of(http.scope))
        painted = await backend.paint(asked)
        return pictures(painted.files, form.seed, painted.model)

    options: dict[str, Any] = {"responses": ANSWERS, "response_class": Response, "dependencies": KEYS}

    @app.post("/v1/generate", summary="Paint a sound, or several", **options)
    async def generate(request: Request, form: Annotated[GenerateForm, MULTIPART]) -> Response:
        return await answer(request, "generate", form)

    @app.post("/v1/edit", summary="Put the sound's object into a picture", **options)
    async def edit(request: Request, form: Annotated[RepaintForm, MULTIPART]) -> Response:
        return await answer(request, "edit", form)

    @app.post("/v1/stylize", summary="Put the sound's ambience onto a picture", **options)
    async def stylize(request: Request, form: Annotated[RepaintForm, MULTIPART]) -> Response:
        return await answer(request, "stylize", form)


def _add_webhook(app: FastAPI, backend: Backend, webhook: Webhook) -> None:
    @app.post(WEBHOOK, summary="MLflow says that an alias moved: painters look at it at once", **DELIVERY)
    async def registry(request: Request) -> JSONResponse:
        await webhook.check(request)
        await backend.moved()
        return JSONResponse({"status": "accepted"}, 202)
