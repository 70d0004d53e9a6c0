"""Where the tables of a curation lie under its output folder."""

from aai import storage

PLAN = "_plan"
"""The ledger: which clip is in which shard."""
CUT = "_cut"
"""What was found of long files, as JSON."""
MEASURED = "_measured"
"""Every clip as it was decoded, good or not; no captions, no splits."""
KNOWN = "_known.parquet"
"""clip_id, shard and row of all clips measured before this run, by clip_id."""
WAITING = "_waiting"
"""What workers need to know of their shards, only while they run."""
SCORED = "_scored"
"""What models said of the good clips."""
NEAR = "_near"
"""Hashes and pairs of the search for near duplicates, only while it runs."""
ACCEPTED = "accepted"
"""The ClipTable."""
REJECTED = "rejected"
"""The RejectTable."""


def shard_file(out: str, folder: str, name: str) -> str:
    """Where the table of a shard lies."""
    return storage.join(out, folder, f"{name}.parquet")


def shard_of(file: str) -> str:
    """The reverse: the shard whose table a file is."""
    return file.rsplit("/", 1)[1].removesuffix(".parquet")
