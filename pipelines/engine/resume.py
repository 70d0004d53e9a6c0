"""An output folder belongs to one input and its settings: a second call goes on, or is told what is there."""

from typing import Any

from aai import storage
from aai.errors import UserError
from pipelines.engine.lock import is_empty


def finished(out: str, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The result OUT/NAME.json of an earlier run with the same settings; None to start, or to go on.

    The settings are kept in OUT/_NAME.json. Raises UserError when the folder holds something else.
    """
    started, result = storage.join(out, f"_{name}.json"), storage.join(out, f"{name}.json")
    if storage.exists(started):
        if storage.read_json(started) != settings:
            raise UserError("out", out, f"holds the {name} of another input or size", "choose another, or delete it")
    elif not is_empty(out):
        raise UserError("out", out, "is not empty", "choose another, or delete it")
    else:
        storage.write_json(started, settings)
    return storage.read_json(result) if storage.exists(result) else None
