"""Uploads are decoded where a hang, a crash or a glutton costs one request."""

import asyncio
import io
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import UploadFile

from aai.media.child import GRACE_S, MediaChild
from aai.media.limits import DecodeConfig
from pipelines.service.guard import ApiError, Limits
from pipelines.service.uploads import CHILDREN, Decoders, read_audio, read_image
from tests.hostile import png, wav
from tests.hostile_files import PICTURE_KINDS, SOUND_KINDS, mutations, picture, picture_bombs, scans, sound, sound_bombs
from tests.pipelines.service.test_http import DECODERS, ask

LIMITS = Limits(decode_timeout_s=1, retry_after_s=7)


def upload(data: bytes) -> UploadFile:
    return UploadFile(io.BytesIO(data))


async def heard(decoders: Decoders) -> int:
    """A tone's samples."""
    async with decoders.one() as decode:
        sound, digest = await decode(read_audio, upload(wav()), LIMITS, 16_000)
    assert len(digest) == 64
    return len(sound)


def pids(decoders: Decoders) -> list[int]:
    return [child.process.pid for child in decoders._idle if child.process is not None]


def refusal(decoders: Decoders, harm: Callable[[int], object]) -> ApiError:
    """What a request is told while somebody harms the children; the next one must be heard."""
    for pid in pids(decoders):
        harm(pid)
    with pytest.raises(ApiError) as caught:
        asyncio.run(heard(decoders))
    assert [asyncio.run(heard(decoders)) for _ in range(CHILDREN)] == [8000] * CHILDREN
    return caught.value


@pytest.fixture
def decoders() -> Decoders:
    warm = Decoders(LIMITS)
    warm.warm()
    return warm


def test_a_sound_and_a_picture_come_out_of_one_child(decoders: Decoders) -> None:
    async def both() -> tuple[Any, Any]:
        async with decoders.one() as decode:
            sound, _ = await decode(read_audio, upload(wav()), LIMITS, 16_000)
            image, _ = await decode(read_image, upload(png(40, 30)), LIMITS, "mask")
            return sound, image

    before = pids(decoders)
    sound, image = asyncio.run(both())
    assert (sound.dtype, len(sound), image.mode, image.size) == (np.float32, 8000, "RGB", (40, 30))
    assert np.asarray(image)[0, 0].tolist() == [200, 80, 40]
    assert pids(decoders) == before


def test_a_hang_is_a_422_after_the_time(decoders: Decoders) -> None:
    frozen = decoders._idle[-1]
    assert frozen.process is not None
    pid = frozen.process.pid
    error = refusal(decoders, lambda each: os.kill(each, signal.SIGSTOP) if each == pid else None)
    assert (error.status_code, error.code) == (422, "decoding_timeout")
    assert "still not done after 1 s" in error.detail


def test_a_crash_is_a_422(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder dies of a signal in the middle of the file."""
    child = decoders._idle[-1]
    assert child.process is not None
    os.kill(child.process.pid, signal.SIGSTOP)
    pid = child.process.pid

    async def crash() -> None:
        task = asyncio.create_task(heard(decoders))
        await asyncio.sleep(0.3)
        os.kill(pid, signal.SIGSEGV)
        os.kill(pid, signal.SIGCONT)
        await task

    with pytest.raises(ApiError, match="SIGSEGV") as caught:
        asyncio.run(crash())
    assert (caught.value.status_code, caught.value.code) == (422, "decoder_crashed")
    assert asyncio.run(heard(decoders)) == 8000


def test_a_glutton_is_a_422() -> None:
    narrow = Decoders(Limits(decode_memory_mb=1024))

    async def ask() -> None:
        async with narrow.one() as decode:
            await decode(read_image, upload(png(14_000, 12_000)), Limits(max_pixels=10**9))

    with pytest.raises(ApiError) as caught:
        asyncio.run(ask())
    assert (caught.value.status_code, caught.value.code) == (422, "image_out_of_memory")
    assert asyncio.run(heard(narrow)) == 8000


def test_who_leaves_ends_the_child_at_once(decoders: Decoders) -> None:
    child = decoders._idle[-1]
    assert child.process is not None
    pid = child.process.pid
    os.kill(pid, signal.SIGSTOP)

    async def leave() -> None:
        async with asyncio.timeout(0.3):
            await heard(decoders)

    with pytest.raises(TimeoutError):
        asyncio.run(leave())
    end_s = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    assert asyncio.run(heard(decoders)) == 8000
    assert len(decoders._idle) == CHILDREN


def test_a_deadline_ends_the_decoding_of_a_request() -> None:
    DECODERS.warm()
    process = DECODERS._idle[-1].process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    response = ask("POST", "/v1/generate", limits=Limits(request_timeout_s=0.5), files={"audio": wav()})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert process.wait(10) == -signal.SIGKILL
    assert ask("POST", "/v1/generate", files={"audio": wav()}).status_code == 200


def test_no_more_are_decoded_at_once_than_there_are_children(decoders: Decoders) -> None:
    async def many() -> int:
        most = 0

        async def one() -> None:
            nonlocal most
            async with decoders.one() as decode:
                most = max(most, CHILDREN - len(decoders._idle))
                await decode(read_audio, upload(wav()), LIMITS, 16_000)

        await asyncio.gather(*(one() for _ in range(8)))
        return most

    assert asyncio.run(many()) == CHILDREN


def test_more_than_may_wait_for_a_decoder_are_told_to_come_back_before_their_files_are_read() -> None:
    narrow = Decoders(LIMITS, waiting=1)
    unread = upload(wav())

    async def late() -> None:
        async with narrow.one() as decode:
            await decode(read_audio, unread, LIMITS, 16_000)

    async def ask() -> list[int]:
        asked = [asyncio.create_task(heard(narrow)) for _ in range(CHILDREN + 1)]
        await asyncio.sleep(0)
        with pytest.raises(ApiError) as caught:
            await late()
        assert (caught.value.status_code, caught.value.code) == (429, "queue_full")
        assert caught.value.headers == {"Retry-After": "7"}
        assert unread.file.tell() == 0
        return await asyncio.gather(*asked)

    assert asyncio.run(ask()) == [8000] * (CHILDREN + 1)
    assert asyncio.run(heard(narrow)) == 8000  # the places are free again


def test_where_no_process_starts_a_request_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError):
        Decoders(LIMITS).warm()
    with pytest.raises(ApiError) as caught:
        asyncio.run(heard(Decoders(LIMITS)))
    assert (caught.value.status_code, caught.value.code) == (503, "no_decoder")
    assert caught.value.headers == {"Retry-After": "7"}


# ---------------------------------------------------------------- mutated files

SAID = {"unreadable", "empty_file", "empty_audio", "no_audio", "unsupported_audio", "too_long", "too_large"}
SAID |= {"decoding_timeout"} | {f"image_{code}" for code in ("unreadable", "too_large", "decoding_timeout")}
"""What a reader may say of any file."""


def rss_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def outcome(child: MediaChild, kind: str, data: bytes, limits: Limits) -> str:
    """`fine`, or the code of the refusal."""
    try:
        if kind in PICTURE_KINDS:
            assert read_image(child, data, limits).mode == "RGB"
        else:
            heard = read_audio(child, data, limits, 16_000)
            assert heard.dtype == np.float32
            assert np.isfinite(heard).all()
            assert np.abs(heard).max() <= 1
    except ApiError as error:
        return error.code if error.status_code == 422 else f"{error.status_code} {error.code}"
    return "fine"


def fuzz(count: int, seed: int) -> tuple[Counter[str], list[float]]:
    """Outcomes by kind, and the memory of the one child in MB after every so many files."""
    limits, codes, memory_mb = Limits(), Counter[str](), []
    with MediaChild(DecodeConfig(timeout_s=limits.decode_timeout_s, max_memory_mb=2048, recycle_after=10**6)) as child:
        child.warm()
        first, longest_s = child.process, 0.0
        for number, (kind, data) in enumerate(mutations(count, seed, SOUND_KINDS + PICTURE_KINDS)):
            begin = time.monotonic()
            said = outcome(child, kind, data, limits)
            longest_s = max(longest_s, time.monotonic() - begin)
            assert said == "fine" or said in SAID, f"{kind} {number}: {said}"
            codes[f"{kind}: {said}"] += 1
            if number % max(1, count // 40) == 0 and child.process is not None:
                memory_mb.append(rss_mb(child.process.pid))
        assert child.process is first, "a file ended the child"
    assert longest_s < limits.decode_timeout_s + 2 * GRACE_S
    print(f"the longest took {longest_s:.2f} s")
    return codes, memory_mb


def test_the_files_that_are_mutated_are_good() -> None:
    with MediaChild(DecodeConfig()) as child:
        for kind in (*SOUND_KINDS, *PICTURE_KINDS):
            assert outcome(child, kind, sound(kind) if kind in SOUND_KINDS else picture(kind), Limits()) == "fine"


def test_mutated_files_are_heard_or_refused() -> None:
    codes, _ = fuzz(540, seed=1)
    assert codes.total() == 540
    assert sum(count for name, count in codes.items() if name.endswith("fine")) > 50
    assert len({name.split(": ")[1] for name in codes}) >= 4


@pytest.mark.slow
def test_bombs_are_heard_or_refused_and_name_no_place_in_memory() -> None:
    limits = Limits(decode_timeout_s=10)
    with MediaChild(DecodeConfig(timeout_s=10, max_memory_mb=2048)) as child:
        child.warm()
        for kind, bombs in (("wav", sound_bombs()), ("png", picture_bombs())):
            for name, data in bombs.items():
                if "scans" not in name:
                    assert outcome(child, kind, data, limits) in {"fine", *SAID}, name
        assert child.process is not None
        assert rss_mb(child.process.pid) < 400


@pytest.mark.slow
def test_a_picture_that_takes_forever_is_ended() -> None:
    """Within one call of its decoder, which no soft limit reaches."""
    with MediaChild(DecodeConfig(timeout_s=0.5)) as child:
        begin = time.monotonic()
        assert outcome(child, "jpeg", scans(20_000), Limits()) == "image_decoding_timeout"
        assert time.monotonic() - begin < 30
        assert outcome(child, "png", png(), Limits()) == "fine"


@pytest.mark.accept
@pytest.mark.timeout(1800)
def test_m5_twenty_thousand_mutated_files_harm_nothing() -> None:
    codes, memory_mb = fuzz(22_500, seed=5)
    for what, count in sorted(codes.items()):
        print(f"{count:5d} {what}")
    print("child MB", [round(mb) for mb in memory_mb])
    assert codes.total() == 22_500
    quarter = len(memory_mb) // 4
    assert max(memory_mb[-quarter:]) <= 1.1 * max(memory_mb[:quarter]) + 16
