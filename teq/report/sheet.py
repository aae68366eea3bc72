"""The sheet: what a table and a figure's numbers both become, and all that the writers read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Box:
    """One printed cell, in words; empty text stands for nothing to say.

    `kind` is head (a coordinate), text, quoted (a number from elsewhere), empty, or cell: that one has a
    verdict, and `detail` for whoever opens it. `sort` orders boxes of a column.
    """

    kind: str
    ours: str = ""
    best: bool = False
    versus: str = ""  # the paired difference to the table's baseline
    spread: str = ""
    seeds: int = 1
    published: str = ""
    difference: str = ""
    verdict: str = ""
    mark: str = ""  # of footnotes
    synthetic: bool = False
    sort: float | str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Title, caption, a grid of boxes and the lines below it; `data` is the same for machines."""

    name: str
    kind: str  # table or figure
    title: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Box]]
    rules: Sequence[int] = ()  # rows that begin a new block
    notes: Sequence[Sequence[str]]  # texts and code in turn
    claims: Sequence[str] = ()
    constant: str = ""
    picture: bool = False  # whether there is a drawing
    data: Sequence[Sequence[str]]  # a header and a line per cell, or per layer of a panel

    @property
    def heads(self) -> int:
        """Return the number of leading columns that hold coordinates."""
        return sum(box.kind == "head" for box in self.rows[0]) if self.rows else 0
