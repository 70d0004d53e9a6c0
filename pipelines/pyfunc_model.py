"""How `mlflow.pyfunc.load_model("models:/NAME@champion")` opens a registered bundle.

MLflow is told this module's name and the bundle folder (`loader_module`, `data_path`), so nothing is pickled. The
table it takes has one row per sound: `audio` (bytes of a sound file) and optionally `prompt` and `seed`.
"""

from typing import Any

import pandas as pd

from aai.media.decode import decode_audio
from aai.painter import Painter
from aai.png import encode_png
from aai.sampling import PaintRequest
from pipelines.settings import InputLimits

LIMITS = InputLimits()


class PainterModel:
    """A Painter behind MLflow's `predict`."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[bytes]:
        """One PNG file per row. Raises ClipError for sound that cannot be read, UserError for a wrong prompt."""
        return [self._paint(row) for row in model_input.to_dict("records")]

    def _paint(self, row: dict[Any, Any]) -> bytes:
        sound = decode_audio(row["audio"], LIMITS.max_audio_s, LIMITS.max_bytes, self.painter.sample_rate_hz)
        given = {name: row[name] for name in ("prompt", "seed") if not pd.isna(row.get(name))}
        return encode_png(self.painter.generate(sound, PaintRequest.parse(given, source="the row"))[0])


def _load_pyfunc(data_path: str) -> PainterModel:
    """MLflow calls this with the bundle folder."""
    return PainterModel(Painter.load(data_path))
