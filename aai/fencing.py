"""Who may write still: guards that are asked right before a file changes, so that writers of the past are refused."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

Guard = Callable[[str], None]
"""Asked with the absolute URI of a file right before it is written or removed; refuses by raising."""
_GUARDS: ContextVar[tuple[Guard, ...]] = ContextVar("guards", default=())


@contextlib.contextmanager
def guarded(*guards: Guard) -> Iterator[None]:
    """While the body runs, this thread writes and removes only what these, and those of before, let through."""
    token = _GUARDS.set((*_GUARDS.get(), *guards))
    try:
        yield
    finally:
        _GUARDS.reset(token)


def guards() -> tuple[Guard, ...]:
    """Those in force: for workers, who are other processes."""
    return _GUARDS.get()


def ask_guards(uri: str) -> None:
    """Asks those in force about a file, by its absolute URI."""
    for guard in _GUARDS.get():
        guard(uri)
