"""SIGTERM as an exception: schedulers send it before they kill, and what is under way saves its state."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

SECONDS = 10.0  # torchrun and schedulers may both signal one process: a second SIGTERM so soon is ignored


class Terminated(BaseException):
    """SIGTERM arrived. No Exception: nothing goes on to the next job after it."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Context manager: SIGTERM raises Terminated, except where a launcher has a handler of its own."""
    first = float("-inf")

    def handle(*_: Any) -> None:
        nonlocal first
        if time.monotonic() - first >= SECONDS:
            first = time.monotonic()
            raise Terminated

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
