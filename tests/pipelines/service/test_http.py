import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator

import httpx
import numpy as np
import pytest
from PIL import Image

from aai.errors import UserError
from aai.sampling import PaintRequest
from pipelines.service.answers import Answer, PaintProgress, ServedModel
from pipelines.service.guard import Limits, queue_full
from pipelines.service.http import STATIC, Health, PaintJob, build_http
from pipelines.service.keys import Keys
from pipelines.service.uploads import Decoders
from tests import hostile
from tests.clips import latin1_title, make_moving
from tests.hostile import png, wav

LIMITS = Limits(max_bytes=300_000, max_audio_s=2, max_pixels=128 * 128, request_timeout_s=60)
DECODERS = Decoders(LIMITS)


class Echo:
    """A backend that answers with a picture of one colour and remembers what it was given."""

    model = ServedModel(name="toy", version="3", alias="champion", sha="abc123", sample_rate_hz=16_000)

    def __init__(self, wait_s: float = 0, replicas: int = 1) -> None:
        self.wait_s, self.replicas, self.cancelled = wait_s, replicas, 0
        self.painted_by, self.is_full, self.moves = self.model, False, 0
        self.stopped: set[int] = set()
        self.calls: list[tuple[str, dict[str, np.ndarray], Image.Image | None, PaintRequest]] = []
        self.masks: list[Image.Image | None] = []

    async def paint(self, wanted: PaintJob) -> Answer:
        self.given = wanted.given
        self.calls.append((wanted.verb, dict(wanted.sounds), wanted.image, wanted.request))
        self.masks.append(wanted.mask)
        try:
            await asyncio.sleep(self.wait_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        prompt = wanted.request.prompt or ""
        if "<nosuch>" in prompt:
            raise UserError("prompt", prompt, "names an unknown sound", "use <sound>")
        if "<broken>" in prompt:
            raise RuntimeError("a secret")
        files = [b"" if i in self.stopped else png() for i in range(wanted.request.num_images)]
        return Answer(files, self.painted_by)

    async def paint_live(self, wanted: PaintJob) -> AsyncGenerator[PaintProgress | Answer, None]:
        if self.is_full:
            raise queue_full(2)
        yield PaintProgress(0)
        yield PaintProgress(1, 2, b"a preview")
        yield await self.paint(wanted)

    def full(self) -> bool:
        return self.is_full

    async def health(self) -> Health:
        return Health(replicas=self.replicas, queue_depth=0, painting=0)

    async def moved(self) -> None:
        self.moves += 1


def ask(
    method: str,
    path: str,
    backend: Echo | None = None,
    key: str | None = None,
    limits: Limits = LIMITS,
    base: str = "http://localhost",
    **request: object,
) -> httpx.Response:
    """One request to a fresh application around a backend."""

    async def send() -> httpx.Response:
        own = Keys(key=key) if key else None
        transport = httpx.ASGITransport(build_http(backend or Echo(), limits, own, DECODERS))
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def code(response: httpx.Response) -> tuple[int, str]:
    """Status and stable code of a refusal."""
    return response.status_code, response.json()["error"]["code"]


def test_generate_hands_over_sound_and_settings() -> None:
    backend = Echo()
    form = {"prompt": "a sketch of <sound>", "seed": "7", "steps": "3", "sound_strength": "1.5"}
    response = ask("POST", "/v1/generate", backend, files={"audio": wav(0.5, 22_050)}, data=form)
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert response.headers["x-aai-model"] == "toy/3@champion"
    assert (response.headers["x-aai-bundle"], response.headers["x-aai-seed"]) == ("abc123", "7")
    verb, sounds, image, request = backend.calls[0]
    audio = sounds["sound"]
    assert (verb, image) == ("generate", None)
    assert audio.dtype == np.float32
    assert audio.size == pytest.approx(8000, abs=50)
    assert request == PaintRequest(prompt="a sketch of <sound>", seed=7, steps=3, sound_strength=1.5)


@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_an_upload_may_have_a_title_that_is_no_utf8(container: str) -> None:
    backend = Echo()
    sound = latin1_title(make_moving("mpeg4", num_frames=20, sound="libmp3lame"), container)
    response = ask("POST", "/v1/generate", backend, files={"audio": sound}, data={"prompt": "<sound>"})
    assert response.status_code == 200, response.text
    assert backend.calls[0][1]["sound"].size == pytest.approx(16_000, abs=2500)


@pytest.mark.parametrize("verb", ["edit", "stylize"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_repaint_hands_over_the_picture(verb: str, kind: str) -> None:
    backend = Echo()
    files = {"audio": wav(), "image": png(80, 40, kind)}
    assert ask("POST", f"/v1/{verb}", backend, files=files, data={"denoise_strength": "0.4"}).status_code == 200
    given = backend.calls[0][2]
    assert given is not None
    assert (given.mode, given.size) == ("RGB", (80, 40))
    assert backend.calls[0][3].denoise_strength == 0.4
    assert backend.masks == [None]


def test_an_answer_names_the_version_that_painted_it() -> None:
    backend = Echo()
    backend.painted_by = backend.model.model_copy(update={"version": "4", "sha": "def456"})
    response = ask("POST", "/v1/generate", backend, files={"audio": wav()})
    assert (response.headers["x-aai-model"], response.headers["x-aai-bundle"]) == ("toy/4@champion", "def456")
    several = ask("POST", "/v1/generate", backend, files={"audio": wav()}, data={"num_images": "2"}).json()
    assert (several["model"], several["bundle"]) == ("toy/4@champion", "def456")


def test_a_mask_goes_with_the_picture() -> None:
    backend = Echo()
    files = {"audio": wav(), "image": png(80, 40), "mask": png(40, 20)}
    assert ask("POST", "/v1/edit", backend, files=files, data={"repaint": "invert"}).status_code == 200
    assert backend.masks[0] is not None
    assert backend.masks[0].size == (40, 20)
    sums = {f"{name}_sha256": hashlib.sha256(files[name]).hexdigest() for name in ("image", "mask")}
    assert backend.given == {"sounds": {"sound": hashlib.sha256(files["audio"]).hexdigest()}, **sums}
    assert backend.calls[0][3].repaint == "invert"
    assert code(ask("POST", "/v1/edit", backend, files=files)) == (422, "invalid_field")  # img2img heeds no mask
    for mask, expected in ((b"nothing", "image_unreadable"), (png(200, 100), "image_too_large")):
        response = ask("POST", "/v1/edit", backend, files={**files, "mask": mask}, data={"repaint": "invert"})
        assert code(response) == (422, expected)
        assert response.json()["error"]["message"].startswith("mask: ")
    assert len(backend.calls) == 1


@pytest.mark.parametrize(("names", "known"), [(None, ["sound", "sound2"]), ("dog, rain", ["dog", "rain"])])
def test_several_sounds_have_names(names: str | None, known: list[str]) -> None:
    backend = Echo()
    files = [("audio", ("a.wav", wav(1))), ("audio", ("b.wav", wav(0.5)))]
    response = ask("POST", "/v1/generate", backend, files=files, data={"names": names} if names else {})
    assert response.status_code == 200
    assert [(name, len(audio)) for name, audio in backend.calls[0][1].items()] == [(known[0], 16000), (known[1], 8000)]


@pytest.mark.parametrize("names", ["dog", "dog,dog", "dog,rain,bell", ","])
def test_names_that_do_not_fit_the_sounds_are_refused(names: str) -> None:
    backend = Echo()
    files = [("audio", ("a.wav", wav())), ("audio", ("b.wav", wav()))]
    response = ask("POST", "/v1/generate", backend, files=files, data={"names": names})
    assert code(response) == (422, "invalid_field")
    assert "are not 2 different names" in response.json()["error"]["message"]
    assert not backend.calls


def test_the_limit_is_of_all_sounds_of_a_request_together() -> None:
    backend = Echo()
    files = [("audio", ("a.wav", wav(1.5)))] * 2
    response = ask("POST", "/v1/generate", backend, files=files)
    assert code(response) == (422, "too_long")
    assert "3.0 s together, the limit is 2 s" in response.json()["error"]["message"]
    assert not backend.calls


def test_more_sounds_than_the_bound_are_refused() -> None:
    backend = Echo()
    files = [("audio", ("a.wav", wav()))] * 9
    assert code(ask("POST", "/v1/generate", backend, files=files)) == (422, "invalid_field")
    assert not backend.calls


def test_several_pictures_come_as_json() -> None:
    response = ask("POST", "/v1/generate", files={"audio": wav()}, data={"num_images": "3", "seed": "5"})
    body = response.json()
    assert (body["seed"], body["model"], body["bundle"], len(body["images"])) == (5, "toy/3@champion", "abc123", 3)
    assert body["blocked"] == []


def test_what_the_safety_checker_stopped_is_told() -> None:
    backend, files = Echo(), {"audio": wav()}
    backend.stopped = {0, 2}
    one = ask("POST", "/v1/generate", backend, files=files)
    assert code(one) == (422, "unsafe_picture")
    assert "the safety checker stopped" in one.json()["error"]["message"]
    several = ask("POST", "/v1/generate", backend, files=files, data={"num_images": "3"}).json()
    assert (several["blocked"], [image is None for image in several["images"]]) == ([0, 2], [True, False, True])
    backend.stopped = {0, 1, 2}
    assert code(ask("POST", "/v1/generate", backend, files=files, data={"num_images": "3"})) == (422, "unsafe_picture")


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("steps", "101", "less than or equal to 100"),
        ("steps", "many", "valid integer"),
        ("num_images", "9", "less than or equal to 8"),
        ("guidance_scale", "nan", "less than or equal to 30"),
        ("seed", "-1", "greater than or equal to 0"),
        ("sound_strength", "2.5", "less than or equal to 2"),
        ("prompt", "x" * 501, "at most 500 characters"),
        ("colour", "red", "Extra inputs"),
    ],
)
def test_a_bad_field_is_named_with_its_rule(field: str, value: str, rule: str) -> None:
    backend = Echo()
    response = ask("POST", "/v1/generate", backend, files={"audio": wav()}, data={field: value})
    assert code(response) == (422, "invalid_field")
    message = response.json()["error"]["message"]
    assert message.startswith(f"{field}: ")
    assert rule in message
    assert not backend.calls


@pytest.mark.parametrize(
    ("path", "files", "expected"),
    [
        ("/v1/generate", {"audio": b"not a sound at all"}, "unreadable"),
        ("/v1/generate", {"audio": png()}, "unreadable"),
        ("/v1/generate", {"audio": b""}, "empty_file"),
        ("/v1/generate", {"audio": wav(0)}, "empty_audio"),
        ("/v1/generate", {"audio": wav(3)}, "too_long"),
        ("/v1/generate", {}, "invalid_field"),
        ("/v1/edit", {"audio": wav()}, "invalid_field"),
        ("/v1/edit", {"audio": wav(), "image": b"GIF89a"}, "image_unreadable"),
        ("/v1/edit", {"audio": wav(), "image": png()[:60]}, "image_unreadable"),
        ("/v1/edit", {"audio": wav(), "image": png(200, 100)}, "image_too_large"),
    ],
)
def test_an_unusable_upload_is_refused_with_a_reason(path: str, files: dict[str, bytes], expected: str) -> None:
    backend = Echo()
    response = ask("POST", path, backend, files=files, data={"seed": "1"})
    assert code(response) == (422, expected)
    assert response.json()["error"]["message"]
    assert not backend.calls


@pytest.mark.parametrize("name", hostile.SOUNDS)
def test_a_hostile_sound_is_refused(name: str) -> None:
    backend, (sound, expected) = Echo(), hostile.SOUNDS[name]
    assert code(ask("POST", "/v1/generate", backend, files={"audio": sound})) == (422, expected)
    assert not backend.calls


@pytest.mark.parametrize("name", hostile.PICTURES)
def test_a_hostile_picture_is_refused(name: str) -> None:
    backend, (picture, expected) = Echo(), hostile.PICTURES[name]
    files = {"audio": wav(), "image": picture}
    assert code(ask("POST", "/v1/edit", backend, files=files)) == (422, expected)
    assert not backend.calls


@pytest.mark.parametrize("name", hostile.HARMLESS)
def test_nonsense_beside_the_pixels_is_passed_over(name: str) -> None:
    files = {"audio": wav(), "image": hostile.HARMLESS[name]}
    assert ask("POST", "/v1/edit", files=files).status_code == 200


PART = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
AUDIO, END = PART % (b"audio", b'; filename="a"', wav()), b"--b--\r\n"


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (AUDIO + PART % (b"prompt", b"", b"\xff\0<sound>") + END, {}),
        (AUDIO + PART % (b"\xff\xfe", b"", b"1") + END, {}),
        (AUDIO.replace(b'"a"', b'"\xff\0"') + END, {}),
        (AUDIO + AUDIO + END, {}),
        (AUDIO, {}),
        (PART % (b"audio", b"", b"text") + END, {}),
        (b"--b\r\n\r\nhello\r\n" + END, {}),
        (bytes(1000), {}),
        (b"", {}),
        (AUDIO + END, {b"Content-Type": b"multipart/form-data"}),
        (AUDIO + END, {b"Content-Type": b"multipart/form-data; boundary=b; charset=nosuch"}),
        (AUDIO + END, {b"Content-Length": b"\xb2"}),
        (AUDIO + END, {b"X-API-Key": b"\xff"}),
        (AUDIO + END, {b"Authorization": b"Bearer \xff"}),
        (AUDIO + END, {b"Host": b"\xff]"}),
    ],
)
@pytest.mark.parametrize("key", [None, "secret"])
def test_no_broken_request_is_our_failure(body: bytes, headers: dict[bytes, bytes], key: str | None) -> None:
    sent = {b"Content-Type": b"multipart/form-data; boundary=b", b"X-API-Key": b"secret"} | headers
    assert ask("POST", "/v1/generate", key=key, content=body, headers=list(sent.items())).status_code < 500


@pytest.mark.parametrize("verb", ["edit", "stylize"])
@pytest.mark.parametrize("data", [{"steps": "20", "denoise_strength": "0.04"}, {"steps": "1"}])
def test_a_repaint_of_no_step_is_refused_before_it_is_queued(verb: str, data: dict[str, str]) -> None:
    backend, files = Echo(), {"audio": wav(), "image": png()}
    response = ask("POST", f"/v1/{verb}", backend, files=files, data=data)
    assert code(response) == (422, "invalid_request")
    assert "denoise_strength: times" in response.json()["error"]["message"]
    assert not backend.calls
    assert ask("POST", "/v1/generate", backend, files={"audio": wav()}, data=data).status_code == 200


def test_a_users_mistake_found_while_painting_is_a_422() -> None:
    response = ask("POST", "/v1/generate", files={"audio": wav()}, data={"prompt": "<nosuch>"})
    assert code(response) == (422, "invalid_request")
    assert "use <sound>" in response.json()["error"]["message"]


def test_a_large_body_is_refused_by_its_announced_length_and_by_count() -> None:
    backend, sent = Echo(), 0
    assert code(ask("POST", "/v1/generate", backend, files={"audio": bytes(400_000)})) == (413, "upload_too_large")

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        while True:
            sent += 50_000
            yield bytes(50_000)

    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert code(ask("POST", "/v1/generate", backend, content=endless(), headers=headers)) == (413, "upload_too_large")
    assert sent <= LIMITS.max_bytes + 50_000
    assert not backend.calls


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"X-API-Key": "wrong"}, 401),
        ({"Authorization": "secret"}, 401),
        ({"X-API-Key": "secret"}, 200),
        ({"Authorization": "Bearer secret"}, 200),
    ],
)
def test_the_key_guards_painting_only(headers: dict[str, str], status: int) -> None:
    backend = Echo()
    response = ask("POST", "/v1/generate", backend, "secret", files={"audio": wav()}, headers=headers)
    assert response.status_code == status
    assert len(backend.calls) == (status == 200)
    assert "secret" not in response.text or status == 200
    assert ask("GET", "/healthz", backend, "secret", base="http://elsewhere:80").status_code == 200


@pytest.mark.parametrize("base", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"])
def test_without_a_key_loopback_names_are_served(base: str) -> None:
    assert ask("GET", "/", base=base).status_code == 200


def test_without_a_key_no_other_name_is_served() -> None:
    assert code(ask("GET", "/", base="http://evil.example")) == (403, "forbidden_host")


def test_the_deadline_ends_a_request_and_says_when_to_come_back() -> None:
    backend = Echo(wait_s=30)
    response = ask("POST", "/v1/generate", backend, limits=Limits(request_timeout_s=0.5), files={"audio": wav()})
    assert code(response) == (503, "timeout")
    assert response.headers["retry-after"] == "2"
    assert backend.cancelled == 1


def test_health_is_503_without_a_painter() -> None:
    ready, lost = ask("GET", "/healthz"), ask("GET", "/healthz", Echo(replicas=0))
    assert (ready.status_code, lost.status_code) == (200, 503)
    assert ready.json()["model"] == {"name": "toy", "version": "3", "alias": "champion"}
    assert ready.json()["queue_depth"] == 0


def test_the_pages_load_nothing_from_elsewhere() -> None:
    for path in ("/", "/docs"):
        page = ask("GET", path)
        assert page.status_code == 200
        assert page.headers["content-security-policy"].startswith("default-src 'self'")
        assert "<script>" not in page.text
    for file in STATIC.iterdir():
        assert ask("GET", f"/static/{file.name}").status_code == 200
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http://" not in text
        assert "https://" not in text
