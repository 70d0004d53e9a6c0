"""For schemathesis: files that can be heard and seen so that requests come as far as the painter."""

from typing import Any

import schemathesis

from tests.hostile import png, wav


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Replaces the files of a form, leaves out what is empty, and asks for few steps."""
    if isinstance(body, dict):
        for field, file in (("audio", wav()), ("image", png()), ("mask", png())):
            if body.get(field):
                body[field] = [file] if isinstance(body[field], list) else file
        steps = body.get("steps", 20)
        if isinstance(steps, int) and 3 < steps <= 100:  # right ones are made few: the tests' machines paint slowly
            body["steps"] = 3
        body = {field: value for field, value in body.items() if value is not None}
    return body
