"""The one error type for mistakes a user can mend, and how others' words are shown."""

import contextlib
import errno
from collections.abc import Iterator

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota and a largest file size that leave no room."""


class UserError(ValueError):
    """A wrong setting or input: printed as one line, exit code 2, no traceback.

    setting: the name of the setting or file; value: what it holds; rule: what it breaks; remedy: what to do.
    """

    def __init__(self, setting: str, value: object, rule: str, remedy: str) -> None:
        self.setting, self.value, self.rule, self.remedy = setting, value, rule, remedy
        super().__init__(setting, value, rule, remedy)

    def __str__(self) -> str:
        text = f"{self.setting}={self.value}: {self.rule}; {self.remedy}"
        return " ".join(text.split())


@contextlib.contextmanager
def room_explained(place: str) -> Iterator[None]:
    """Turns the error of a disk that is full into a UserError that names where room is to be made."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        remedy = "make room there, and give the command again: it goes on where it stopped"
        raise UserError("disk", place, f"is full ({error})", remedy) from error


def _is_full(error: Exception) -> bool:
    """Python's own error, or the one of a library in Rust, which only says it."""
    return getattr(error, "errno", None) in FULL or any(f"(os error {code})" in str(error) for code in FULL)


def printable(text: object) -> str:
    """Up to 200 characters of what somebody else wrote, without any that would move a terminal's cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:200])
