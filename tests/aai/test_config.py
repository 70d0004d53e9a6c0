"""aai.config: YAML + overrides become one frozen model; every mistake names key, value, rule and remedy."""

from pathlib import Path

import pydantic
import pytest

from aai.config import Config
from aai.errors import UserError


class Inner(Config):
    """A section."""

    batch_size: int = pydantic.Field(4, ge=1)
    """Rows per step."""
    seed: int = 0


class Outer(Config):
    """A whole file."""

    run_dir: str
    out: str = "x"
    train: Inner = Inner()
    maybe: Inner | None = None
    longer: Inner = Inner(batch_size=9)
    counts: dict[str, int] = pydantic.Field({})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid settings file."""
    path = tmp_path / "c.yaml"
    path.write_text("run_dir: r\nout: ${run_dir}/o\ntrain: {batch_size: 8}\n")
    return path


def complaint(file: Path, *overrides: str) -> str:
    """The message of the UserError that loading with these overrides raises."""
    with pytest.raises(UserError) as caught:
        Outer.load(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_yaml_then_overrides_then_values(file: Path) -> None:
    config = Outer.load(file, ["train.batch_size=16", "run_dir=q"], {"train.batch_size": 32})
    assert (config.run_dir, config.out, config.train.batch_size) == ("q", "q/o", 32)


def test_a_section_given_in_part_keeps_the_rest_of_its_default(file: Path) -> None:
    assert Outer.load(file, ["longer.seed=3"]).longer == Inner(batch_size=9, seed=3)
    assert Outer.load(file, ["longer.batch_size=2"]).longer == Inner(batch_size=2)
    assert Outer.load(file, ["train.seed=3"]).train == Inner(batch_size=8, seed=3)
    assert Outer.load(file, ["maybe.seed=3"]).maybe == Inner(seed=3)
    assert Outer(run_dir="r", longer=Inner()).longer == Inner()  # a whole section is what it is


def test_a_mapping_that_is_given_is_the_whole_mapping(file: Path) -> None:
    file.write_text("run_dir: r\ncounts: {a: 1, b: 2}\ntrain: {batch_size: 8}\n")
    assert Outer.load(file, ["counts={b: 3}"]).counts == {"b": 3}
    assert Outer.load(file, ["counts={b: 3}", "counts.c=4"]).counts == {"b": 3, "c": 4}
    assert Outer.load(file, ["counts.b=3"]).counts == {"a": 1, "b": 3}
    assert Outer.load(file, ["train={seed: 3}"]).train == Inner(batch_size=8, seed=3)
    assert "nothere" in complaint(file, "nothere={a: 1}")


def test_environment_is_read_when_loaded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("run_dir: ${oc.env:AAI_TEST_DIR,plain}\n")
    assert Outer.load(file).run_dir == "plain"
    monkeypatch.setenv("AAI_TEST_DIR", "s3://bucket/x")
    assert Outer.load(file).run_dir == "s3://bucket/x"


def test_unknown_key_suggests_the_near_one(file: Path) -> None:
    assert "did you mean 'batch_size'" in complaint(file, "train.batch_sise=1")
    assert "did you mean 'batch_size'" in complaint(file, "maybe.batch_sise=1")
    assert "known keys: counts, longer, maybe, out, run_dir, train" in complaint(file, "zzzzzz=1")


def test_bad_value_names_key_value_and_rule(file: Path) -> None:
    message = complaint(file, "train.batch_size=0")
    assert "train.batch_size=0" in message
    assert "greater than or equal to 1" in message
    assert "--set train.batch_size" in message
    assert "train.batch_size=many" in complaint(file, "train.batch_size=many")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out: y\n", "run_dir=(missing)"),
        ("run_dir: ${nothing.here}\n", "Interpolation"),
        ("run_dir: [unclosed\n", "mend the YAML file"),
        ("- a\n- b\n", "is not a mapping of settings"),
    ],
)
def test_broken_files(file: Path, text: str, expected: str) -> None:
    file.write_text(text)
    assert expected in complaint(file)


def test_malformed_override_and_missing_file(file: Path, tmp_path: Path) -> None:
    assert "KEY=VALUE" in complaint(file, "train.batch_size")
    assert "no such file" in complaint(tmp_path / "absent.yaml")


def test_frozen_and_digest(file: Path) -> None:
    config = Outer.load(file)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.out = "z"
    assert config.digest() == Outer.load(file).digest()
    assert config.digest() != Outer.load(file, ["out=z"]).digest()


def test_yaml_round_trip(file: Path, tmp_path: Path) -> None:
    config = Outer.load(file, ["train.batch_size=3"])
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert Outer.load(again) == config


def test_docstrings_become_descriptions() -> None:
    assert Inner.model_fields["batch_size"].description == "Rows per step."
