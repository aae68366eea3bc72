"""Files: digests, writing aside and renaming into place."""

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
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
    """What `write_tensors` wrote; None where nothing is, or where it is damaged: logged, with what happens
    `otherwise`.
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
    """A name beside `file` that no other process on any machine takes."""
    return file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}-{os.urandom(4).hex()}.part")


def umask() -> int:
    """The process's umask."""
    found = os.umask(0)
    os.umask(found)
    return found


def open_to_all(file: Path) -> None:
    """Give a file the permissions that the umask leaves: libraries write some for the owner alone."""
    file.chmod(0o666 & ~umask())
