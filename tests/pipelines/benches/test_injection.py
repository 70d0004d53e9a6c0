"""`aai bench inject` runs on any machine and adds its parts up."""

import json
from pathlib import Path

import pytest

from pipelines.__main__ import main


def test_the_parts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["model.size=tiny", "repeats=1", f"out={tmp_path}"]
    assert main(["bench", "inject", *[word for setting in sets for word in ("--set", setting)]]) == 0
    result = json.loads((tmp_path / "inject.json").read_text())
    ms, ratios = result["figures"], result["ratios"]
    whole_ms = 25 * ms["unet_step_ms"] + ms["vae_decode_ms"] + 2 * ms["plain_prompt_ms"]
    assert ms["generation_s"] == pytest.approx(whole_ms / 1e3, rel=0.01)
    injected_ms = ms["adapter_ms"] + ms["injected_prompt_ms"] - ms["plain_prompt_ms"]
    assert ratios["injection_and_adapter/generation"] == pytest.approx(injected_ms / whole_ms, abs=0.002)
    with_encoder = ratios["with_audio_encoder/generation"]
    assert with_encoder == pytest.approx((injected_ms + ms["audio_encoder_ms"]) / whole_ms, abs=0.002)
    assert "injection_and_adapter" in capsys.readouterr().out
