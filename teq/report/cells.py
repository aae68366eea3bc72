"""What a table is made of: a cell's value and its verdict, a claim counted again, the filled table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.report.layout import Cell, Layout
from teq.report.match import Found

if TYPE_CHECKING:
    from teq.config import Job

BASELINE = "rtn"  # what differences are tested against
MATCH, BETTER, WORSE, DIFFERS, PARTIAL, NOT_RUN, OURS = (
    "match",
    "better",
    "worse",
    "differs",
    "partial",
    "not run",
    "ours only",
)
Place = tuple[str, ...]


@dataclass(frozen=True)
class Value:
    """What one cell shows. `at` holds its coordinates by axis; several `found` are several seeds."""

    at: Mapping[str, str]
    formula: Cell
    jobs: Sequence["Job"]
    found: Sequence[Found]
    ours: float | str | None
    stderr: float | None
    spread: float | None
    published: float | str | None
    verdict: str
    beside: Sequence[tuple[float, float]] = ()  # each record minus the baseline's: ends of the 95 % interval
    best: bool = False

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """The settings in which the records differ from the run that the cell stands for."""
        return {key: pair for found in self.found for key, pair in found.differences.items()}

    @property
    def noise(self) -> bool:
        """Whether a record of the cell cannot be told from the baseline on the same documents or windows."""
        return any(low <= 0 <= high for low, high in self.beside)

    @property
    def synthetic(self) -> bool:
        """Whether the number comes from made-up weights."""
        return any(found.record.synthetic for found in self.found)

    @property
    def difference(self) -> float | None:
        """Ours minus the published number."""
        if isinstance(self.ours, float) and isinstance(self.published, int | float):
            return self.ours - self.published
        return None


@dataclass(frozen=True)
class Checked:
    """A claim of the paper, counted again."""

    says: str
    claimed: tuple[int, int]  # how many, of how many
    published: tuple[int, int]  # recomputed from the published numbers
    ours: tuple[int, int]  # from the scenarios that our records cover
    partial: bool  # whether some of those are partial


@dataclass(frozen=True)
class Table:
    """A filled table. Rows and columns are tuples of coordinates; a column's last one is the cell's name."""

    name: str
    layout: Layout
    row_axes: Sequence[str]
    column_axes: Sequence[str]
    rows: Sequence[Place]
    columns: Sequence[Place]
    values: Mapping[tuple[Place, Place], Value]
    constant: Mapping[str, str]  # column axes that have one value here
    claims: Sequence[Checked] = field(default=())

    def used(self) -> list[Found]:
        """Every record that some cell shows, once each."""
        found = {f.record.file: f for value in self.values.values() for f in value.found}
        return list(found.values())
