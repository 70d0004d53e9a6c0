"""Every setting of every command is read by the code that the command runs: a setting that nothing reads is a lie."""

import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Literal, get_args

import pydantic
import pytest

from aai.config import Config
from pipelines.__main__ import VERBS, load_config, module_of, settings_help
from pipelines.bench import MODULES
from pipelines.demo import DemoConfig, stage_settings
from pipelines.settings import ClusterConfig, RayVerbConfig, VerbConfig
from tests.typed_reads import Program

STARTS = {
    "serve": ["pipelines.serve.build_app"],  # a Serve config names it
    "bench": [f"pipelines.benches.{module}.measure" for name, module in MODULES.items() if name != "decode"],
}
"""Where a command's code begins besides `run`, which finds it by its name."""
NO_USE = {"plan", "content", "content_digest", "digests"}
"""Methods of a config that only show, or fingerprint, what is set."""
ONLY_REFERRED_TO = {"run_dir"}
"""Settings that other settings refer to, as ${run_dir}."""
CARRIED = {("adapt", "vocabulary"): "edit"}
"""Sections that travel in the bundle as a whole, and a command that reads them there."""
SAME_FILE = {"jobs": "submit"}
"""A command whose config file is another one's, which reads what it does not."""
PLANTED = """
import pydantic
from aai.config import Config
from pipelines.settings import Plan, VerbConfig
from planted_far import Far, far

class Section(Config):
    used: int = 1
    unused: int = 1

class Dumped(Config):
    inner: int = 1

class PlantedConfig(VerbConfig):
    section: Section = Section()
    maybe: Section | None = None
    many: dict[str, Section] = {}
    dumped: Dumped = Dumped()
    shown: int = 1
    checked: int = 1
    hashed: int = 1
    derived: int = 1
    by_text: int = 1
    by_other_text: int = 1
    of_namesake: int = 1
    of_other_verb: int = 1
    far: Far = Far()

    def plan(self) -> Plan:
        return Plan(inputs={"a": str(self.shown)}, outputs={}, resources={})

    @pydantic.model_validator(mode="after")
    def _check(self) -> "PlantedConfig":
        assert self.checked
        return self

    def content_digest(self) -> str:
        return str(self.hashed)

    @property
    def doubled(self) -> int:
        return 2 * self.derived

class Namesake:
    of_namesake = 1

def run(config: PlantedConfig) -> dict[str, object]:
    found: dict[str, object] = {"used": config.section.used, "doubled": config.doubled, "hash": config.content_digest()}
    found |= config.dumped.model_dump() | {"namesake": Namesake().of_namesake}
    found |= {name: getattr(config, name) for name in ("by_text",)}
    return found | {"maybe": config.maybe, "many": len(config.many), "far": far(config.far)}

def run_other(config: PlantedConfig) -> int:
    return config.of_other_verb
"""
PLANTED_FAR = """
from aai.config import Config

class Far(Config):
    near: int = 1
    lost: int = 1

class Worker:
    def __init__(self, config: Far) -> None:
        self.config = config

    def __call__(self) -> int:
        return self.config.near

def far(config: Far) -> object:
    return Worker(config)

def unused(config: Far) -> int:
    return config.lost
"""


@functools.cache
def program() -> Program:
    """Our code and the planted modules, read once (seconds)."""
    return Program({"planted": PLANTED, "planted_far": PLANTED_FAR})


def sections(kind: object) -> Iterator[type[pydantic.BaseModel]]:
    """The config classes in a type."""
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        yield kind
    for part in get_args(kind):
        yield from sections(part)


def settings(cls: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, type, str]]:
    """(dotted name, the class that has it, its name there) of every setting and section."""
    for name, field in cls.model_fields.items():
        yield f"{prefix}{name}", cls, name
        for section in sections(field.annotation):
            yield from settings(section, f"{prefix}{name}.")


def unread(config: type[pydantic.BaseModel], *roots: str) -> list[str]:
    """The settings that no code that the roots lead to reads."""
    units = program().reached(roots)
    found = program().reads(unit for unit in units if unit.rpartition(".")[2] not in NO_USE)
    return [dotted for dotted, cls, name in settings(config) if not program().akin(cls, found.get(name, ()))]


def unread_by(verb: str, config: type[pydantic.BaseModel]) -> list[str]:
    """The settings that a command's code does not read."""
    return unread(config, f"pipelines.{verb}.run", *STARTS.get(verb, ()))


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_read_by_its_command(verb: str) -> None:
    config = module_of(verb).CONFIG
    left = set(unread_by(verb, config)) - ONLY_REFERRED_TO
    for (stage, section), reader in CARRIED.items():
        if stage == verb:
            (cls,) = sections(config.model_fields[section].annotation)
            carried = {f"{section}.{name}" for name in cls.model_fields}
            assert carried <= left, "no exception is needed"
            assert unread_by(reader, cls) == []
            left -= carried
    if verb in SAME_FILE:
        left &= set(unread_by(SAME_FILE[verb], module_of(SAME_FILE[verb]).CONFIG))
    assert left == set()


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_every_setting(verb: str) -> None:
    """Also those of sections that may be absent, and of each of many (`gates[].metric`)."""
    config = module_of(verb).CONFIG
    known = {dotted for dotted, cls, name in settings(config) if not is_section(cls, name)}
    named = [line.split()[0].replace("[]", "") for line in settings_help(config)]
    assert len(named) == len(set(named))
    assert set(named) == known


def is_section(cls: type[pydantic.BaseModel], name: str) -> bool:
    """Whether a setting is always a section, which needs no line of its own."""
    kind = cls.model_fields[name].annotation
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


class Inner(Config):
    """A section."""

    steps: int = 1
    """How many."""


class Outer(Config):
    """Settings of every form."""

    mode: Literal["fast", "exact"] = "fast"
    modes: tuple[Literal["a", "b"], ...] = ()
    many: list[Inner]
    often: Inner = Inner(steps=7)
    maybe: Inner | None = None


def test_help_tells_choices_sections_and_the_defaults_that_hold() -> None:
    assert settings_help(Outer) == [
        "  mode [fast] fast|exact",
        "  modes [()] a|b",
        "  many (required)",
        "  many[].steps [1]  How many.",
        "  often.steps [7]  How many.",
        "  maybe [None]",
        "  maybe.steps [1]  How many.",
    ]


def test_the_demo_hands_its_cluster_to_its_stages() -> None:
    cluster = ClusterConfig(address="auto", num_workers=3, cpus_per_worker=0.5, gpus_per_worker=1)
    demo = DemoConfig(run_dir="r", cluster=cluster, overrides={"align": ("cluster.num_workers=1",)})
    for verb in ("curate", "featurize", "align", "evaluate"):
        config, _ = load_config(verb, stage_settings(demo, verb))
        assert isinstance(config, RayVerbConfig)
        workers = 1 if verb == "align" else 3
        assert config.cluster.model_dump().items() >= {**cluster.model_dump(), "num_workers": workers}.items()
    assert stage_settings(demo, "promote") == ["--set", "run_dir=r"]
    config, _ = load_config("curate", stage_settings(DemoConfig(), "curate"))
    assert isinstance(config, RayVerbConfig)
    assert config.cluster.address is None


@pytest.mark.parametrize("verb", VERBS)
def test_no_default_is_left_with_a_reference(verb: str) -> None:
    """Also where no file is loaded, so that OmegaConf resolves nothing."""
    cls: type[VerbConfig] = module_of(verb).CONFIG
    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    many = {"gates": [{"metric": "x", "min": 0}], "stages": [{"verb": "curate", "config": "c.yaml"}]}
    given = {name: many.get(name, "curate") for name in required}
    config = cls.model_validate({**given, "run_dir": "r"})
    assert "${" not in config.model_dump_json()
    for name, field in cls.model_fields.items():
        if "${run_dir}" in str(field.default):
            assert getattr(config, name) == field.default.replace("${run_dir}", "r")
            assert getattr(cls.model_validate(given), name).startswith("runs/demo/")
            assert getattr(cls.model_validate({**given, name: "mine"}), name) == "mine"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> type[VerbConfig]:
    """The config class of the planted module, which mypy has read as text."""
    for name, text in {"planted_far": PLANTED_FAR, "planted": PLANTED}.items():
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(text, module.__dict__)
    return module.PlantedConfig  # type: ignore[no-any-return]


def test_planted_settings_that_nothing_reads_are_seen(planted: type[VerbConfig]) -> None:
    """Shown, checked, hashed, dumped, or read of a namesake, by another command or by what nobody calls is not read."""
    sections = ["section.unused", "maybe.unused", "many.unused", "dumped.inner"]
    own = ["shown", "checked", "hashed", "by_other_text", "of_namesake", "of_other_verb"]
    assert unread(planted, "planted.run") == ["run_dir", *sections, *own, "far.lost"]
    other = unread(planted, "planted.run_other")
    assert "of_other_verb" not in other
    assert {"section.used", "derived", "far", "far.near"} <= set(other)


def test_an_unknown_start_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"planted\.walk"):
        program().reached(["planted.walk"])
