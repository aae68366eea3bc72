"""What running processes use of a cache, so that pruning leaves it alone.

<root>/in-use/<host>-<pid>-<random>   an entry a line; the process holds a lock on the file until it ends
"""

import contextlib
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from teq import files

FOLDER = "in-use"


def register(root: Path, entry: str) -> None:
    """Note that this process uses `entry` of the cache `root` until it ends; one that cannot be written has
    no notes.
    """
    owner = root, os.getpid()
    stream, entries = _notes.get(owner, (None, set()))
    if stream is not None and entry in entries and Path(stream.name).is_file():
        return
    with contextlib.suppress(OSError), unchanging(root):
        if stream is None or not Path(stream.name).is_file():
            held(root)  # deletes what ended processes left
            name = f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
            stream, entries = (root / FOLDER / name).open("w"), set()
            with contextlib.suppress(OSError):  # without locks its process's number has to do
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _notes[owner] = stream, entries
        stream.write(f"{entry}\n")
        stream.flush()
        entries.add(entry)


@contextlib.contextmanager
def unchanging(root: Path) -> Iterator[None]:
    """Context manager: no process registers an entry meanwhile."""
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    with files.locked(root / FOLDER / ".lock"):
        yield


def held(root: Path) -> set[str]:
    """The entries that running processes use, those of other machines for a week; deletes other notes.

    To be called within `unchanging`.
    """
    found: set[str] = set()
    for file in (root / FOLDER).glob("*-*-*"):
        with contextlib.suppress(FileNotFoundError):
            if not _ended(file):
                found.update(file.read_text().split())
                continue
            with contextlib.suppress(PermissionError):  # another user's
                file.unlink()
    return found


def _ended(file: Path) -> bool:
    """Whether the process that wrote a note has ended, as far as this machine can tell."""
    host, pid, _ = file.name.rsplit("-", 2)
    if host != socket.gethostname():
        return time.time() - file.stat().st_mtime > files.ABANDONED
    try:
        with file.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileNotFoundError, BlockingIOError) as error:
        return isinstance(error, FileNotFoundError)
    except OSError:  # no locks here, or another user's note
        return not files.alive(int(pid))
    return True


_notes: dict[tuple[Path, int], tuple[TextIO, set[str]]] = {}  # by root and process, for a fork has its own
