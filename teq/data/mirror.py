"""Sets from a local folder: TEQ_DATA/<set>/<split>.parquet, checked against its lock file if it has one."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq.data.sources import Source
from teq.files.digests import file_digest
from teq.files.disk import one_line
from teq.spec import UserError

if TYPE_CHECKING:
    import pyarrow

LOCK = "teq-lock.json"


@dataclass(frozen=True)
class Mirrored:
    """A set found in a mirror: `file` relative to it without `.parquet`, `rows` in that file."""

    name: str
    source: Source
    root: Path
    file: str
    rows: int

    @property
    def path(self) -> Path:
        """Return the Parquet file."""
        return path_in(self.root, self.file)

    @property
    def partial(self) -> bool:
        """Return whether rows are missing that the whole set has, or a sample stands in for it."""
        return self.file != self.source.file or self.rows < self.source.expected

    def provenance(self) -> dict[str, Any]:
        """Return name, digest, rows read and in all, and the hub's commit where the lock knows it."""
        found = {
            "name": self.name,
            "file": f"{self.file}.parquet",
            "sha256": file_digest(self.path),
            "rows": min(self.rows, self.source.expected),
            "expected_rows": self.source.expected,
            "partial": self.partial,
        }
        revision = read_lock(self.root).get(self.file, {}).get("revision")
        return found if revision is None else {**found, "revision": revision}

    def table(self) -> "pyarrow.Table":
        """Return the rows that are read."""
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path).slice(0, self.source.first)


def root() -> Path | None:
    """Return the mirror's folder TEQ_DATA, or None if unset. Raises UserError when it is no folder."""
    named = os.environ.get("TEQ_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise UserError(f"TEQ_DATA={named} is not a folder: name one that holds <set>/<split>.parquet")
    return folder


def find(name: str, source: Source) -> Mirrored | None:
    """Find the set in the mirror, its columns and digest checked; None if it is not there.

    A sample is taken only where the set's own file is missing or a part. Raises UserError for a file that is
    damaged, empty, or not what its name says.
    """
    folder = root()
    if folder is None:
        return None
    found = [
        Mirrored(name, source, folder, file, _checked_rows(folder, file, source))
        for file in (source.file, source.sample)
        if file is not None and path_in(folder, file).is_file()
    ]
    whole = [each for each in found if not each.partial]
    samples = [each for each in found if each.file == source.sample]
    return next(iter([*whole, *samples, *found]), None)


def path_in(folder: Path, file: str) -> Path:
    """Return where a mirror in `folder` keeps `file`."""
    return folder / f"{file}.parquet"


def read_lock(folder: Path) -> dict[str, dict[str, Any]]:
    """Return name, repo, revision, rows and sha256 by file, as they were fetched; empty without a lock."""
    lock = folder / LOCK
    if not lock.is_file():
        return {}
    try:
        entries = json.loads(lock.read_text())
        if not all(isinstance(entry["sha256"], str) for entry in entries.values()):
            raise TypeError("a digest is no text")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"the lock file {lock} is damaged ({error}): fetch the sets into a new folder"
        ) from error
    return entries


def check_schema(schema: "pyarrow.Schema", source: Source, where: str) -> None:
    """Raise UserError where a column that is read is missing or of another type."""
    for column, kind in source.columns.items():
        if column not in schema.names:
            raise UserError(f"{where} has no column {column!r}: it has {', '.join(schema.names)}")
        found = _kind(schema.field(column).type)
        if found != kind:
            raise UserError(f"the column {column!r} of {where} is {found}: it must be {kind}")


def _checked_rows(folder: Path, file: str, source: Source) -> int:
    """Return the rows of a mirror's file, after every check that its digest and its footer allow."""
    import pyarrow
    import pyarrow.parquet

    path = path_in(folder, file)
    locked = read_lock(folder).get(file)
    if locked is not None and locked["sha256"] != file_digest(path):
        raise UserError(
            f"{path} has sha256 {file_digest(path)}, its lock says {locked['sha256']}: the file is refused, "
            f"fetch it again with `python -m teq prefetch`"
        )
    try:
        footer = pyarrow.parquet.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a Parquet file ({one_line(error)})") from error
    check_schema(schema, source, str(path))
    if not 0 < footer.num_rows <= source.rows:
        raise UserError(f"{path} has {footer.num_rows} rows: the whole split has {source.rows}")
    return footer.num_rows


def _kind(arrow: "pyarrow.DataType") -> str:
    """Return an Arrow type in the few words that `Source.columns` uses."""
    from pyarrow import types

    if types.is_string(arrow) or types.is_large_string(arrow):
        return "string"
    if types.is_integer(arrow):
        return "integer"
    if types.is_list(arrow) or types.is_large_list(arrow):
        return f"list<{_kind(arrow.value_type)}>"
    return str(arrow)
