"""Ways to look better than one is, each planted in the demo's own bundle, data or readers (make accept, L10).

The demo's gates must pass the honest system and stop each of them. AAI_DEMO names the run folder of a finished demo.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
import yaml
from torch import Tensor

from aai import storage
from aai.bundle import read_bundle, write_bundle
from aai.conditions import Conditions
from aai.encoders.audio import AudioEncoder
from aai.features import METADATA_KEY
from aai.painter import Painter
from pipelines import evaluate
from pipelines.evaluate import EvaluateConfig
from pipelines.evaluation.cases import PictureWorker
from pipelines.evaluation.judges import ATTRIBUTES
from pipelines.registry.gates import Gate, check_gate
from tests.pipelines.conftest import run_here

pytestmark = [pytest.mark.accept, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[2]
RUN = Path(os.environ.get("AAI_DEMO", ROOT / "runs" / "accept"))
GATES = yaml.safe_load((ROOT / "configs" / "demo" / "promote.yaml").read_text())["gates"]
COUNTS = {"sound": 200, "ceiling": 100, "nearest_caption": 200, "random_token": 60, "edit": 100,
          "edit_from_noise": 100, "stylize": 60}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def demo() -> None:
    if not (RUN / "adapt" / "bundle").exists():
        subprocess.run([sys.executable, "-m", "pipelines", "demo", "--out", str(RUN)], cwd=ROOT, check=True)


def stopped_by(folder: Path, monkeypatch: pytest.MonkeyPatch, **places: str) -> set[str]:
    """The gates that an evaluation fails, by their figures."""
    run_here(monkeypatch)
    values = {
        "features": str(RUN / "features"), "clips": str(RUN / "curated" / "accepted"), "max_frames": 50,
        "bundle": str(RUN / "adapt" / "bundle"), "out": str(folder / "out"), "pictures": COUNTS,
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"}, **places,
    }  # fmt: skip
    result = evaluate.run(EvaluateConfig.parse(values))
    verdicts = [check_gate(Gate.parse(gate), result) for gate in GATES]
    print([(verdict.gate, verdict.value, verdict.bound) for verdict in verdicts if not verdict.passed])
    return {verdict.gate for verdict in verdicts if not verdict.passed}


def test_l10_the_honest_system_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stopped_by(tmp_path, monkeypatch) == set()


def test_l10_trained_on_the_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in storage.list_files(str(RUN / "features"), ".parquet"):
        table = storage.read_table(file)
        held_out = table.filter(pc.equal(table["split"], "test")).slice(0, 3)
        at = table.schema.get_field_index("split")
        known = held_out.set_column(at, table.schema.field(at), [["train"] * len(held_out)])
        storage.write_table(str(tmp_path / "features" / Path(file).name), pa.concat_tables([table, known]))
        assert METADATA_KEY in (table.schema.metadata or {})
    manifest = storage.read_json(str(RUN / "features" / "manifest.json"))
    storage.write_json(str(tmp_path / "features" / "manifest.json"), manifest)
    failed = stopped_by(tmp_path, monkeypatch, features=str(tmp_path / "features"))
    assert failed == {"retrieval.overlap", "retrieval.near_overlap"}


def test_l10_an_embedding_that_looks_at_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AudioEncoder.parts

    def centred(self: AudioEncoder, waveforms: Tensor, count: int) -> Tensor:
        rows = whole(self, waveforms, count)
        return rows - 0.01 * rows.mean(0, keepdim=True)

    monkeypatch.setattr(AudioEncoder, "parts", centred)
    assert "retrieval.batch_invariance_max_abs" in stopped_by(tmp_path, monkeypatch)


def test_l10_one_token_for_every_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(str(RUN / "adapt" / "bundle"))
    adapter = dict(bundle.adapter() or {})
    last = max(name for name in adapter if name.startswith("net.") and name.endswith(".weight"))
    adapter[last] = adapter[last] * 0
    write_bundle(tmp_path / "bundle", bundle.config, bundle.aligner(), adapter, {})
    failed = stopped_by(tmp_path, monkeypatch, bundle=str(tmp_path / "bundle"))
    assert {"generation.sound.object", "generation.sound.ambience"} <= failed


def test_l10_a_judge_that_says_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole: Callable[..., Any] = PictureWorker.__call__

    def obliging(self: PictureWorker, shard: Any) -> Any:
        files = {file: storage.read_rows(file, rows).to_pylist() for file, rows in shard.inputs.items()}
        labels = {row["row"]: row["labels"] for rows in files.values() for row in rows}
        wanted = [dict(zip(ATTRIBUTES, labels[case.row], strict=False)) for case in shard.cases]

        class Yes:
            def read(self, _pictures: Any) -> list[dict[str, Any]]:
                return [{**row, "size": 0.5} for row in wanted]

        self.judge = Yes()
        return whole(self, shard)

    monkeypatch.setattr(PictureWorker, "__call__", obliging)
    assert "generation.random_token.object" in stopped_by(tmp_path, monkeypatch)


def test_l10_an_edit_that_ignores_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_noise(self: Painter, _verb: str, target: Tensor, _source: Tensor, _images: Any, *how: Any) -> Any:
        return self.paint(target, *how[:2])

    monkeypatch.setattr(Painter, "repaint", from_noise)
    assert "generation.edit.given_nearer" in stopped_by(tmp_path, monkeypatch)


def test_l10_a_lookup_in_the_place_of_hearing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The nearest caption of training is painted: as good at objects and ambiences as the system."""
    whole = Conditions.embed

    def lookup(self: Conditions, condition: str, clips: Any) -> Tensor:
        return whole(self, "nearest_caption" if condition == "sound" else condition, clips)

    monkeypatch.setattr(Conditions, "embed", lookup)
    assert "generation.uncaptioned.above_nearest_caption.low" in stopped_by(tmp_path, monkeypatch)
