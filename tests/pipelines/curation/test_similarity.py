import numpy as np
import pytest

from pipelines.curation.similarity import Null


def test_false_pairs_set_the_threshold() -> None:
    rng = np.random.default_rng(1)
    null = Null(rng.uniform(-1, 0.5, 10_000), rng.uniform(0.4, 1, 1000), false_accept_rate=0.1)
    assert null.threshold == pytest.approx(0.35, abs=0.02)
    assert null.against(None) is None
    assert null.against(0.9) is None
    message = null.against(0.2)
    assert message is not None
    assert message.startswith("av_similarity 0.200 is below 0.3")
    assert "20% of shuffled pairs" in message
    figures = null.describe()
    assert sum(figures["null"]) == 10_000
    assert sum(figures["matched"]) == 1000
    assert figures["share_below"] == 0
