"""How an experiment file says its records are shown: its `layout` node, checked key by key.

layout:
  title: ...  caption: ...        in our own words
  rows: [grid, method]            axes: what the sweep varies; `grid` stands for bits and group_size together
  columns: [model]
  cells:                          one column for each, below the columns' axes
    accuracy: {label: mean accuracy, mean: [hellaswag.acc, piqa.acc], times: 100, best: highest}
  published: {across: {model: [opt-6.7b, ...]}, numbers: {w4: {rtn: [62.99, ...]}}}
  claims: [{says: ..., winners: [teq], losers: [rtn], count: 11, of: 12}]
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teq.spec import Settings, option

CELL = "cell"  # the axis of a table's own cells, in `published.across`
COSTS = ("seconds", "peak_bytes")  # of a stage: `seconds.scales`, `peak_bytes.weights`
WEIGHTS = "quantization"  # of the weights: `quantization.bits_per_weight`
UNMEASURED = (*COSTS, WEIGHTS)  # what metrics name that no evaluation measures
FULL = "full"  # the grid of a run that keeps floating point
BASELINE = "rtn"
ANY = "any"  # the value of an axis that a run does not depend on


@dataclass(frozen=True, kw_only=True)
class Formula(Settings):
    """What a cell computes from a record: `mean`, `sum` or `ratio` of metrics, or a `setting` of the run.

    A metric is `<evaluation>.<name>`, `seconds.<stage>`, `peak_bytes.<stage>` or
    `quantization.bits_per_weight`, which counts scales and zeros (float: the dtype's bits); the stage
    `quantizing` is all of those that make the quantized model. `best` says
    which end is good (null: neither, the cell is compared with the published number for equality).
    `allowance` (in the cell's unit) and `allowance_percent` (of the published number) are how far a
    reproduction may lie from it beyond printed digits and seed noise, for libraries and hardware that round
    otherwise.
    """

    label: str
    mean: tuple[str, ...] | None = None
    sum: tuple[str, ...] | None = None
    ratio: tuple[str, ...] | None = None
    setting: str | None = None
    times: float = 1.0
    digits: int = option(2, at_least=0, at_most=12)
    best: str | None = option(None, among=("lowest", "highest"))
    allowance: float = option(0.0, at_least=0)
    allowance_percent: float = option(0.0, at_least=0)

    @property
    def lower_is_better(self) -> bool:
        """Return whether the lowest number is the best."""
        return self.best == "lowest"

    @property
    def names(self) -> tuple[str, ...]:
        """Return the metrics it reads."""
        return self.mean or self.sum or self.ratio or ()

    @property
    def factor(self) -> float:
        """Return what the mean over its metrics is multiplied by, of a mean or a sum."""
        return self.times * (1 if self.mean else len(self.names))

    @property
    def is_cost(self) -> bool:
        """Return whether it reads seconds or memory, which no other machine has to meet."""
        return any(name.rpartition(".")[0] in COSTS for name in self.names)

    def evaluations(self) -> set[str]:
        """Return the evaluations it reads."""
        return {name.rpartition(".")[0] for name in self.names} - set(UNMEASURED)

    def apply(self, values: Sequence[float]) -> float:
        """Return the cell's number from the values of its metrics, in the order of `names`."""
        if self.ratio:
            return self.times * values[0] / values[1]
        total = math.fsum(values)
        return self.times * (total / len(values) if self.mean else total)


@dataclass(frozen=True, kw_only=True)
class Published(Settings):
    """Published numbers: nested by the table's row axes, then lists that run over the product of `across`.

    `only` names the values of axes for which they hold at all. A null is a number that was not published.
    """

    numbers: dict[str, Any]
    across: dict[str, Any]
    only: dict[str, Any] | None = None

    def at(self, coordinates: Mapping[str, str], rows: Sequence[str]) -> float | str | None:
        """Return the number at some coordinates (one value per axis), or None."""
        node: Any = self.numbers
        for axis in rows:
            node = node.get(coordinates[axis]) if isinstance(node, Mapping) else None
        return None if node is None else self.pick(node, coordinates)

    def pick(self, numbers: Sequence[Any], coordinates: Mapping[str, str]) -> float | str | None:
        """Return the one of a list over `across` that belongs to some coordinates, or None."""
        if any(coordinates.get(axis) != value for axis, value in (self.only or {}).items()):
            return None
        index = 0
        for axis, values in self.across.items():
            if coordinates.get(axis) not in values:
                return None
            index = index * len(values) + values.index(coordinates[axis])
        return numbers[index]


@dataclass(frozen=True, kw_only=True)
class Claim(Settings):
    """A sentence of the paper that its numbers decide: how often the best winner beats the best loser.

    A scenario is a cell position without its method. `tables` are the experiments it spans (null: this one).
    """

    says: str
    winners: tuple[str, ...]
    losers: tuple[str, ...]
    count: int = option(at_least=0)
    of: int = option(at_least=1)
    tables: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Quoted(Settings):
    """A row of numbers from elsewhere that no run of ours stands for.

    `at` is its place among the rows, `source` says whose they are, `values` run over `published.across`.
    """

    at: dict[str, Any]
    source: str
    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Layout(Settings):
    """A table (rows, columns, cells) or a figure (panels, and the table of its numbers)."""

    title: str
    caption: str
    kind: str = option("table", among=("table", "figure"))
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    cells: dict[str, Any] | None = None
    published: Published | None = None
    quoted: tuple[Any, ...] = ()
    claims: tuple[Any, ...] = ()
    notes: tuple[str, ...] = ()
    panels: dict[str, Any] | None = None
    versus: dict[str, Any] | None = None  # by method: another baseline than RTN

    def baseline(self, method: str) -> str:
        """Return the method that a method's cells are compared with."""
        return str((self.versus or {}).get(method, BASELINE))
