"""Which code this is: the version, and the commit it was built or checked out from.

What the code writes says which code wrote it: tables, manifests, bundles, runs and pictures. It is for reading only
and enters no digest, so that another commit keeps what is finished.
"""

import functools
import importlib.metadata
import subprocess
from pathlib import Path

UNKNOWN = "unknown"
METADATA_KEY = b"aai.written_by"
"""Where a Parquet file says which code wrote it."""
COMMIT_FILE = "COMMIT"
"""Beside this file in a wheel or an image, which have no git: the commit they were built from."""
ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def code_version() -> str:
    """For example "0.1.0 (commit abcdef1)"; "+dirty" after a commit means that tracked files were changed since."""
    try:
        release = importlib.metadata.version("aai")
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path that was never installed
        release = UNKNOWN
    return f"{release} (commit {commit(ROOT)})"


def commit(root: Path) -> str:
    """The commit of the code in a folder that holds the package `aai`: stamped, or from git, or "unknown"."""
    stamped = root / "aai" / COMMIT_FILE
    if stamped.is_file():
        return stamped.read_text().strip() or UNKNOWN
    # Only a repository of its own counts: an environment may lie within another project's.
    if not (root / ".git").exists():
        return UNKNOWN
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=7", "--dirty=+dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or a repository that git refuses to read
        return UNKNOWN
    return done.stdout.strip()
