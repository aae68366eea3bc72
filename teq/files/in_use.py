"""Entries of a cache that running processes use; pruning skips them.

    <root>/in-use/<host>-<pid>-<random>   one entry per line

A process keeps its file locked until it ends, so that the files of ended processes can be told from others.
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from teq.files import disk

FOLDER = "in-use"


def register(root: Path, entry: str) -> None:
    """Register `entry` of the cache `root` as used by this process; does nothing in a read-only cache."""
    owner = root, os.getpid()
    stream, entries = _notes.get(owner, (None, set()))
    if stream is not None and entry in entries and Path(stream.name).is_file():
        return
    with contextlib.suppress(OSError), unchanging(root):
        if stream is None or not Path(stream.name).is_file():
            held(root)  # deletes the files of ended processes
            name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
            stream, entries = (root / FOLDER / name).open("w"), set()
            with contextlib.suppress(OSError):  # without locks, `_ended` checks the process id
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _notes[owner] = stream, entries
        stream.write(f"{entry}\n")
        stream.flush()
        entries.add(entry)


@contextlib.contextmanager
def unchanging(root: Path) -> Iterator[None]:
    """Context manager: blocks `register` in all processes."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    with disk.locked(root / FOLDER / ".lock"):
        yield


def held(root: Path) -> set[str]:
    """Return the entries in use and delete the files of ended processes. Call it inside `unchanging`.

    A file of another machine counts for a week.
    """
    found: set[str] = set()
    for file in (root / FOLDER).glob("*-*-*"):
        with contextlib.suppress(FileNotFoundError):
            if not _ended(file):
                found.update(file.read_text().split())
                continue
            with contextlib.suppress(PermissionError):  # it is another user's
                file.unlink()
    return found


def _ended(file: Path) -> bool:
    """Return whether the process of a file has ended, as far as this machine can tell."""
    host, pid, _ = file.name.rsplit("-", 2)
    if host != socket.gethostname():
        return time.time() - file.stat().st_mtime > disk.ABANDONED
    try:
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, FileNotFoundError)
    except OSError:  # no locks here, or another user's file
        return not disk.alive(int(pid))
    return True


_notes: dict[tuple[Path, int], tuple[TextIO, set[str]]] = {}  # by root and process: a fork needs its own
