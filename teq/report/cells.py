"""What a table is made of: cells with their verdicts, recounted claims, the filled table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.report.layout import Formula, Layout
from teq.report.match import Match

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
Place = tuple[str, ...]  # the coordinates of a row or of a column
Cells = Mapping[tuple[Place, Place], "Cell"]  # by row and column


@dataclass(frozen=True)
class Cell:
    """What one cell shows. `at` holds its coordinates by axis; several `matches` are several seeds."""

    at: Mapping[str, str]
    formula: Formula
    jobs: Sequence["Job"]
    matches: Sequence[Match]
    ours: float | str | None
    stderr: float | None
    spread: float | None
    published: float | str | None
    verdict: str
    baseline_intervals: Sequence[tuple[float, float]] = ()  # each record minus the baseline's, 95 %
    is_best: bool = False

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which the records differ from the run that the cell stands for."""
        return {key: pair for match in self.matches for key, pair in match.differences.items()}

    @property
    def not_significant(self) -> bool:
        """Return whether a record does not differ significantly from the baseline's."""
        return any(low <= 0 <= high for low, high in self.baseline_intervals)

    @property
    def synthetic(self) -> bool:
        """Return whether the number comes from synthetic weights."""
        return any(match.record.synthetic for match in self.matches)

    @property
    def difference(self) -> float | None:
        """Return ours minus the published number."""
        if isinstance(self.ours, float) and isinstance(self.published, int | float):
            return self.ours - self.published
        return None


@dataclass(frozen=True)
class ClaimCount:
    """A claim of the paper, counted again: in how many scenarios, of how many."""

    says: str
    claimed: tuple[int, int]
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
    cells: Cells
    constant: Mapping[str, str]  # column axes that have one value here
    claims: Sequence[ClaimCount] = field(default=())

    def used(self) -> list[Match]:
        """Return every record that some cell shows, once each."""
        found = {match.record.file: match for cell in self.cells.values() for match in cell.matches}
        return list(found.values())
