"""What a table is made of: cells with their verdicts, recounted claims, the filled table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teq.report.layout import Formula, Layout
from teq.report.match import Match
from teq.statistics import LEVEL, Difference

if TYPE_CHECKING:
    from teq.config import Job

MATCH, BETTER, WORSE, DIFFERS, PARTIAL, NOT_RUN, OURS = (
    "match",
    "better",
    "worse",
    "differs",
    "partial",
    "not run",
    "ours only",
)
ONE_SEED, AS_STATED, UNJUDGED = "one seed", "as stated", "not judged"
Place = tuple[str, ...]  # the coordinates of a row or of a column
Cells = Mapping[tuple[Place, Place], "Cell"]  # by row and column


@dataclass(frozen=True)
class Comparison:
    """A cell's paired difference to another one's: per cent of perplexity, nats of KL, points of a share.

    `adjusted` is its p value among all comparisons of the table (Benjamini-Hochberg). `discordant` counts the
    documents that only this cell and only the other one had right, where McNemar's test compared them.
    """

    difference: Difference
    unit: str  # "%", "nats" or "points"
    versus: str = ""  # the other cell's method
    adjusted: float = 1.0
    n: int = 0  # windows or documents
    discordant: tuple[int, int] | None = None
    against: Sequence[str] = ()  # the other cell's records

    @property
    def significant(self) -> bool:
        """Return whether it differs significantly."""
        return self.adjusted < LEVEL


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
    seeds: Sequence[float] = ()  # the number of each record
    versus: Comparison | None = None  # with the layout's baseline
    is_best: bool = False  # or not significantly worse than the best
    gap: float | None = None  # recovered of what rounding costs, (rtn - m) / (rtn - fp)
    published_gap: float | None = None

    @property
    def differences(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings in which the records differ from the run that the cell stands for."""
        return {key: pair for match in self.matches for key, pair in match.differences.items()}

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
class Outcome:
    """Of how many scenarios the winners won; of those that were tested, how many significantly either way."""

    won: int = 0
    of: int = 0
    tested: int = 0
    wins: int = 0  # significant ones
    losses: int = 0


@dataclass(frozen=True)
class ClaimCount:
    """A claim of the paper, counted again."""

    says: str
    claimed: tuple[int, int]  # how many, of how many
    published: Outcome  # recomputed from the published numbers, tested against our records' paired error
    ours: Outcome  # from the scenarios that our records cover
    partial: int  # how many of those are partial


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
