"""What a walk found, in lines."""

from collections.abc import Mapping
from typing import Any

from pipelines.registry.versions import SHA_TAG, Version
from pipelines.tracing.walks import Origin, Spread


def print_origin(origin: Origin, found: list[Version]) -> None:
    """Prints the way back from a bundle."""
    for version in found:
        print(f"version {version.version} of {version.model}{named(version)}  bundle {origin.bundle}")
    for training in origin.trainings:
        print(
            f"  {training.stage:<6} run {training.run_id} ({training.experiment}) made {training.made or 'this data'}"
        )
        print(f"         read {training.features} (fingerprint {training.fingerprint})")
    counts = ", ".join(f"{count} of {split}" for split, count in sorted(origin.by_split().items()))
    print(f"  clips  {counts or 'none known'}")
    for reason in origin.unknown:
        print(f"  unknown: {reason}")


def print_spread(spread: Spread) -> None:
    """Prints the ways on from clips."""
    for holding in spread.holdings:
        counts = ", ".join(f"{count} of {split or 'no split'}" for split, count in sorted(holding.by_split().items()))
        print(f"{holding.kind:<10} {holding.uri}: {counts}")
    for training in spread.trainings:
        made = f"made {training.made}" if training.made else training.status
        print(f"{training.stage:<10} run {training.run_id} ({training.experiment}), {made}")
    for version in spread.versions:
        print(
            f"version    {version.version} of {version.model}{named(version)}  bundle {version.tags.get(SHA_TAG, '')}"
        )
    for reason in spread.unknown:
        print(f"unknown    {reason}")


def words_of(made: Mapping[str, Any]) -> str:
    """What a picture says of itself, in a line; whatever somebody wrote there is shown as text."""
    verb, model, seed, prompt = (repr(made.get(name))[:200] for name in ("verb", "model", "seed", "prompt"))
    return f"verb {verb}, model {model}, bundle {repr(made.get('bundle'))[:40]}, seed {seed}, prompt {prompt}"


def named(version: Version) -> str:
    """Its aliases, for a line."""
    return f" ({', '.join(version.aliases)})" if version.aliases else ""
