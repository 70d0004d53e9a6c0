"""The page of the service in a real browser, against a real service: record, upload, paint, brush, mix, follow."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from aai.media.decode import decode_audio
from aai.media.waveform import write_wav
from aai.png import encode_png, sha256
from aai.proof import ProofConfig, Prover, read_made
from pipelines.registry import versions
from tests.certificates import certified
from tests.e2e.test_rollover import another, registry_of
from tests.hostile import wav
from tests.pipelines.test_serve import BROWSER, KEY, Service, service  # noqa: F401

pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium")
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
FAKE_MICROPHONE = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
SUNG_HZ = 1200
"""What is before the microphone: one tone that never ends, as a siren's or a machine's."""
TONE = {"name": "Big dog.wav", "mimeType": "audio/wav", "buffer": wav()}
OTHER = {"name": "rain.wav", "mimeType": "audio/wav", "buffer": wav(0.4)}
PAINTED_MS = 60_000


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    sung = tmp_path_factory.mktemp("microphone") / "sung.wav"
    time_s = np.arange(48_000) / 48_000
    write_wav(str(sung), (0.4 * np.sin(2 * np.pi * SUNG_HZ * time_s)).astype(np.float32), 48_000)
    with sync_playwright() as engine:
        heard = f"--use-file-for-fake-audio-capture={sung}"
        arguments = ["--no-sandbox", "--disable-gpu", *FAKE_MICROPHONE, heard]
        running = engine.chromium.launch(executable_path=BROWSER, args=arguments)
        yield running
        running.close()


def opened(browser: Browser, running: Service, size: dict[str, int] = WIDE) -> Page:
    """The page with the key and few steps; what goes wrong in its scripts fails the test that reads `errors`."""
    context = browser.new_context(viewport=size, has_touch=size is NARROW)  # type: ignore[arg-type]
    page = context.new_page()
    page.add_init_script(f"sessionStorage.setItem('key', '{KEY}'); window.errors = []")
    page.add_init_script("addEventListener('error', (event) => window.errors.push(event.message))")
    page.add_init_script("addEventListener('unhandledrejection', (event) => window.errors.push(String(event.reason)))")
    page.add_init_script("addEventListener('securitypolicyviolation', (e) => window.errors.push(e.violatedDirective))")
    page.goto(running.url)
    page.locator("#more summary").click()
    page.locator("input[name=steps]").fill("4")
    return page


@pytest.fixture
def page(browser: Browser, service: Service) -> Iterator[Page]:  # noqa: F811
    shown = opened(browser, service)
    yield shown
    assert shown.evaluate("window.errors") == []
    shown.context.close()


def paint(page: Page, floor: bool = True) -> None:
    """Presses Paint, and waits for the picture and the one beside it."""
    page.locator("#paint").click()
    expect(page.locator("#pictures img").first).to_be_visible(timeout=PAINTED_MS)
    if floor:
        expect(page.locator("#floor img")).to_be_visible(timeout=PAINTED_MS)


def saved(page: Page, place: str) -> bytes:
    """The file behind the link Save."""
    with page.expect_download() as download:
        page.locator(f"{place} a", has_text="Save").first.click()
    return Path(download.value.path()).read_bytes()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


READ_FILE = """async input => {
  const bytes = new Uint8Array(await document.querySelector(input).files[0].arrayBuffer());
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
}"""
"""The first file of an input, in base64."""


def choose(page: Page, verb: str) -> None:
    page.locator(f"input[name=verb][value={verb}]").check(force=True)


def give_photo(page: Page) -> Image.Image:
    """A picture in which no two pixels are alike, in the form."""
    photo = Image.fromarray(np.random.default_rng(5).integers(0, 255, (96, 128, 3), np.uint8))
    file = io.BytesIO()
    photo.save(file, "PNG")
    page.locator("input[name=image]").set_input_files(
        {"name": "photo.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    expect(page.locator("#preview")).to_be_visible()
    return photo


def assert_fits(page: Page, tmp_path: Path, name: str) -> None:
    """Nothing is wider than the window; a screenshot is kept for whoever wants to look."""
    width, window = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    page.screenshot(path=tmp_path / f"{window}-{name}.png", full_page=True)
    assert width <= window, name


def assert_brightest(canvas: Locator, hz: float, what: str) -> None:
    """The brightest row of a spectrogram is that of a tone."""
    bright = canvas.evaluate(
        """canvas => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const rows = Array.from({ length: canvas.height }, (_, y) =>
            data.slice(4 * y * canvas.width, 4 * (y + 1) * canvas.width).reduce((a, b) => a + b));
          return rows.indexOf(Math.max(...rows)) / (canvas.height - 1);
        }"""
    )
    mel = np.log1p(np.array([40, hz, 8000]) / 700)
    assert bright == pytest.approx((mel[2] - mel[1]) / (mel[2] - mel[0]), abs=0.03), what


def test_an_upload_is_drawn_painted_and_shown_beside_its_floor(page: Page, service: Service) -> None:  # noqa: F811
    page.locator("input[name=audio]").set_input_files(TONE)
    canvas = page.locator(".sound canvas").first
    expect(canvas).to_have_attribute("aria-label", "Spectrogram of Big dog.wav, 0.5 s")
    assert_brightest(canvas, 440, "the tone")
    page.locator("input[name=seed]").fill("7")
    paint(page)
    for place, strength in (("#pictures", "1"), ("#floor", "0")):
        ours = service.post("generate", {"steps": "4", "seed": "7", "sound_strength": strength}).content
        file = saved(page, place)
        assert np.array_equal(pixels(file), pixels(ours)), place
        assert read_made(file) == read_made(ours)
    expect(page.locator("#made")).to_contain_text("tiny/1@champion, seed 7")
    page.locator("#how summary").click()
    told = page.locator("#how").inner_text()
    assert [told.count(word) for word in (sha256(wav()), str(service.health()["bundle"]), "tiny/1")] == [1, 1, 1]
    assert "No C2PA manifest" in told
    page.locator("#compare").uncheck()
    paint(page, floor=False)
    expect(page.locator("#cancel")).to_be_hidden()
    expect(page.locator("#floor")).to_be_hidden()


def test_what_the_microphone_hears_is_recorded_drawn_and_painted(page: Page) -> None:
    """A steady tone: what cleans up speech would take it for noise, and remove it."""
    record, canvas = page.locator(".record").first, page.locator(".sound canvas").first
    record.click()
    expect(record).to_contain_text("Stop (3 s)")
    record.click()
    expect(canvas).to_have_attribute("aria-label", re.compile(r"Spectrogram of recording, [1-5]\.\d s"))
    file = base64.b64decode(page.evaluate(READ_FILE, "input[name=audio]"))
    samples = decode_audio(file, 10, 10**6, 16_000)
    assert f"{len(samples) / 16_000:.1f} s" in (canvas.get_attribute("aria-label") or "")
    second = samples[-24_000:-8_000]  # what switches itself on later has had its time
    loudest_hz = np.abs(np.fft.rfft(second)).argmax()
    assert (loudest_hz, np.abs(second).max()) == (pytest.approx(SUNG_HZ, abs=5), pytest.approx(0.4, abs=0.1))
    assert_brightest(canvas, SUNG_HZ, "what was before the microphone")
    page.locator("input[name=num_images]").fill("2")
    paint(page)
    expect(page.locator("#pictures img")).to_have_count(2)
    assert read_made(saved(page, "#pictures"))["sounds"] == {"sound": sha256(file)}, "the recording, and nothing else"


def test_pixels_outside_the_brushed_mask_are_kept(page: Page) -> None:
    page.locator("input[name=audio]").set_input_files(TONE)
    choose(page, "edit")
    photo = give_photo(page)
    page.locator("input[name=extent][value=brush]").check(force=True)
    page.locator("#paint").click()
    expect(page.locator("#error")).to_contain_text("Brush over")
    page.locator("#brush").scroll_into_view_if_needed()
    box = page.locator("#brush").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.8, steps=4)
    page.mouse.up()
    paint(page)
    painted = pixels(saved(page, "#pictures"))
    given = np.asarray(photo.resize(painted.shape[1::-1], Image.Resampling.BICUBIC))
    half = painted.shape[1] // 2
    assert np.array_equal(painted[:, half:], given[:, half:])
    assert not np.array_equal(painted[:, :half], given[:, :half])
    page.locator("#how summary").click()
    told = page.locator("#how").inner_text()
    assert "Mask, SHA-256" in told
    assert 'repaint="invert"' in told


def test_two_sounds_are_mixed_at_the_strengths_of_their_sliders(page: Page) -> None:
    choose(page, "mix")
    page.locator("#paint").click()
    expect(page.locator("#error")).to_contain_text("two sounds")
    page.locator("input[name=audio]").set_input_files(TONE)
    page.locator("input[name=audio2]").set_input_files(OTHER)
    page.locator(".called").first.fill("dog")
    page.locator(".share").nth(1).fill("0.6")
    paint(page)
    made = read_made(saved(page, "#pictures"))
    assert made["prompt"] == "a photo of <dog> and <rain*0.6>"
    assert made["sounds"] == {"dog": sha256(wav()), "rain": sha256(wav(0.4))}
    page.locator("input[name=prompt]").fill("<rain> in <dog*0.5>")
    expect(page.locator(".share").first).to_be_disabled()
    page.locator("input[name=sound_strength]").fill("0.5")
    paint(page)
    made = read_made(saved(page, "#pictures"))
    assert (made["prompt"], made["sound_strength"]) == ("<rain> in <dog*0.5>", 0.5)


def test_a_picture_is_cancelled_and_another_painted(page: Page, service: Service) -> None:  # noqa: F811
    page.locator("input[name=audio]").set_input_files(TONE)
    page.locator("input[name=steps]").fill("100")
    page.locator("input[name=num_images]").fill("8")
    page.locator("#paint").click()
    service.wait_until(painting=1)
    page.locator("#cancel").click()
    service.wait_until(painting=0)
    expect(page.locator("#error")).to_be_hidden()
    page.locator("input[name=steps]").fill("1")
    page.locator("input[name=num_images]").fill("1")
    paint(page)


def test_every_state_fits_wide_and_narrow(browser: Browser, service: Service, tmp_path: Path) -> None:  # noqa: F811
    for size in (WIDE, NARROW):
        page = opened(browser, service, size)
        assert_fits(page, tmp_path, "1-empty")
        page.locator("input[name=audio]").set_input_files({**TONE, "name": "a-very-long-name" * 8 + ".wav"})
        expect(page.locator(".sound canvas").first).to_have_attribute("aria-label", re.compile("Spectrogram"))
        assert_fits(page, tmp_path, "2-sound")
        paint(page)
        page.locator("#how summary").click()
        assert_fits(page, tmp_path, "3-painted")
        choose(page, "edit")
        give_photo(page)
        page.locator("input[name=extent][value=brush]").check(force=True)
        brush_by_other_means(page, size)
        expect(page.locator("#clear")).to_be_enabled()
        assert_fits(page, tmp_path, "4-mask")
        page.locator("#clear").click()
        expect(page.locator("#clear")).to_be_disabled()
        choose(page, "mix")
        page.locator("input[name=audio2]").set_input_files(OTHER)
        assert_fits(page, tmp_path, "5-mix")
        page.locator("input[name=audio2]").set_input_files({**OTHER, "buffer": b"no sound" * 30})
        page.locator("#paint").click()
        expect(page.locator("#error")).to_contain_text("422")
        assert_fits(page, tmp_path, "6-error")
        assert page.evaluate("window.errors") == []
        page.context.close()


def brush_by_other_means(page: Page, size: dict[str, int]) -> None:
    """A stroke without a mouse: with a finger on the narrow page, by keys on the wide one."""
    expect(page.locator("#clear")).to_be_disabled()
    brush = page.locator("#brush")
    if size is WIDE:
        brush.focus()
        for key in ("ArrowLeft", "ArrowUp", "Space"):
            page.keyboard.press(key)
        return
    brush.scroll_into_view_if_needed()
    box = brush.bounding_box()
    assert box is not None
    touch = page.context.new_cdp_session(page)
    for kind, at in (("touchStart", 40), ("touchMove", 80), ("touchEnd", 0)):
        points = [{"x": box["x"] + at, "y": box["y"] + at}] if at else []
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})


def test_a_manifest_in_the_file_is_told(page: Page, tmp_path: Path) -> None:
    certified(tmp_path, "painter", certified(tmp_path, "root"))
    config = ProofConfig(certificate=str(tmp_path / "painter.chain"), private_key=str(tmp_path / "painter.pem"))
    image = Image.new("RGB", (8, 8))
    for png, expected in (
        (Prover(config).encode(image, {"seed": 3}), "A C2PA manifest"),
        (encode_png(image, {"seed": 3}), "No C2PA manifest"),
    ):
        text = page.evaluate(
            """async file => {
              const { describe, read } = await import("./static/made.js");
              const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
              return describe(await read(new Blob([bytes]))).textContent;
            }""",
            base64.b64encode(png).decode(),
        )
        assert expected in text
        assert "Seed3" in text
        assert "aai verify FILE" in text


def test_a_stream_of_steps_is_read_however_it_is_cut(page: Page) -> None:
    events = [("progress", {"step": 1, "steps": 2, "preview": None}), ("error", {"status": 429, "note": "voll: ü"})]
    text = ": still here\r\n\r\n" + "".join(f"event: {kind}\r\ndata: {json.dumps(d)}\r\n\r\n" for kind, d in events)
    found = page.evaluate(
        """async ([text, size]) => {
          const { events } = await import("./static/asking.js");
          const bytes = new TextEncoder().encode(text), found = [];
          const stream = new ReadableStream({ start(controller) {
            for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
            controller.close();
          } });
          for await (const { event, data } of events(stream)) found.push([event, data]);
          return found;
        }""",
        [text, 3],
    )
    assert [tuple(event) for event in found] == events


def test_the_page_follows_a_promotion_without_a_reload(page: Page, service: Service, tmp_path: Path) -> None:  # noqa: F811
    expect(page.locator("#model")).to_have_text("tiny version 1 (champion)")
    page.evaluate("window.loaded = 'once'")
    cfg = registry_of(service)
    version = versions.register(cfg, another(service.bundle, tmp_path / "second"), {}, {})
    versions.set_alias(cfg, "champion", version)
    expect(page.locator("#model")).to_have_text(f"tiny version {version} (champion)", timeout=60_000)
    page.locator("input[name=audio]").set_input_files(TONE)
    paint(page)
    expect(page.locator("#made")).to_contain_text(f"tiny/{version}@champion")
    assert page.evaluate("window.loaded") == "once"
    versions.set_alias(cfg, "champion", 1)
    expect(page.locator("#model")).to_have_text("tiny version 1 (champion)", timeout=60_000)
