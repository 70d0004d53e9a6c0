"""The table that MLflow hands to a registered bundle: one row, one picture."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from aai.errors import UserError
from aai.media.limits import ClipError
from aai.painter import Painter
from aai.sampling import PaintRequest
from pipelines import pyfunc_model
from pipelines.pyfunc_model import PainterModel, _load_pyfunc
from pipelines.settings import InputLimits


@pytest.fixture(scope="module")
def model(tiny_bundle: str) -> PainterModel:
    return _load_pyfunc(tiny_bundle)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[PaintRequest]:
    """Painting takes one step, whatever a row says; the requests as they came."""
    seen: list[PaintRequest] = []
    generate: Callable[..., list[Image.Image]] = Painter.generate

    def one_step(painter: Painter, sound: np.ndarray, request: PaintRequest) -> list[Image.Image]:
        seen.append(request)
        return generate(painter, sound, request.model_copy(update={"steps": 1}))

    monkeypatch.setattr(Painter, "generate", one_step)
    return seen


def test_each_row_is_painted_by_its_own_prompt_and_seed(
    model: PainterModel, tone: str, quick: list[PaintRequest]
) -> None:
    audio = Path(tone).read_bytes()
    rows = [{"audio": audio, "seed": 3}, {"audio": audio, "prompt": "a sketch of <sound>"}, {"audio": audio}]
    pictures = model.predict(pd.DataFrame(rows))  # pandas fills what a row lacks with NaN, and makes the seed a float
    assert [(request.prompt, request.seed) for request in quick] == [(None, 3), ("a sketch of <sound>", 0), (None, 0)]
    assert len(set(pictures)) == 3
    assert {Image.open(io.BytesIO(picture)).format for picture in pictures} == {"PNG"}


def test_what_cannot_be_painted_is_refused(
    model: PainterModel, tone: str, quick: list[PaintRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = Path(tone).read_bytes()
    with pytest.raises(ClipError, match="UNREADABLE"):
        model.predict(pd.DataFrame([{"audio": b"no sound"}]))
    with pytest.raises(UserError, match="<elsewhere>"):
        model.predict(pd.DataFrame([{"audio": audio, "prompt": "<elsewhere>"}]))
    with pytest.raises(UserError, match="the row"):
        model.predict(pd.DataFrame([{"audio": audio, "seed": -1}]))
    monkeypatch.setattr(pyfunc_model, "LIMITS", InputLimits(max_bytes=100))
    with pytest.raises(ClipError, match="TOO_LARGE"):
        model.predict(pd.DataFrame([{"audio": audio}]))
