"""Files: digests, writing aside and renaming into place."""

import hashlib
import os
from pathlib import Path


def sha256(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a file aside and rename it into place, on disk before it is seen. Makes the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = unique_beside(file)
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


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
