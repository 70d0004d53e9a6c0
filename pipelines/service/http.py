"""The HTTP face of the painter: limits, key, forms and answers. It knows FastAPI, not Ray."""

import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

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
from pipelines.service.answers import HEALTHZ, KEYS, REFUSALS, SEVERAL
from pipelines.service.guard import ApiError, Guard, Limits
from pipelines.service.uploads import Decoders, read_audio, read_image

logger = logging.getLogger(__name__)

Verb = Literal["generate", "edit", "stylize"]
STATIC = Path(__file__).parent / "static"
PNG = {"type": "string", "format": "binary"}
MULTIPART = Form(media_type="multipart/form-data")
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "image/png for one picture, for more JSON {seed, model, bundle, images: [base64]}. "
        "Headers X-AAI-Model, X-AAI-Bundle, X-AAI-Seed.",
        "content": {"image/png": {"schema": PNG}, "application/json": {"schema": SEVERAL}},
    },
    **REFUSALS,
}


class ServedModel(Config):
    """What the service paints with: shown by /healthz and in the headers of every picture."""

    name: str
    version: str
    alias: str = ""
    sha: str
    """Content identity of the bundle."""
    sample_rate_hz: int
    """Rate at which uploads are decoded."""

    def label(self) -> str:
        """`NAME/VERSION@ALIAS` for the X-AAI-Model header."""
        return f"{self.name}/{self.version}" + (f"@{self.alias}" if self.alias else "")


class Answer(NamedTuple):
    """PNG files, and the model that painted them: after a promotion another one than a moment before."""

    files: list[bytes]
    model: ServedModel


class Health(Config):
    """State of the painters."""

    replicas: int
    """Painters that can paint."""
    queue_depth: int
    """Requests that wait for a painter."""
    painting: int
    """Requests that are being painted."""
    serving: dict[str, int] = pydantic.Field(default_factory=dict)
    """Painters by the version that they paint with; empty where no alias is followed."""
    refused: dict[str, str] = pydantic.Field(default_factory=dict)
    """Versions that the alias names and that no painter takes up, and why."""
    registry: str = ""
    """Why the registry cannot be followed now."""


class Backend(Protocol):
    """What paints: the Serve deployment, seen from the HTTP side."""

    model: ServedModel

    async def paint(
        self,
        verb: Verb,
        sounds: dict[str, np.ndarray],
        image: Image.Image | None,
        request: PaintRequest,
        mask: Image.Image | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Answer:
        """PNG files of sounds by name. given: hashes of what was handed in, which the pictures tell.

        Raises ApiError 429 when the queue is full, UserError for a bad request.
        """

    def full(self) -> bool:
        """Whether a request that came now would be refused."""

    async def health(self) -> Health:
        """Fresh figures; never waits for a picture."""


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


def build_http(backend: Backend, limits: Limits, key: str | None, decoders: Decoders | None = None) -> ASGIApp:
    """The whole HTTP application around a backend: page, docs, /healthz and /v1. decoders: those to be used."""
    app = FastAPI(title="AAI on Ray", version="1", docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_errors(app)
    _add_pages(app, backend)
    _add_verbs(app, backend, limits, decoders or Decoders(limits))
    return Guard(app, limits, key, backend.full)


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
    async def unusable(request: Request, error: UserError) -> Response:
        return ApiError(422, "invalid_request", f"{error.setting}: {error.rule}; {error.remedy}").response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # it is raised again, and so logged
        return ApiError(500, "internal", "the painter failed; the reason is in the service's log").response()


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
    async def answer(verb: Verb, form: GenerateForm | RepaintForm) -> Response:
        if verb != "generate":
            check_repaint(verb, form)
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
        painted = await backend.paint(verb, sounds, image, form.request(), mask, given)
        return _pictures(painted.files, form.seed, painted.model)

    options: dict[str, Any] = {"responses": ANSWERS, "response_class": Response, "dependencies": KEYS}

    @app.post("/v1/generate", summary="Paint a sound, or several", **options)
    async def generate(form: Annotated[GenerateForm, MULTIPART]) -> Response:
        return await answer("generate", form)

    @app.post("/v1/edit", summary="Put the sound's object into a picture", **options)
    async def edit(form: Annotated[RepaintForm, MULTIPART]) -> Response:
        return await answer("edit", form)

    @app.post("/v1/stylize", summary="Put the sound's ambience onto a picture", **options)
    async def stylize(form: Annotated[RepaintForm, MULTIPART]) -> Response:
        return await answer("stylize", form)


def _pictures(files: Sequence[bytes], seed: int, model: ServedModel) -> Response:
    """One picture as image/png, several as JSON with base64 PNGs."""
    shown = {"seed": seed, "model": model.label(), "bundle": model.sha}
    headers = {"X-AAI-Model": model.label(), "X-AAI-Bundle": model.sha, "X-AAI-Seed": str(seed)}
    headers["Cache-Control"] = "no-store"
    if len(files) == 1:
        return Response(files[0], media_type="image/png", headers=headers)
    images = [base64.b64encode(file).decode() for file in files]
    return JSONResponse({**shown, "images": images}, headers=headers)
