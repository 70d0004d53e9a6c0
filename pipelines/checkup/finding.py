"""What a check found: a row of the doctor's table. No row holds a secret, whatever an error or a setting said."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pydantic

from aai.config import Config

SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.I)
_NOT_SECRET = re.compile(r"_(PATH|FILE|DIR|MODE|URL|URI)$", re.I)
_SHOWN = re.compile(r"(?<=://)[^/\s@]+@|(?<=Bearer )\S+")
"""A password in an address, and a token in a header."""


def token_file() -> Path:
    """Where Ray looks for its token when RAY_AUTH_TOKEN is not set."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def ray_token() -> str | None:
    """Ray's token as Ray finds it on this machine; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    try:
        return token_file().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def without_secrets(text: str) -> str:
    """A text in which the secrets of this process's environment are masked, and what is one by its place."""
    known = {value for name, value in os.environ.items() if SECRET_NAME.search(name) and not _NOT_SECRET.search(name)}
    for secret in sorted({*known, ray_token() or ""}, key=len, reverse=True):
        if len(secret) >= 6:  # what is shorter would mask half of the text
            text = text.replace(secret, "***")
    return _SHOWN.sub("***", text)


class Finding(Config):
    """A row: a check by its name in docs/runbook.md, what it looked at, and how that is."""

    check: str
    subject: str
    state: Literal["ok", "warning", "failure"]
    """failure: a run would stop or harm; warning: it would go on, worse than it could."""
    found: str
    remedy: str = ""

    @pydantic.field_validator("subject", "found", "remedy", mode="before")
    @classmethod
    def _tells_no_secret(cls, text: object) -> str:
        return without_secrets(" ".join(str(text).split()))[:500]


def ok(check: str, subject: str, found: str) -> Finding:
    """A row of something that is as it should be."""
    return Finding(check=check, subject=subject, state="ok", found=found)


def warning(check: str, subject: str, found: str, remedy: str) -> Finding:
    """A row of something that makes a run worse."""
    return Finding(check=check, subject=subject, state="warning", found=found, remedy=remedy)


def failure(check: str, subject: str, found: str, remedy: str) -> Finding:
    """A row of something that stops a run, or does harm."""
    return Finding(check=check, subject=subject, state="failure", found=found, remedy=remedy)


def as_table(findings: Sequence[Finding]) -> str:
    """The rows below each other, failures last, each with its remedy below it."""
    order = {"ok": 0, "warning": 1, "failure": 2}
    rows = sorted(findings, key=lambda row: order[row.state])
    check = max((len(row.check) for row in rows), default=0)
    subject = min(max((len(row.subject) for row in rows), default=0), 48)
    lines = []
    for row in rows:
        lines.append(f"{row.state.upper():<8} {row.check:<{check}}  {row.subject:<{subject}}  {row.found}")
        if row.remedy:
            lines.append(f"{'':<8} {'':<{check}}  -> {row.remedy}")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding], seconds: float) -> str:
    """The same for programs: {"failures": N, "warnings": N, "seconds": S, "findings": [...]}."""
    counts = {f"{state}s": sum(row.state == state for row in findings) for state in ("failure", "warning")}
    rows = [row.model_dump() for row in findings]
    return json.dumps({**counts, "seconds": round(seconds, 1), "findings": rows}, indent=1)
