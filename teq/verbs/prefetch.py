"""`python -m teq prefetch`: put public sets into a mirror, with a lock file that says what they are."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from teq.console import track
from teq.data import hub, mirror
from teq.data.sources import SOURCES, source
from teq.files import disk
from teq.files.digests import file_digest
from teq.spec import UserError


def main(argv: list[str]) -> int:
    """Fetch the named sets into a mirror. Returns the exit status: 0 when all of them are there.

    Raises UserError for an unknown name or a folder that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m teq prefetch",
        description="Download public sets into a mirror, each at the commit its revision means today.",
        epilog=f"names: {', '.join(SOURCES)}",
    )
    parser.add_argument("names", nargs="*", default=["all"], help="sets by name, or all (the default)")
    parser.add_argument("--into", metavar="FOLDER", help="the mirror's folder (default: TEQ_DATA)")
    try:
        given = parser.parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)
    wanted: dict[str, str] = {}  # two protocols may read one file
    for name in SOURCES if "all" in given.names else given.names:
        wanted.setdefault(source(name).file, name)
    folder = _folder(given.into)
    for client in ("httpx", "httpx2"):  # the hub's client, by its version: it logs every request
        logging.getLogger(client).setLevel(logging.WARNING)
    failed = 0
    for name in track(list(wanted.values()), "prefetch"):
        try:
            print(fetch(name, folder))
        except UserError as error:
            failed += 1
            print(f"error: {error}", file=sys.stderr)
    print(f"{len(wanted) - failed} of {len(wanted)} files in {folder}: set TEQ_DATA={folder} to use them")
    return 1 if failed else 0


def fetch(name: str, folder: Path) -> str:
    """Download one set into the mirror unless its commit is there already. Returns what was done.

    The lock comes first and the file is renamed into place last, so an interrupted fetch leaves no file that
    nothing vouches for. Raises UserError when the set is out of reach, or such a file is in the way.
    """
    import pyarrow.parquet

    wanted = source(name)
    path, locked = mirror.path_in(folder, wanted.file), mirror.read_lock(folder).get(wanted.file)
    if path.exists() and locked is None:
        raise UserError(f"{path} is in no lock file, so it is not overwritten: move it away to fetch {name}")
    found = hub.find(name, wanted)
    if path.exists() and (locked["revision"], locked["sha256"]) == (found.commit, file_digest(path)):
        return f"{name}: {found.commit} is there already"
    rows = found.all_rows()
    with disk.aside(path) as aside:
        pyarrow.parquet.write_table(rows, aside, compression="zstd")
        entry = {"name": name, "repo": wanted.repo, "revision": found.commit, "rows": len(rows)}
        _lock(folder, wanted.file, {**entry, "sha256": file_digest(aside)})
    return f"{name}: {len(rows)} rows of {wanted.repo}@{found.commit}"


def _folder(given: str | None) -> Path:
    """Return the mirror's folder, made where it is missing. Raises UserError."""
    named = given or os.environ.get("TEQ_DATA")
    if not named:
        raise UserError("prefetch needs a folder: set TEQ_DATA, or pass --into <folder>")
    folder = Path(named).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the mirror {folder} cannot be made ({error.strerror}): choose another") from error
    return folder


def _lock(folder: Path, file: str, entry: dict[str, Any]) -> None:
    """Add an entry to the lock file; other processes wait."""
    lock = folder / mirror.LOCK
    with disk.locked(lock.with_suffix(".json.lock"), f"{lock}: another process writes it, waiting"):
        entries = {**mirror.read_lock(folder), file: entry}
        disk.write_text(lock, json.dumps(entries, indent=1, sort_keys=True) + "\n")
