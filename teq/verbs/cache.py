"""`python -m teq cache [prune]`: show what the cache holds by stage, model and method; free space in it."""

import argparse
import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import filelock

from teq import config
from teq.console import aligned
from teq.files import disk, in_use
from teq.files.disk import user_cache
from teq.pipeline.inventory import TENSORS, Entry, entries, size
from teq.spec import UserError

SECONDS = {"m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}
WHOLE = ("partial", "damaged", "making", "hydra", "failed", "wandb", "converted")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: `python -m teq cache --help` shows what is allowed")


def main(argv: list[str]) -> int:
    """Print or prune the cache. Returns the exit status; raises UserError."""
    known = [*TENSORS, *WHOLE, "all"]
    parser = _Parser("python -m teq cache", description="Show what the cache holds, or free space in it.")
    parser.add_argument("verb", nargs="?", choices=["prune"])
    parser.add_argument("--stage", nargs="+", choices=known, default=[], help="what to prune")
    parser.add_argument("--older", metavar="AGE", default="0m", help="not used for so long: 30d, 12h, 2w")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    try:
        given = parser.parse_args(argv)
    except SystemExit as stopped:  # --help
        return int(stopped.code or 0)
    if given.verb is None:
        if argv:
            raise UserError(f"{' '.join(argv)} has no effect without `prune`: python -m teq cache prune ...")
    elif not given.stage:
        raise UserError(f"prune needs --stage <what>: some of {', '.join(known)}")
    kinds, before = (known if "all" in given.stage else given.stage), time.time() - _seconds(given.older)
    try:
        there = list(entries(config.home()))
        if given.verb is None:
            print(_table(there))
            return 0
        chosen = [e for e in there if e.kind in kinds and os.path.lexists(e.target) and e.used <= before]
        return _prune(chosen, given.yes)
    except OSError as error:
        where = error.filename or config.home()
        raise UserError(
            f"{where} cannot be {'deleted' if given.verb else 'read'} ({error.strerror})"
        ) from error


def _prune(found: list[Entry], sure: bool) -> int:
    if found:
        print(_table(found))
        total = _amount(sum(size(e.target) for e in found))
        if not sure and not sys.stdin.isatty():
            raise UserError(f"{total} would be deleted, and there is no terminal to ask on: add --yes")
        if not sure and not _agreed(f"delete {total} of this? [y/N] "):
            print("nothing was deleted")
            return 0
    sizes = {e.path: size(e.target) for e in found}
    kept = [e for e in found if not _deleted(e)]
    freed = _amount(sum(sizes.values()) - sum(sizes[e.path] for e in kept))
    left = f"; {len(kept)} left, which running processes use" if kept else ""
    print(f"freed {freed}: {len(found) - len(kept)} of {len(found)}{left}" if found else "nothing to prune")
    _delete_locks()
    return 0


def _table(found: list[Entry]) -> str:
    """Format entries as a table: one row per kind, model and method."""
    rows = [["what", "model", "method", "number", "size", "last used"]]
    for group in dict.fromkeys((e.kind, e.model, e.method) for e in found):
        alike = [e for e in found if (e.kind, e.model, e.method) == group]
        ages = [_age(time.time() - used) for used in sorted((e.used for e in alike), reverse=True)]
        ago = " to ".join(dict.fromkeys([ages[0], ages[-1]]))
        rows.append([*group, str(len(alike)), _amount(sum(size(e.path) for e in alike)), f"{ago} ago"])
    total = f"{config.home()} and {user_cache()}: {_amount(sum(size(e.path) for e in found))}"
    return f"{aligned(rows)}\n{total}" if found else total


def _amount(bytes_: float) -> str:
    """Format a number of bytes."""
    power, unit = next((p for p in ((9, "GB"), (6, "MB"), (3, "kB")) if bytes_ >= 10 ** p[0]), (0, "B"))
    return f"{bytes_ / 10**power:.{1 if power else 0}f} {unit}"


def _age(seconds: float) -> str:
    unit, length = next((u for u in (("d", 86400), ("h", 3600)) if seconds >= u[1]), ("min", 60))
    return f"{max(0.0, seconds) / length:.0f} {unit}"


def _agreed(question: str) -> bool:
    with contextlib.suppress(EOFError):
        return input(question).strip().lower() in ("y", "yes")
    return False


def _deleted(entry: Entry) -> bool:
    """Delete an entry unless a running process uses it. Returns whether it was deleted."""
    with in_use.unchanging(entry.root), _free(entry.lock) as free:
        used = in_use.held(entry.root)
        name = str(entry.path.relative_to(entry.root)) if entry.path.is_relative_to(entry.root) else None
        lives = disk.lives(entry.path.name)
        fresh = time.time() - entry.used < disk.ABANDONED
        waits = (
            (entry.kind == "making" and not disk.abandoned(entry.path))
            or (entry.kind == "hydra" and (fresh if lives is None else lives))
            or (entry.kind == "wandb" and used)  # its folders do not name their process
        )
        if not free or name in used or waits:
            return False
        if entry.target.is_dir() and not entry.target.is_symlink():
            shutil.rmtree(entry.target)
        else:
            entry.target.unlink(missing_ok=True)
    return True


def _delete_locks() -> None:
    """Delete the lock files whose artefacts do not exist any more."""
    for lock in [*(config.home() / "store").glob("*/*.lock"), *user_cache().glob("*.lock")]:
        with _free(lock) as free:
            if free and not lock.with_suffix("").exists():
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _free(lock: Path | None) -> Iterator[bool]:
    """Context manager: holds `lock` if no other process does, and yields whether it does."""
    with contextlib.ExitStack() as stack:
        free = True
        if lock is not None and lock.exists():
            held = filelock.FileLock(lock)
            try:
                held.acquire(timeout=0)
                stack.callback(held.release)
            except filelock.Timeout:
                free = False
            except (OSError, NotImplementedError) as error:
                # without locks in the file system nobody holds one
                if isinstance(error, OSError) and error.errno not in disk.NO_LOCKS:
                    raise
        yield free


def _seconds(age: str) -> float:
    fitted = re.fullmatch(r"(\d+)([mhdw])", age)
    if fitted is None:
        raise UserError(f"--older={age} is not allowed: it must be a number of m, h, d or w, such as 30d")
    return int(fitted[1]) * SECONDS[fitted[2]]
