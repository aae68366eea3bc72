"""Files: digests, locks, writing aside and renaming into place."""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import platformdirs

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
MAKING = "making-"
ABANDONED = 7 * 24 * 3600.0  # seconds after which what another machine left is taken for left behind
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def project() -> Path:
    """Return the project's folder: TEQ_ROOT, or this clone."""
    return Path(os.environ.get("TEQ_ROOT") or ROOT).absolute()


def user_cache() -> Path:
    """Return the folder for data independent of TEQ_HOME: converted checkpoints, file digests."""
    return Path(platformdirs.user_cache_dir("teq"))


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, shortened."""
    return " ".join((str(error) or type(error).__name__).split())[:200]


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def aside(file: Path) -> Iterator[Path]:
    """Context manager: gives a path to write to, renamed to `file` at the end, on disk before it is seen.

    Makes the folder. An error, or a second one while the first is handled, leaves `file` as it was.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    path = unique_beside(file)
    try:
        yield path
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        path.replace(file)
    finally:
        path.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    with aside(file) as path:
        path.write_text(text, encoding="utf-8")


def write_tensors(
    file: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None
) -> None:
    """Write tensors from any device aside and rename the file into place. Raises OSError."""
    with aside(file) as path:
        save_tensors(path, tensors, metadata)


def save_tensors(file: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Save tensors from any device to a safetensors file that all may read. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(here, file, metadata)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
    open_to_all(file)


def read_tensors(file: Path, otherwise: str) -> "tuple[dict[str, Tensor], dict[str, str]] | None":
    """Read what `write_tensors` wrote; None if there is no file.

    A damaged file gives None too, and a log line that says what happens `otherwise`.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except SafetensorError as error:
        log.warning("%s is damaged (%s): %s", file, error, otherwise)
        return None


def unique_beside(file: Path) -> Path:
    """Return a name next to `file` that no other process on any machine takes."""
    return file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}.part")


def umask() -> int:
    """Return the process's umask."""
    found = os.umask(0)
    os.umask(found)
    return found


def open_to_all(file: Path) -> None:
    """Give a file the permissions that the umask leaves: libraries write some for the owner alone."""
    file.chmod(0o666 & ~umask())


def writable(folder: Path) -> bool:
    """Return whether files can be created in `folder`, or the folder itself if it is missing."""
    there = next(one for one in (folder, *folder.parents) if os.access(one, os.F_OK))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


@contextlib.contextmanager
def locked(file: Path, waiting: str | None = None) -> Iterator[None]:
    """Context manager: holds the lock `file`; logs `waiting` if another process holds it.

    On a file system without locks it warns and holds nothing. Raises OSError if the file cannot be created.
    """
    lock = filelock.FileLock(file, mode=0o666 & ~umask())
    try:
        try:
            lock.acquire(timeout=1)
        except filelock.Timeout:
            if waiting is not None:
                log.info("%s", waiting)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        _warn_without_locks(file.parent)
    try:
        yield
    finally:
        lock.release()


def locks_hold(folder: Path) -> bool:
    """Return whether a lock that is held in `folder` is refused to a second descriptor."""
    file = unique_beside(folder / "locks")
    first, second = filelock.FileLock(file), filelock.FileLock(file)
    try:
        first.acquire(blocking=False)
        second.acquire(blocking=False)
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
    finally:
        second.release()
        first.release()
        file.unlink(missing_ok=True)
    return False


@functools.cache
def _warn_without_locks(folder: Path) -> None:
    log.warning("%s has no file locks: two processes may do the same work", folder)


def making_beside(folder: Path) -> Path:
    """Return a temporary name next to `folder` that contains the host and process, for `abandoned`."""
    return folder.with_name(f"{folder.name}.{MAKING}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}")


def remove_leftovers(folder: Path) -> None:
    """Delete the abandoned temporary folders of `folder`."""
    for leftover in folder.parent.glob(f"{folder.name}.{MAKING}*"):
        if abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def lives(name: str) -> bool | None:
    """Return whether the process lives whose host and id end `name`; None if this is another host."""
    here = re.fullmatch(rf".*(?:{MAKING}|_){re.escape(socket.gethostname())}-(\d+)-\w+", name)
    return alive(int(here[1])) if here else None


def abandoned(making: Path) -> bool:
    """Return whether nobody works in a folder named by `making_beside`.

    That is: its process ran on this machine and has ended, or the folder has not changed for a week.
    """
    if lives(making.name) is False:
        return True
    try:
        return time.time() - making.stat().st_mtime > ABANDONED
    except FileNotFoundError:  # its owner was faster
        return False


def alive(pid: int) -> bool:
    """Return whether a process with this id exists on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
