"""Folders and S3: whether the run's places can be read and written, in the way that its locks need."""

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from aai import storage
from pipelines.checkup.finding import Finding, failure, ok, warning

KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile) of an account that may use the bucket"
ENDPOINT = "mend AWS_ENDPOINT_URL, or open the way from here to the server"
REGION = "set AWS_DEFAULT_REGION to the bucket's region"
CLOCK = "let a time service (chrony, systemd-timesyncd) set the clocks of this machine and of the server"
WRITE = "give the account s3:PutObject, s3:GetObject and s3:DeleteObject below this prefix, or name another run_dir"
_BY_CODE = {
    "NoSuchBucket": ("s3.bucket", "make the bucket, or mend its name in run_dir"),
    "RequestTimeTooSkewed": ("clock", CLOCK),
    "PermanentRedirect": ("s3.region", REGION),
    "AuthorizationHeaderMalformed": ("s3.region", REGION),
    "301": ("s3.region", REGION),
}
_NO_WAY = ("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
           "HTTPClientError", "SSLError", "InvalidEndpoint")  # fmt: skip


def check_place(uri: str, is_written: bool, max_skew_s: float, min_free_gb: float) -> list[Finding]:
    """Looks at one folder or s3:// prefix, and leaves nothing there."""
    if uri.startswith("s3://"):
        return _check_s3(uri.rstrip("/"), is_written, max_skew_s)
    if "://" in uri.removeprefix("file://"):
        rule = f"scheme {uri.split('://')[0]!r} is not allowed"
        return [failure("folder.read", uri, rule, "use a local path, file:// or s3://")]
    path = Path(storage.absolute(uri))
    return _check_folder(path, min_free_gb) if is_written else [_readable(str(path), path.exists)]


def clock_finding(subject: str, skew_s: float, max_skew_s: float) -> Finding:
    """skew_s: how far this machine's clock is ahead of the other's."""
    if abs(skew_s) <= max_skew_s:
        return ok("clock", subject, f"within {max_skew_s:g} s of ours")
    side = "behind" if skew_s > 0 else "ahead of"
    return failure("clock", subject, f"its clock is {abs(skew_s):.0f} s {side} ours", CLOCK)


def skew_of(date: str) -> float:
    """How many seconds this machine's clock is ahead of the one that wrote an HTTP Date."""
    return time.time() - parsedate_to_datetime(date).timestamp() - 0.5  # it is cut to whole seconds


def _readable(subject: str, exists: Callable[[], bool]) -> Finding:
    check = "s3.read" if subject.startswith("s3://") else "folder.read"
    if exists():
        return ok(check, subject, "is there")
    return failure(
        check, subject, "is not there, or may not be seen", "put it there, or mend the setting that names it"
    )


# ---------------------------------------------------------------- S3


def impatient_s3() -> None:
    """From now on this process, which only asks, waits seconds for S3, not minutes."""
    import s3fs

    kind = s3fs.S3FileSystem
    kind.retries, kind.connect_timeout, kind.read_timeout = 1, 3, 5
    os.environ.setdefault("AWS_MAX_ATTEMPTS", "1")


def _check_s3(uri: str, is_written: bool, max_skew_s: float) -> list[Finding]:
    impatient_s3()
    fs, path = storage.filesystem(uri)
    bucket, _, prefix = path.partition("/")
    try:
        answer = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    except Exception as error:
        return [_refused(uri, error, "s3.keys", KEYS)]
    found = [ok("s3.reachable", uri, "answers, and takes the account")]
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if date:
        found.append(clock_finding(f"S3 server of {uri}", skew_of(date), max_skew_s))
    if not is_written:
        return [*found, _readable(uri, lambda: bool(fs.exists(path)))]
    return found + _check_writing(uri)


def _check_writing(uri: str) -> list[Finding]:
    """Writes a small object, reads it, and writes over it on conditions that do not hold."""
    where, content = storage.join(uri, f"_doctor-{uuid.uuid4().hex[:12]}"), b"aai doctor"
    try:
        storage.write_bytes(where, content)
    except Exception as error:
        return [_refused(uri, error, "s3.write", WRITE)]
    try:
        if storage.read_bytes(where) != content:
            return [failure("s3.write", uri, "what was written is read back as something else", "look at the server")]
        tag = storage.tag_of(where)
        ignored = [] if _is_refused(where, new=True) else ["If-None-Match"]
        storage.write_bytes(where, content + b" again")
        ignored += [] if _is_refused(where, over=tag) else ["If-Match"]
    except Exception as error:
        return [_refused(uri, error, "s3.write", WRITE)]
    finally:
        with contextlib.suppress(Exception):  # told below by what could not be done before
            storage.remove(where)
    found = [ok("s3.write", uri, "written, read and removed")]
    if not ignored:
        return [*found, ok("s3.conditional", uri, "If-None-Match and If-Match are honoured")]
    remedy = (
        "use a server that honours conditional writes (AWS S3, a recent MinIO or Ceph), or never start two commands "
        "on one folder at the same moment"
    )
    return [*found, warning("s3.conditional", uri, f"the server ignores {' and '.join(ignored)}", remedy)]


def _is_refused(where: str, new: bool = False, over: str | None = None) -> bool:
    try:
        storage.write_bytes(where, b"aai doctor, on a condition that does not hold", new, over)
    except FileExistsError:
        return True
    return False


def _refused(uri: str, error: Exception, otherwise: str, remedy: str) -> Finding:
    """A server's refusal by what it means."""
    cause: Any = error.__cause__ or error
    said = (getattr(cause, "response", None) or {}).get("Error", {})
    code = str(said.get("Code", ""))
    names = {kind.__name__ for kind in type(cause).__mro__} | {kind.__name__ for kind in type(error).__mro__}
    if names & set(_NO_WAY):
        return failure("s3.reachable", uri, f"no server answers ({type(cause).__name__})", ENDPOINT)
    if "NoCredentialsError" in names or "PartialCredentialsError" in names:
        return failure("s3.keys", uri, "this machine has no keys", KEYS)
    check, remedy = _BY_CODE.get(code, (otherwise, remedy))
    return failure(check, uri, f"the server refuses: {code} {said.get('Message') or error}", remedy)


# ---------------------------------------------------------------- folders


def _check_folder(path: Path, min_free_gb: float) -> list[Finding]:
    """Looks at a folder, or at the nearest one above it that is there."""
    here = path
    while not here.exists():
        here = here.parent
    subject, mend = str(path), "give the user that runs this the right to write there, or name another run_dir"
    if not here.is_dir():
        return [failure("folder.write", subject, f"{here} is a file", "remove it, or name another run_dir")]
    probe = here / f".aai-doctor-{uuid.uuid4().hex[:12]}"
    try:
        probe.write_bytes(b"\0" * 4096)
        locks = _locks(probe)
    except OSError as error:
        full = error.errno == 28
        remedy = "free some space, or name a run_dir on another disk" if full else mend
        return [failure("disk" if full else "folder.write", subject, f"cannot be written ({error.strerror})", remedy)]
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    found = [ok("folder.write", subject, "can be written")]
    if not locks:
        rule = "the file system knows no locks or links: a lease takes their place"
        found.append(warning("folder.lock", subject, rule, "mount it with locks (NFS 4, not `nolock`), or use s3://"))
    return [*found, disk_finding(subject, shutil.disk_usage(here)[::2], min_free_gb)]


def disk_finding(subject: str, total_and_free_bytes: tuple[int, int], min_free_gb: float) -> Finding:
    """How full a disk is."""
    total_bytes, free_bytes = total_and_free_bytes
    found = f"{free_bytes / 1e9:.1f} GB of {total_bytes / 1e9:.1f} GB are free"
    if free_bytes >= min_free_gb * 1e9:
        return ok("disk", subject, found)
    remedy = f"free some space, use another disk, or say what is enough: --set min_free_gb (now {min_free_gb:g})"
    return failure("disk", subject, found, remedy)


def _locks(probe: Path) -> bool:
    other = probe.with_name(f"{probe.name}-link")
    try:
        with probe.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        other.hardlink_to(probe)
    except OSError:
        return False
    finally:
        other.unlink(missing_ok=True)
    return True
