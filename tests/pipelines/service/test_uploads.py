"""Uploads are decoded where a hang, a crash or a glutton costs one request."""

import asyncio
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import UploadFile

from pipelines.service.guard import ApiError, Limits
from pipelines.service.uploads import CHILDREN, Decoders, read_audio, read_image
from tests.hostile import png, wav

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


def test_where_no_process_starts_a_request_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError):
        Decoders(LIMITS).warm()
    with pytest.raises(ApiError) as caught:
        asyncio.run(heard(Decoders(LIMITS)))
    assert (caught.value.status_code, caught.value.code) == (503, "no_decoder")
    assert caught.value.headers == {"Retry-After": "7"}
