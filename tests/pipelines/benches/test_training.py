"""A stage's training on Ray and without it: figures made of turns, and the whole bench, small, on real Ray."""

from pathlib import Path

import pytest

from pipelines.benches.training import _check_losses, summarise
from pipelines.benches.turns import Record, Turn
from tests.pipelines.benches.conftest import measured


def record(seconds: list[float], cpu_s: float, peak_gb: float | None = None) -> Record:
    return Record(0.0, 1.0, 1, [Turn(value, value / 10, cpu_s) for value in seconds], peak_gb)


def test_figures_are_medians_of_turns_and_ratios_of_pairs() -> None:
    """Turns of 2 steps of 8 clips."""
    records = {
        "ray": [record([1.0, 2.0, 9.0], 0.6), record([1.0, 2.0, 9.0], 0.4)],
        "bare": [record([1.0, 4.0, 3.0], 0.5), record([1.0, 4.0, 3.0], 0.3)],
    }
    figures, ratios = summarise(records, clips=8, steps=2)
    assert figures["ray_step_ms"] == 1000.0
    assert figures["bare_step_ms"] == 1500.0
    assert figures["ray_clips_per_s"] == 8.0
    assert (figures["ray_step_cpu_ms"], figures["bare_step_cpu_ms"]) == (500.0, 400.0)  # of both ranks
    assert figures["ray_data_wait_share"] == pytest.approx(0.1)
    assert ratios["ray_step/bare_step"] == 1.0  # of 1, 0.5 and 3: not 1000 / 1500
    assert ratios["ray_step_cpu/bare_step_cpu"] == 1.25
    assert "ray_gpu_peak_gb" not in figures
    assert figures["each_ray_step/bare_step"] == [1.0, 0.5, 3.0]
    records["ray"] = [record([1.0, 2.0, 3.0], 1.0, 3.0), record([1.0, 2.0, 3.0], 1.0, 4.0)]
    assert summarise(records, 8, 2)[0]["ray_gpu_peak_gb"] == 4.0


def test_two_histories_of_different_trainings_are_no_comparison() -> None:
    entries = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    _check_losses([*entries, {"step": 2, "val_a": 1.0}], [{"step": 1, "loss": 2.000001}, entries[1]])
    for other in ([entries[0], {"step": 2, "loss": 1.1}], entries[:1]):
        with pytest.raises(RuntimeError, match="differ"):
            _check_losses(entries, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "own"), [("align", []), pytest.param("adapt", ["loss.denoise_rows=4"], marks=pytest.mark.accept)]
)
def test_a_small_bench_on_real_ray(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], name: str, own: list[str]
) -> None:
    out = tmp_path_factory.getbasetemp() / "bench-training"  # both stages train on the same features
    sets = ["model.size=tiny", "repeats=1", "train.steps=2", "train.pairs=1"]
    sets.append(f"overrides=[{','.join(['fit.batch_size=8', *own])}]")
    words = [word for setting in sets for word in ("--set", setting)]
    result, lines = measured(capsys, out, name, "--clips", "30", *words)
    figures, ratios = result["figures"], result["ratios"]
    assert list(ratios)[:3] == ["ray_step/bare_step", "ray_step_cpu/bare_step_cpu", "ray_other_processes/all_cores"]
    assert any("towers" in ratio for ratio in ratios)
    for group in ("ray", "bare"):
        assert figures[f"{group}_clips_per_s"] > 0
        assert figures[f"{group}_start_s"] > 0
        assert 0 <= figures[f"{group}_data_wait_share"] < 1
        assert len(figures[f"{group}_each_step_ms"]) == 1
    cores = result["machine"]["cores"]
    assert ratios["ray_other_processes/all_cores"] == pytest.approx(figures["ray_other_processes_cpus"] / cores, 1e-3)
    assert result["inputs"]["clips_per_step"] == 8
    assert any(line.startswith("ray_step/bare_step") for line in lines)
    assert not (Path(out) / name / "ray" / "bundle").exists()
