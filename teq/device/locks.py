"""CUDA devices of this host, shared out by lock files: a job that may choose has a device to itself.

All runs of this user on this host use the same locks, so that sweeps started apart respect one another. The
system releases a lock when its process ends, however it ends.
"""

import contextlib
import gc
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import filelock

from teq.spec import UserError

log = logging.getLogger(__name__)
CUDA = re.compile(r"cuda(?::(\d+))?")
POLL = 1.0  # seconds between two looks at devices that are all taken


class _Last:
    """The device that this process had last: its CUDA context is there already."""

    index = 0


@contextlib.contextmanager
def taken(wanted: str) -> Iterator[str]:
    """Context manager: the name of the device for `device=<wanted>`, locked until the end.

    `auto` and `cuda` take a free CUDA device, and wait for one where all are taken. `cuda:<n>` is used at
    once, and locked where it is free. Where there is no CUDA device the name is handed on as it is, for
    `pipeline.resolve_device` to check.
    """
    import torch

    count, own = torch.cuda.device_count(), CUDA.fullmatch(wanted)
    if count == 0 or (wanted != "auto" and own is None) or (own and own[1] and int(own[1]) >= count):
        yield wanted
        return
    if own is not None and own[1] is not None:
        lock = _lock(int(own[1]))
        with contextlib.suppress(filelock.Timeout):  # the user's word: it runs there whoever else does
            lock.acquire(blocking=False)
        name = wanted
    else:
        index, lock = _first_free(count)
        name, _Last.index = f"cuda:{index}", index
    try:
        yield name
    finally:
        if torch.cuda.is_initialized():  # what PyTorch's allocator keeps, the next job there cannot use
            gc.collect()
            torch.cuda.empty_cache()
        lock.release()


def _first_free(count: int) -> tuple[int, filelock.BaseFileLock]:
    """Return index and lock of the first of `count` devices that is free; wait until there is one."""
    locks = {index: _lock(index) for index in sorted(range(count), key=lambda i: (i != _Last.index, i))}
    said = False
    while True:
        for index, lock in locks.items():
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(blocking=False)
                return index, lock
        if not said:
            log.info("all %d CUDA devices here are taken by other runs: waiting for one", count)
            said = True
        time.sleep(POLL)


def _lock(index: int) -> filelock.BaseFileLock:
    """Return a device's lock, by uuid: CUDA_VISIBLE_DEVICES gives processes different numbers."""
    import torch

    folder = Path(tempfile.gettempdir()) / f"teq-devices-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): set TMPDIR") from error
    return filelock.FileLock(folder / f"{torch.cuda.get_device_properties(index).uuid}.lock")
