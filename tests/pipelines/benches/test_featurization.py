from pathlib import Path

import pytest

from tests.pipelines.benches.conftest import measured


@pytest.mark.accept
def test_featurize_beside_a_plain_pool_and_the_models_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = measured(capsys, tmp_path, "featurize", "--clips", "30", "--set", "repeats=1")
    assert list(result["ratios"]) == ["ray/bare", "ray/models", "bare/models"]
    assert result["inputs"]["clips"] == 30
