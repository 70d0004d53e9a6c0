"""How costs are taken: warmed up, over long enough, by a clip; and a sample that gives none."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from aai.errors import UserError
from aai.schema import CLIP_TABLE
from pipelines.benches import rates
from pipelines.curation.curate_config import CurateConfig
from pipelines.engine.shards import Stage
from pipelines.manifests.row import ManifestRow


def test_the_first_call_only_warms_up() -> None:
    waits = iter([0.2, *[0.01] * 100])
    per_call_s = rates._per_call_s(lambda: time.sleep(next(waits)), measure_s=0.1)
    assert 0.01 <= per_call_s < 0.05
    calls: list[int] = []
    rates._per_call_s(lambda: calls.append(1), measure_s=0)
    assert len(calls) == 2  # one is measured however little time there is


def test_costs_of_stages_add_up_without_their_first_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring: 10 s for 2 clips, then 1 s for each of 4. Judging: a single shard, 2 s for 4 clips."""
    stages = [
        Stage("curate", 0.0, [(1, 2, 10.0, 12.0), (1, 2, 0.0, 10.0), (1, 2, 12.0, 14.0)]),
        Stage("judge", 14.0, [(1, 4, 14.0, 16.0)]),
    ]

    @contextmanager
    def recorded(bare: bool) -> Iterator[list[Stage]]:
        assert bare
        yield stages

    seen: dict[str, Any] = {}
    monkeypatch.setattr(rates, "recorded", recorded)
    monkeypatch.setattr(rates.curate, "run", lambda config: seen.update(config.model_dump()) or {"chosen": {}})
    rows = [ManifestRow(uri=f"/{i}.mp4", split="test", labels=("dog",), start_s=1.0) for i in range(6)]
    assert rates._curate(rows, str(tmp_path), ["rows_per_shard=99", "flag_only=true"]) == (1.0 + 0.5, {})
    assert (seen["rows_per_shard"], seen["flag_only"], seen["max_reject_ratio"]) == (2, True, 1)
    sample = storage.read_table(seen["manifest"])
    assert sample["uri"].to_pylist() == [row.uri for row in rows]
    assert "split" not in sample.column_names


def test_a_sample_of_which_nothing_is_accepted_says_where_the_reasons_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def accept_none(config: CurateConfig) -> dict[str, Any]:
        storage.write_table(f"{config.out}/accepted/shard-00000.parquet", CLIP_TABLE.empty_table())
        return {"chosen": {}}

    monkeypatch.setattr(rates.curate, "run", accept_none)
    rows = [ManifestRow(uri=f"{tmp_path}/a.mp4", split="train")]
    with pytest.raises(UserError, match=rf"no clip of the sample was accepted; .* {tmp_path}/out/curated/rejected"):
        rates.measure_rates(rows, f"{tmp_path}/out", [], [], 0)


def test_a_member_of_an_archive_or_a_lost_file_has_no_size(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a.mp4", b"12345")
    assert [rates._size(f"{tmp_path}/{name}") for name in ("a.mp4", "gone.mp4", "a.tar#b.mp4")] == [5, 0, 0]
