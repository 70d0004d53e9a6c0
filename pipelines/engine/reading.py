"""Reading the files that a manifest names: what cannot be had becomes a code, nothing is raised."""

import logging
from collections.abc import Callable
from typing import TypeVar

from aai import storage
from aai.media.limits import ClipError

log = logging.getLogger(__name__)

T = TypeVar("T")


def tried(uri: str, read: Callable[[], T]) -> T | ClipError:
    """What `read` gives, or why the file cannot be had: MISSING_FILE, TOO_LARGE, or IO_ERROR (transient)."""
    try:
        return read()
    except FileNotFoundError:
        return ClipError("MISSING_FILE", "no such file")
    except ValueError as error:
        return ClipError("TOO_LARGE", str(error))
    except Exception as error:  # storage clients raise many types; all mean "ask again later"
        log.debug("reading %s", uri, exc_info=True)
        return ClipError("IO_ERROR", f"{type(error).__name__}: {error}"[:300], transient=True)


def read_file(uri: str, max_bytes: int) -> bytes | ClipError:
    """A file's content, or why it cannot be had, as `tried` says."""
    return tried(uri, lambda: storage.read_bytes(uri, max_bytes))
