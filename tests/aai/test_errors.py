"""A user's mistake is one line that names the setting, its value, the rule and the remedy."""

import pickle
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from aai.errors import UserError, room_explained


def test_a_mistake_is_one_line_whatever_stands_in_it() -> None:
    error = UserError("clips.csv", "a\n  b", "row 3:\n is\ttorn", "mend it")
    assert str(error) == "clips.csv=a b: row 3: is torn; mend it"
    assert isinstance(error, ValueError)


def test_a_mistake_found_in_another_process_is_the_same_here() -> None:
    error = pickle.loads(pickle.dumps(UserError("seed", -1, "is below 0", "raise it")))
    assert (type(error), error.setting, error.value, error.rule, error.remedy) == (
        UserError, "seed", -1, "is below 0", "raise it",
    )  # fmt: skip
    assert str(error) == "seed=-1: is below 0; raise it"


def test_a_full_disk_is_a_users_to_mend_also_where_a_library_in_rust_tells_of_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with (
            pytest.raises(UserError, match=r"disk=here: is full \(.*os error.*make room there"),
            room_explained("here"),
        ):
            save_file({"weights": np.zeros(1000, np.float32)}, tmp_path / "weights.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(FileNotFoundError), room_explained("here"):
        Path("/nowhere/at/all").read_bytes()
