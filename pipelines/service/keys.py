"""Who may paint, and how much: keys by name, known by their hashes alone, from a file that may change at any time."""

import hashlib
import hmac
import logging
import os
import stat
import time
from collections import Counter, deque
from pathlib import Path

import pydantic
import yaml

from aai.config import Config
from aai.errors import UserError

logger = logging.getLogger("ray.serve")  # the only one that Serve writes for its replicas

KEY_VARIABLE = "AAI_API_KEY"
DEFAULT = "default"
"""Name of the key in AAI_API_KEY."""
LOOK_S = 1.0
MINUTE_S = 60.0


def api_key() -> str | None:
    """The service's key from the environment; never a setting, so that no config or log can hold it."""
    return os.environ.get(KEY_VARIABLE) or None


def hashed(key: str) -> str:
    """SHA-256 of a key, in hex. Keys are 32 random bytes: nobody can try them all, so no slow hash is needed."""
    return hashlib.sha256(key.encode()).hexdigest()


class ApiKey(Config):
    """One key of the file."""

    name: str = pydantic.Field(pattern=r"^[\w.-]{1,64}$")
    """Stands in the log and in the metrics."""
    sha256: str = pydantic.Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key, in hex."""
    per_minute: int | None = pydantic.Field(None, ge=1, le=100_000)
    """Requests that are taken in any minute; none = as many as there is room for."""
    at_once: int | None = pydantic.Field(None, ge=1)
    """Requests that are received, wait or are painted at the same time."""


def read_keys(file: str | Path) -> tuple[ApiKey, ...]:
    """The keys of a YAML or JSON list of {name, sha256, per_minute, at_once}. Raises UserError for any mistake."""
    remedy = "give a list of {name, sha256, per_minute, at_once}"
    try:
        with Path(file).open(encoding="utf-8") as opened:
            rows, mode = yaml.safe_load(opened), os.fstat(opened.fileno()).st_mode
    except (OSError, ValueError, yaml.YAMLError) as error:  # without the file's words: they may hold a key
        raise UserError("keys_file", file, f"cannot be read ({type(error).__name__})", remedy) from None
    if mode & stat.S_IROTH:
        logger.warning("keys_file=%s: everybody on the machine can read it; chmod 600", file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UserError("keys_file", file, "is not a list of keys", remedy)
    keys = []
    for number, row in enumerate(rows, 1):
        try:
            keys.append(ApiKey.model_validate(row))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError("keys_file", file, f"key {number}: {where}: {first['msg']}", remedy) from None
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        for number, value in enumerate(values):
            if value in values[:number]:
                raise UserError("keys_file", file, f"key {number + 1} has the {field} of another", "give each its own")
    return tuple(keys)


class Keys:
    """The keys of now. The file is looked at once a second at most; a new one that is broken changes nothing.

    file: see read_keys; empty = none. key: one more, of the name default. gateways: how many count requests, each its
    share of a quota, rounded up. Raises UserError when the file is unusable.
    """

    def __init__(self, file: str = "", key: str | None = None, gateways: int = 1) -> None:
        self._gateways = gateways
        self._file, self._own = file, (ApiKey(name=DEFAULT, sha256=hashed(key)),) if key else ()
        self._looked_s, self._stamp = time.monotonic(), self._seen()
        self._keys = self._read()
        self.trouble = ""
        """Kind of error for which a new file is not used; the log has all of it."""
        self._begun: dict[str, deque[float]] = {}
        self._at_once: Counter[str] = Counter()

    def _seen(self) -> tuple[int, ...]:
        """What changes with the file; a secret that Kubernetes mounts is a link to another file each time."""
        if not self._file:
            return ()
        try:
            found = os.stat(self._file)
        except OSError:
            return ()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> tuple[ApiKey, ...]:
        listed = read_keys(self._file) if self._file else ()
        if self._own and any(key.name == DEFAULT for key in listed):
            rule = f"names a key {DEFAULT}, which is that of {KEY_VARIABLE}"
            raise UserError("keys_file", self._file, rule, "rename it, or unset the variable")
        return self._own + listed

    def look(self) -> None:
        """Takes up a file that has changed. `find` does it too, but nobody may be asking."""
        if time.monotonic() - self._looked_s < LOOK_S:
            return
        self._looked_s, before = time.monotonic(), self._stamp
        self._stamp = self._seen()
        if self._stamp == before:
            return
        try:
            self._keys, self.trouble = self._read(), ""
            logger.info("keys_file: %d keys", len(self._keys))
        except UserError as error:
            self.trouble = f"{type(error).__name__}: {error.setting}"
            logger.warning("the keys of before stay: %s", error)

    def find(self, given: str) -> ApiKey | None:
        """The key that was given, or None. Takes as long for each that is wrong."""
        self.look()
        wanted, found = hashed(given), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def take(self, key: ApiKey) -> float:
        """Counts one more request of a key, which `give_back` ends; or, over its quota, says in how many seconds."""
        if key.at_once and self._at_once[key.name] >= self._share(key.at_once):
            return 1.0
        if key.per_minute:
            most = self._share(key.per_minute)
            begun, now_s = self._begun.setdefault(key.name, deque()), time.monotonic()
            while begun and now_s - begun[0] >= MINUTE_S:
                begun.popleft()
            if len(begun) >= most:
                return MINUTE_S - (now_s - begun[-most])
            begun.append(now_s)
        self._at_once[key.name] += 1
        return 0.0

    def _share(self, quota: int) -> int:
        return -(-quota // self._gateways)

    def give_back(self, key: ApiKey, uncounted: bool = False) -> None:
        """A request of this key is over. uncounted: there was no room for it, so that it is none of its minute's."""
        self._at_once[key.name] -= 1
        if uncounted and self._begun.get(key.name):
            self._begun[key.name].pop()  # its own or, of a neighbour, one that is seconds younger
