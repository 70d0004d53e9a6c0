"""What a bench may be asked."""

from typing import Any

import pydantic
import pytest

from pipelines.benches.options import BenchConfig


def config(**settings: Any) -> BenchConfig:
    return BenchConfig.model_validate({"name": "curate", **settings})


@pytest.mark.parametrize(
    "settings",
    [{"name": "nothing"}, {"clips": 0}, {"windows": 26}, {"repeats": 0}, {"model": {"size": "huge"}}, {"clip": 3}],
)
def test_what_cannot_be_measured_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        config(**settings)


def test_only_processes_of_one_machine_are_compared() -> None:
    with pytest.raises(pydantic.ValidationError, match=r"cluster\.address must be empty"):
        config(cluster={"address": "auto"})
    assert config(cluster={"num_workers": 5}).plan().resources["workers"].startswith("5 x ")


def test_the_plan_names_the_file_of_this_bench() -> None:
    assert config(out="s3://b/x/", name="decode").plan().outputs == {"figures": "s3://b/x/decode.json"}
