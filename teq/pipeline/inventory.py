"""Inventory of the cache: all entries except records and reports, with kind, size and last use."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from teq import record
from teq.files import disk, in_use
from teq.files.disk import user_cache
from teq.pipeline.forecast import RATES
from teq.pipeline.store import DATA, MANIFEST

TENSORS = ("scales", "weights", "tuned", "reference")  # only their tensors are pruned: costs stay known
NOTES = ("digests", "revisions")  # small files of the user's cache
UNKNOWN = "not in a record"


@dataclass(frozen=True)
class Entry:
    """A file or folder of the cache `root`. The process that computes it holds the lock file `lock`."""

    kind: str
    root: Path
    path: Path
    lock: Path | None = None
    model: str = ""
    method: str = ""

    @property
    def used(self) -> float:
        """Return the time of the last use in seconds of the epoch: the store touches manifests."""
        states = _inside(self.path / MANIFEST) or _inside(self.path) or [self.path.lstat()]
        return max(state.st_mtime for state in states)

    @property
    def target(self) -> Path:
        """Return the path that pruning deletes."""
        return self.path / DATA if self.kind in TENSORS else self.path


def entries(home: Path) -> Iterator[Entry]:
    """Yield the entries of the folder `home` (TEQ_HOME) and of the user's cache."""
    store, user, named = home / "store", user_cache(), _named(home / "records")
    for path in sorted(store.glob("*/*/")):
        key, _, state = path.name.partition(".")
        kind = state.partition("-")[0] or path.parent.name
        yield Entry(kind, store, path, path.with_name(f"{key}.lock"), *named.get(key, (UNKNOWN, "")))
    for path in sorted((home / "partial").glob("*")):
        stage, _, key = path.name.rpartition("-")
        lock = store / stage / f"{key}.lock"
        yield Entry("partial", store, path, lock, *named.get(key, (UNKNOWN, "")))
    for kind in ("hydra", "failed", "wandb"):
        yield from (Entry(kind, store, path) for path in sorted((home / kind).glob("*")))
    if (home / RATES).is_file():
        yield Entry("rates", store, home / RATES)
    for path in sorted(user.glob("*/")):
        if path.name in NOTES:
            yield Entry(path.name, user, path)
        elif path.name != in_use.FOLDER:
            name, making, _ = path.name.partition(f".{disk.MAKING}")
            yield Entry("making" if making else "converted", user, path, user / f"{name}.lock", name)


def _named(records: Path) -> dict[str, tuple[str, str]]:
    """Map each stage key to the model and the methods of the `records` that contain it."""
    found: dict[str, tuple[str, set[str]]] = {}
    for one in record.load(records):
        for stage in one.data["stages"].values():
            run = one.data["run"]
            found.setdefault(stage["key"], (run["model"]["name"], set()))[1].add(run["method"])
    return {key: (model, ", ".join(sorted(methods))) for key, (model, methods) in found.items()}


def size(path: Path) -> int:
    """Return the bytes of a file or of all files in a folder; 0 if it does not exist."""
    return sum(state.st_size for state in _inside(path))


def _inside(path: Path) -> list[os.stat_result]:
    """Return the status of a file or of all files in a folder; skips files deleted meanwhile."""
    walked = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    found = []
    for one in walked if path.is_dir() and not path.is_symlink() else (path,):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found.append(one.lstat())
    return found
