"""SIGTERM as an exception: schedulers send it before they kill, and running jobs save their state.

A launcher whose process is stopped kills its workers; so it is stopped only after they have saved theirs.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AGAIN = 5.0  # seconds: a group's signal and a forwarded one reach a process twice, the second is ignored
PATIENCE = 20.0  # seconds that workers are given; SLURM kills 30 s after SIGTERM


class Terminated(BaseException):
    """SIGTERM arrived. It is no Exception, so that no next job starts."""


@contextlib.contextmanager
def terminable(working: Path | None = None) -> Iterator[None]:
    """Context manager: SIGTERM raises Terminated, except where a launcher has set a handler.

    SIGTERM and Ctrl-C first stop the child processes whose jobs `sweeper.noted` names in the folder
    `working`, and wait for them.
    """
    stopped = float("-inf")

    def handle(number: int, _: Any) -> None:
        nonlocal stopped
        if time.monotonic() - stopped < AGAIN:
            return
        stopped = time.monotonic()
        if working is not None:
            _stop_workers(working)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    plain = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not plain[signal.SIGTERM]:
        yield
        return
    mine = {each: default for each, default in plain.items() if signal.getsignal(each) is default}
    for each in mine:
        signal.signal(each, handle)
    try:
        yield
    finally:
        for each, default in mine.items():
            signal.signal(each, default)


def _stop_workers(working: Path) -> None:
    """Stop the children of this process that run a job, and wait until they have stopped."""
    children = {str(child.pid) for child in multiprocessing.active_children()}
    jobs = [file for file in working.glob("*-*") if file.name.partition("-")[0] in children]
    for file in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(file.name.partition("-")[0]), signal.SIGTERM)
    end = time.monotonic() + PATIENCE
    while any(file.exists() for file in jobs) and time.monotonic() < end:
        time.sleep(0.02)
