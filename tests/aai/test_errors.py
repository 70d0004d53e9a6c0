"""A user's mistake is one line that names the setting, its value, the rule and the remedy."""

import pickle

from aai.errors import UserError


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
