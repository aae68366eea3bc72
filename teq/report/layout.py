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

import dataclasses
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teq.spec import Settings, UserError, option

CELL = "cell"  # the axis of a table's own cells, in `published.across`
COSTS = ("seconds", "peak_bytes")  # of a stage: `seconds.scales`, `peak_bytes.weights`
FULL = "full"  # the grid of a run that keeps floating point
ANY = "any"  # the value of an axis that a run does not depend on


@dataclass(frozen=True, kw_only=True)
class Cell(Settings):
    """What is computed of a record: exactly one of `mean`, `sum`, `ratio` of metrics, or a `setting` of the
    run.

    A metric is `<evaluation>.<name>`, or `seconds.<stage>` and `peak_bytes.<stage>`. `best` says which end is
    good (null: neither, the cell is compared with the published number for equality).
    """

    label: str
    mean: tuple[str, ...] | None = None
    sum: tuple[str, ...] | None = None
    ratio: tuple[str, ...] | None = None
    setting: str | None = None
    times: float = 1.0
    digits: int = option(2, at_least=0, at_most=12)
    best: str | None = option(None, among=("lowest", "highest"))

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics it reads."""
        return self.mean or self.sum or self.ratio or ()

    def evaluations(self) -> set[str]:
        """The evaluations it reads."""
        return {name.rpartition(".")[0] for name in self.names} - set(COSTS)

    def apply(self, values: Sequence[float]) -> float:
        """The cell's number from the values of its metrics, in the order of `names`."""
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
        """The number at some coordinates (one value an axis), or None."""
        node: Any = self.numbers
        for axis in rows:
            node = node.get(coordinates[axis]) if isinstance(node, Mapping) else None
        return None if node is None else self.pick(node, coordinates)

    def pick(self, numbers: Sequence[Any], coordinates: Mapping[str, str]) -> float | str | None:
        """The one of a list over `across` that belongs to some coordinates, or None."""
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
    """A sentence of the paper that its numbers decide: in how many scenarios the best winner beats the best
    loser.

    A scenario is one cell position without its method. `tables` are the experiments it spans (null: this
    one).
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


def parse(
    name: str, raw: Mapping[str, Any] | None, known: Mapping[str, Sequence[str]] | None = None
) -> Layout:
    """The layout of experiments/<name>.yaml. Raises UserError that names the file, the key, the value, the
    way out.

    `known` are the values that an axis can have, for the axes of which that is known: a published number at
    any other would never be shown.
    """
    where = f"experiments/{name}.yaml: layout"
    if raw is None:
        raise UserError(
            f"{where} is missing: it says how the experiment is shown (title, caption, rows, cells)"
        )
    nested = dict(_mapping(raw, where))
    if raw.get("published") is not None:
        nested["published"] = _build(Published, raw["published"], f"{where}.published")
    nested["cells"] = {
        key: _build(Cell, value, f"{where}.cells.{key}")
        for key, value in _mapping(raw.get("cells") or {}, f"{where}.cells").items()
    }
    for key, kind in (("claims", Claim), ("quoted", Quoted)):
        nested[key] = tuple(
            _build(kind, one, f"{where}.{key}[{i}]") for i, one in enumerate(raw.get(key) or ())
        )
    layout = _build(Layout, nested, where)
    if layout.quoted and layout.published is None:
        raise UserError(f"{where}.quoted needs published.across, which its values run over")
    _check_cells(layout, where)
    _check_claims(layout, known or {}, where)
    if layout.published is not None:
        _check_published(layout, layout.published, f"{where}.published")
        _check_places(layout, layout.published, known or {}, f"{where}.published")
    return layout


def _build(kind: type[Settings], raw: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in _mapping(raw, where):
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{where}.{key} is not known: {hint}it must be one of {', '.join(fields)}")
    for field in fields.values():
        if field.name not in raw and field.default is dataclasses.MISSING:
            raise UserError(f"{where}.{field.name} is missing")
    try:
        return kind(**raw)
    except UserError as error:
        raise UserError(f"{where}.{error}") from None


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}={raw!r} is not allowed: it must be a mapping of keys to values")
    return raw


def _check_cells(layout: Layout, where: str) -> None:
    if layout.kind == "figure":
        return
    if not layout.rows or not layout.cells:
        raise UserError(f"{where}.{'cells' if layout.rows else 'rows'} is empty: a table needs at least one")
    for key, cell in layout.cells.items():
        given = [name for name in ("mean", "sum", "ratio", "setting") if getattr(cell, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"{where}.cells.{key} has {' and '.join(given) or 'no formula'}: "
                "it must have exactly one of mean, sum, ratio, setting"
            )
        for name in cell.names:
            if not all(name.rpartition(".")):
                raise UserError(
                    f"{where}.cells.{key}.{given[0]}={name!r} is not allowed: a metric is "
                    "<evaluation>.<name>, "
                    "such as wikitext2.ppl, or seconds.<stage>"
                )
        if cell.ratio is not None and len(cell.ratio) != 2:
            raise UserError(
                f"{where}.cells.{key}.ratio={list(cell.ratio)} is not allowed: it must be two metrics"
            )


def _check_claims(layout: Layout, known: Mapping[str, Sequence[str]], where: str) -> None:
    """A claim about a method that there is not would count nothing and look like an answer."""
    methods = known.get("method")
    for i, claim in enumerate(layout.claims):
        for key in ("winners", "losers"):
            for method in getattr(claim, key):
                if methods is not None and method not in methods:
                    close = difflib.get_close_matches(str(method), methods, 1)
                    hint = f"did you mean {close[0]}? " if close else ""
                    raise UserError(
                        f"{where}.claims[{i}].{key} names the method {method!r}: {hint}it must be one of "
                        f"{', '.join(methods)}"
                    )


def _check_published(layout: Layout, published: Published, where: str) -> None:
    allowed = (*layout.columns, CELL)
    for axis, values in published.across.items():
        if axis not in allowed or not isinstance(values, list):
            raise UserError(
                f"{where}.across.{axis}={values!r} is not allowed: it must be a list for one of "
                f"{', '.join(allowed)}"
            )
        if axis == CELL and (unknown := [value for value in values if value not in (layout.cells or {})]):
            raise UserError(
                f"{where}.across.cell={unknown[0]!r} is not allowed: it must be one of "
                f"{', '.join(layout.cells or {})}"
            )
    if len(layout.cells or {}) > 1 and CELL not in published.across:
        raise UserError(f"{where}.across must name `cell`: the table has {len(layout.cells or {})} of them")
    length = math.prod(len(values) for values in published.across.values())
    for i, quoted in enumerate(layout.quoted):
        if len(quoted.values) != length or set(quoted.at) - set(layout.rows):
            raise UserError(
                f"{where.rpartition('.')[0]}.quoted[{i}] is not allowed: `at` must name some of "
                f"{', '.join(layout.rows)} and `values` have {length} numbers"
            )
    for path, leaf in _leaves(published.numbers):
        at = ".".join([f"{where}.numbers", *path])
        if not isinstance(leaf, list) or len(path) != len(layout.rows):
            raise UserError(
                f"{at}={leaf!r} is not allowed: the numbers nest by {', '.join(layout.rows)} and end in lists"
            )
        if len(leaf) != length:
            raise UserError(
                f"{at} has {len(leaf)} numbers: it must have {length}, one for each of "
                f"{_product(published.across)}"
            )
        if wrong := [v for v in leaf if not isinstance(v, int | float | str | None) or isinstance(v, bool)]:
            raise UserError(f"{at} holds {wrong[0]!r}: it must be numbers, texts or null")


def _check_places(
    layout: Layout, published: Published, known: Mapping[str, Sequence[str]], where: str
) -> None:
    """Published numbers stand where a cell can be, and are texts only where the cell is one."""
    given = [(axis, value) for axis, values in published.across.items() for value in values]
    given += (published.only or {}).items()
    for path, _ in _leaves(published.numbers):
        given += zip(layout.rows, path, strict=True)
    for axis, value in given:
        if axis in known and value not in known[axis]:
            close = difflib.get_close_matches(str(value), known[axis], 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(
                f"{where} has numbers for {axis}={value}, which no cell can have: {hint}it must be one of "
                f"{', '.join(known[axis])}"
            )
    cells = layout.cells or {}
    places = list(itertools.product(*published.across.values()))
    for path, leaf in _leaves(published.numbers):
        for place, number in zip(places, leaf, strict=True):
            name = dict(zip(published.across, place, strict=True)).get(CELL, next(iter(cells)))
            if isinstance(number, str) and cells[name].setting is None:
                raise UserError(
                    f"{where}.numbers.{'.'.join(path)} holds {number!r} for {name}: it must be a number"
                )


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, node


def _product(across: Mapping[str, list[Any]]) -> str:
    return " x ".join(f"{axis} ({', '.join(map(str, values))})" for axis, values in across.items())
