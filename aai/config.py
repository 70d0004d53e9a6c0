"""Configs: one YAML file and `--set a.b=c` overrides become one frozen pydantic model.

OmegaConf reads the YAML, resolves `${...}` and merges the overrides; pydantic checks names, types and ranges.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import pydantic
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from aai.errors import UserError


class Config(pydantic.BaseModel):
    """Base of every config: frozen, and an unknown key is an error. Field docstrings become the help text."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _sections_keep_their_defaults(cls, given: object) -> object:
        """A section given in part keeps the rest of its default here, which may differ from its class's own."""
        if not isinstance(given, dict):
            return given
        filled = {}
        for name, field in cls.model_fields.items():
            if isinstance(field.default, Config) and isinstance(given.get(name), dict):
                filled[name] = {**field.default.model_dump(exclude_unset=True), **given[name]}
        return {**given, **filled}

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = (), values: Mapping[str, object] | None = None) -> Self:
        """Reads a YAML file and applies dotted overrides (`train.batch_size=8`), then `values` as they are.

        Raises UserError naming the key, its value, the rule and the remedy.
        """
        if not Path(path).is_file():
            raise UserError("config", path, "no such file", "give a YAML file, e.g. one of configs/demo/")
        for override in overrides:
            if "=" not in override:
                raise UserError("--set", override, "is not KEY=VALUE", "write it as --set section.key=value")
        try:
            base = OmegaConf.load(path)
            if not OmegaConf.is_dict(base):
                raise ValueError("is not a mapping of settings")
            for key in (text.split("=", 1)[0] for text in overrides if "={" in text):
                if not cls._is_section(key.split(".")):  # a mapping that is given is the whole mapping
                    OmegaConf.update(base, key, {}, merge=False)
            merged = OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))
            for key, value in (values or {}).items():
                OmegaConf.update(merged, key, value)
            data = cast(dict[str, Any], OmegaConf.to_container(merged, resolve=True))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
            rule = str(error).split("\n")[0]
            raise UserError("config", path, rule, "mend the YAML file or the override") from error
        return cls.parse(data, source=str(path))

    @classmethod
    def _is_section(cls, path: Sequence[str]) -> bool:
        """Whether a dotted name is a section of settings, which keeps what an override does not name."""
        field = cls.model_fields.get(path[0])
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, Config)):
            return False
        return len(path) == 1 or kind._is_section(path[1:])

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "config") -> Self:
        """Validates plain data; pydantic's first complaint becomes a UserError."""
        try:
            return cls.model_validate(data)
        except pydantic.ValidationError as error:
            raise _user_error(cls, error, source) from error

    def digest(self) -> str:
        """A short hash of all settings: equal settings, equal digest."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The resolved settings as YAML."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))


def _user_error(cls: type[Config], error: pydantic.ValidationError, source: str) -> UserError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        known = _keys_at(cls, [str(part) for part in first["loc"][:-1]])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return UserError(key, first["input"], f"unknown key ({source})", remedy)
    remedy = f"give it there, or pass --set {key}=..."
    if first["type"] == "missing":
        return UserError(key, "(missing)", f"required setting is absent ({source})", remedy)
    return UserError(key, first["input"], f"{first['msg']} ({source})", remedy)


def _keys_at(cls: type[pydantic.BaseModel], path: list[str]) -> list[str]:
    """The field names of the (nested) model at a path; empty when the path leaves the models."""
    for part in path:
        if part.isdigit():  # a place in a list
            continue
        field = cls.model_fields.get(part)
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        if not models:
            return []
        cls = models[0]
    return list(cls.model_fields)
