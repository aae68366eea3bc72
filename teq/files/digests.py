"""SHA-256 of files, cached on disk, so that a checkpoint is hashed once and not in every process.

    <user cache>/digests/<digest of the path>.json   the file's state and its digest

An entry is valid while the file's path, size, times and inode are the same. A file that changed less than two
seconds before it was hashed gets no entry: a later change could leave its time stamps as they are.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from teq.files import disk
from teq.files.disk import user_cache

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
UNSETTLED = 2.0  # seconds: the coarsest resolution of file systems' time stamps
KEPT = 2**20  # bytes from which a digest is worth a file of its own
LARGE = 10**9  # bytes that take a while
State = list[str | int]


def file_digest(file: Path) -> str:
    """Return the SHA-256 of a file in hex; reads the file only if no entry is valid."""
    state, started = _state(file), time.time()
    if (known := _known(state)) is not None:
        return known
    found = disk.sha256(file)
    settled = started - file.stat().st_ctime > UNSETTLED
    if settled and _state(file) == state:
        _digests[tuple(state)] = found
        if file.stat().st_size >= KEPT:
            with contextlib.suppress(OSError):  # it is read again next time
                disk.write_text(_entry(state), json.dumps({"state": state, "sha256": found}))
    return found


def file_digests(folder: Path, found: Iterable[Path]) -> dict[str, str]:
    """Return the digests of files of `folder` by name; logs a line if much has to be read."""
    found = sorted(found)
    unread = sum(file.stat().st_size for file in found if _known(_state(file)) is None)
    if unread > LARGE:
        log.info("reading %.1f GB of %s for its digest, once", unread / 1e9, folder)
    return {str(file.relative_to(folder)): file_digest(file) for file in found}


def tensor_digest(tensor: "Tensor") -> str:
    """Return 16 hex digits of the SHA-256 of a tensor's bytes."""
    import torch

    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()[:16]


def _state(file: Path) -> State:
    """Return path, size, times of change and inode."""
    status = file.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return [str(file.resolve()), status.st_size, *times, status.st_ino]


def _known(state: State) -> str | None:
    if tuple(state) not in _digests:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(_entry(state).read_text())
            if entry["state"] == state and len(bytes.fromhex(entry["sha256"])) == 32:
                _digests[tuple(state)] = entry["sha256"]
    return _digests.get(tuple(state))


def _entry(state: State) -> Path:
    name = hashlib.sha256(str(state[0]).encode()).hexdigest()[:16]
    return user_cache() / "digests" / f"{name}.json"


_digests: dict[tuple[str | int, ...], str] = {}  # by state
