"""SIGINT and SIGTERM: an exception between two statements, or a wish that training grants after its step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

_STOPS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """The process was asked to end; its exit code is 128 + the signal's number, as shells have it."""

    def __init__(self, number: int):
        super().__init__(number)
        self.exit_code = 128 + number


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Interrupted, so that files are closed and locks released on the way out."""

    def handle(number: int, frame: Any) -> None:
        raise Interrupted(number)

    with _handling(handle):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT or SIGTERM only makes the yielded function true; afterwards it is delivered as usual.

    A second one is delivered at once. Outside the main thread, which gets all signals, nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came: list[int] = []
    usual = {number: signal.getsignal(number) or signal.SIG_DFL for number in _STOPS}

    def handle(number: int, frame: Any) -> None:
        if came:
            signal.signal(number, usual[number])
            signal.raise_signal(number)
        came.append(number)

    try:
        with _handling(handle):
            yield lambda: bool(came)
    finally:  # also where what was going on has failed: whoever would try again is not asked to
        if came:
            signal.raise_signal(came[0])


@contextlib.contextmanager
def _handling(handle: Callable[[int, Any], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in _STOPS}
    try:
        yield
    finally:
        for number, usual in before.items():
            signal.signal(number, usual or signal.SIG_DFL)
