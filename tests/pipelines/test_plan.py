import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from aai import storage
from aai.errors import UserError
from pipelines import plan
from pipelines.__main__ import main
from pipelines.benches.rates import Rates
from pipelines.plan import CapacityConfig
from tests.clips import make_moving
from tests.tiny import write_sizes

RATES = Rates(
    sample=64, accepted_share=0.5, frames=8, curate_cpu_s=0.1, prepare_cpu_s=0.02, images_per_s=10.0,
    latents_per_s=5.0, device="cpu", read_bytes=1e6, curated_bytes=1e5, working_bytes=1e4, feature_bytes=2e4,
    chosen={"decode.frame_size_px": "512 (auto: so the foundation wants it)"},
)  # fmt: skip


def planned(rates: Rates = RATES, clips: int = 3600, **settings: Any) -> dict[str, Any]:
    return plan.calculate(rates, CapacityConfig.parse({"efficiency": 1.0, **settings}), clips)


def test_cpus_that_a_gpu_needs() -> None:
    """A GPU second per clip of 8 / 2000 + 1 / 1000 = 5 ms; featurize takes 20 ms of a CPU around it."""
    result = planned(gpu_images_per_s=2000, gpu_latents_per_s=1000)
    assert result["needs"] == {"cpus_per_gpu_featurize": 4.0, "cpus_per_gpu_with_curate": 44.0}


def test_hours_on_shapes_rich_and_poor_in_cpus() -> None:
    shapes = {"rich": {"cpus": 100, "gpus": 1}, "poor": {"cpus": 2, "gpus": 1}}
    result = planned(gpu_images_per_s=2000, gpu_latents_per_s=1000, shapes=shapes)["shapes"]
    rich, poor = result["rich"], result["poor"]
    assert rich["curate_h"] == pytest.approx(3.6 / 3600)  # 3600 x 0.1 s on 100 CPUs
    assert rich["featurize_h"] == pytest.approx(9 / 3600)  # 1800 x 5 ms on the GPU
    assert rich["featurize_waits_for"] == "GPU"
    assert rich["side_by_side_h"] == pytest.approx(9 / 3600)
    assert rich["gpu_busy_side_by_side"] == 1.0
    assert poor["featurize_h"] == pytest.approx(18 / 3600)  # 1800 x 20 ms on 2 CPUs
    assert poor["featurize_waits_for"] == "CPU"
    assert poor["gpu_busy_featurize"] == 0.5
    assert poor["side_by_side_h"] == pytest.approx((180 + 18) / 3600)
    assert rich["read_mb_per_s_per_node"] == pytest.approx(1000)
    four = planned(gpu_images_per_s=2000, gpu_latents_per_s=1000, shapes=shapes, nodes=4, efficiency=0.5)["shapes"]
    assert four["rich"]["one_after_the_other_h"] == pytest.approx(12.6 / 3600 / 2)


def test_what_is_not_known_is_said() -> None:
    result = planned()
    assert result["needs"] == {}
    assert "no GPU here" in result["assumed"][0]
    assert result["shapes"]["cpu_poor"]["featurize_waits_for"] == "CPU"
    assert result["shapes"]["cpu_poor"]["featurize_h"] == pytest.approx(1800 * (0.02 + 0.8 + 0.2) / 8 / 3600)
    scaled = planned(gpu_images_per_s=1000)
    assert "500 pictures/s through the VAE (scaled" in scaled["assumed"][1]
    measured = Rates(**{**RATES.__dict__, "device": "cuda"})
    assert "10 pictures/s through CLIP (measured)" in planned(measured)["assumed"][0]
    with pytest.raises(UserError, match="has no GPU"):
        planned(measured, shapes={"bare": {"cpus": 4}})


def test_storage_counts_clips_and_accepted_ones() -> None:
    stored = planned(clips=1_000_000)["storage_gb"]
    assert stored == {"input": 1000, "accepted and rejected": 100, "kept for later runs": 10, "features": 10}


def test_the_command_measures_a_sample_and_plans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--clips", "100000", "--nodes", "3"]
    sets = ["sample=8", "measure_s=0", "gpu_images_per_s=2500"]
    assert main(["plan", *words, *[word for setting in sets for word in ("--set", setting)]]) == 0
    result = json.loads((tmp_path / "plan.json").read_text())
    measured = result["measured"]
    assert measured["sample"] == 8
    assert 0 < measured["accepted_share"] <= 1
    assert measured["frames"] == 4
    for name in ("curate_cpu_s", "prepare_cpu_s", "images_per_s", "latents_per_s", "read_bytes", "feature_bytes"):
        assert measured[name] > 0, name
    assert (result["clips"], result["nodes"]) == (100_000, 3)
    text = capsys.readouterr().out
    for part in ("measured here", "assumed:", "CPUs a GPU needs", "cpu_rich", "cpu_poor", "storage, GB:"):
        assert part in text
    assert "decode.frame_size_px    64 (auto: foundation.clip takes 64 px" in text
    assert "encoder.clip_s          2 (auto: " in text
    assert [(row["stage"], row["shape"], row["workers"]) for row in result["trainings"]] == [
        ("align", "cpu_rich", 2), ("align", "cpu_poor", 2), ("adapt", "cpu_rich", 2), ("adapt", "cpu_poor", 2)
    ]  # fmt: skip
    assert all(row["hours"] > 0 and row["gb_per_worker"] > 0 for row in result["trainings"])
    assert "trainings, by configs/demo/align.yaml and configs/demo/adapt.yaml" in text


def test_the_sample_is_curated_for_the_foundation_that_is_planned_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        storage.write_bytes(str(tmp_path / f"media/{name}.mp4"), make_moving(num_frames=10, fps=10, seed=ord(name)))
    foundation = write_sizes(tmp_path / "foundation", size=96, crop=96, latents=12)
    sets = (f"foundation.clip={foundation.clip}", f"foundation.diffusion={foundation.diffusion}")
    with pytest.raises(UserError, match="cannot be loaded"):  # after curating: there are no weights
        plan.run(CapacityConfig(manifest=str(tmp_path / "media"), out=str(tmp_path / "out"), featurize=sets))
    frames = storage.read_table(str(tmp_path / "out/sample/curated/accepted"))["frames"]
    assert {Image.open(io.BytesIO(row[0])).size for row in frames.to_pylist()} == {(128, 96)}


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--manifest", str(tmp_path / "none.csv"), "--out", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["plan", "--set", "shapes={a: {cpu: 3}}"]) == 2
    assert "shapes.a.cpus" in capsys.readouterr().err
