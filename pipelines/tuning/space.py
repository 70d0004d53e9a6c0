"""What a sweep tries: distributions of a stage's settings, and the values that are drawn from them."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pydantic

from aai.config import Config

Value = bool | int | float | str | None
Settings = dict[str, Value]
"""Values of settings by dotted name."""
DIGITS = 4
"""Significant digits of a drawn number: as many as a table shows and a person types."""
TRIES = 100


class Distribution(Config):
    """Where the values of one setting are drawn from: exactly one of the three."""

    choice: tuple[Value, ...] | None = None
    """One of these values, each as likely as another."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    log_uniform: tuple[float, float] | None = None
    """A number between these two, each order of magnitude as likely as another; both are above 0."""

    @pydantic.model_validator(mode="after")
    def _is_one(self) -> "Distribution":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of choice: [...], uniform: [low, high], log_uniform: [low, high]")
        if self.choice == ():
            raise ValueError("choice has no values")
        low, high = self.log_uniform or self.uniform or (0.0, 1.0)
        if not low < high:
            raise ValueError("its first number must be below its second")
        if self.log_uniform and low <= 0:
            raise ValueError("log_uniform needs numbers above 0")
        return self

    def ends(self) -> tuple[Value, ...]:
        """All values of a choice, else the two ends: a setting that takes these takes what lies between."""
        return self.choice or self.log_uniform or self.uniform or ()

    def draw(self, random: np.random.Generator) -> Value:
        """One value; a number has DIGITS significant digits."""
        if self.choice is not None:
            return self.choice[int(random.integers(len(self.choice)))]
        if self.log_uniform is not None:
            low, high = self.log_uniform
            number = math.exp(random.uniform(math.log(low), math.log(high)))
        else:
            low, high = self.uniform or (0.0, 1.0)
            number = random.uniform(low, high)
        return min(high, max(low, float(f"{number:.{DIGITS}g}")))

    def __str__(self) -> str:
        if self.choice is not None:
            return f"one of {', '.join(map(str, self.choice))}"
        low, high = self.ends()
        return f"{'log-uniform' if self.log_uniform else 'uniform'} in {low:g} .. {high:g}"


def by_dotted_name(given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A space with dotted names, from one whose names are nested too: `--set space.fit.steps.choice=[9]` makes such."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            found |= by_dotted_name(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def drawn(space: Mapping[str, Distribution], base: Settings, trials: int, seed: int) -> Iterator[Settings]:
    """The settings of trials 1, 2, ...: as many as `trials` - 1, fewer where the space has no more that differ.

    base: what the settings are without a sweep, which is trial 0. A trial's settings depend on the seed and on its
    number: more trials begin with the same ones.
    """
    seen = [base]
    for number in range(1, trials):
        for attempt in range(TRIES):
            random = np.random.default_rng((seed, number, attempt))
            settings = {name: space[name].draw(random) for name in sorted(space)}
            if settings not in seen:
                break
        else:
            return
        seen.append(settings)
        yield settings
