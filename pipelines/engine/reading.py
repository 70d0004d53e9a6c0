"""Reading the files that a manifest names: what cannot be had becomes a code, nothing is raised."""

import logging

from aai import storage
from aai.media.limits import ClipError

log = logging.getLogger(__name__)


def read_file(uri: str, max_bytes: int) -> bytes | ClipError:
    """A file's content, or why it cannot be had: MISSING_FILE, TOO_LARGE, or IO_ERROR (transient)."""
    try:
        return storage.read_bytes(uri, max_bytes)
    except FileNotFoundError:
        return ClipError("MISSING_FILE", "no such file")
    except ValueError as error:
        return ClipError("TOO_LARGE", str(error))
    except Exception as error:  # storage clients raise many types; all mean "ask again later"
        log.debug("reading %s", uri, exc_info=True)
        return ClipError("IO_ERROR", f"{type(error).__name__}: {error}"[:300], transient=True)
