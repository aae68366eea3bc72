"""Reading a layout: its node in an experiment file, checked key by key, with the way out in each message."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from teq.report.layout import CELL, Claim, Formula, Layout, Published, Quoted
from teq.spec import Settings, UserError, did_you_mean


def parse(
    name: str, raw: Mapping[str, Any] | None, known: Mapping[str, Sequence[str]] | None = None
) -> Layout:
    """Return the layout of experiments/<name>.yaml. Raises UserError that names file, key and value.

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
        key: _build(Formula, value, f"{where}.cells.{key}")
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
            raise UserError(f"{where}.{key} is not known: {did_you_mean(key, fields)}")
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
                    "<evaluation>.<name>, such as wikitext2.ppl, or seconds.<stage>"
                )
        if cell.ratio is not None and len(cell.ratio) != 2:
            raise UserError(
                f"{where}.cells.{key}.ratio={list(cell.ratio)} is not allowed: it must be two metrics"
            )


def _check_claims(layout: Layout, known: Mapping[str, Sequence[str]], where: str) -> None:
    """Reject unknown methods in claims: they would silently match no scenario."""
    methods = known.get("method")
    for i, claim in enumerate(layout.claims):
        for key in ("winners", "losers"):
            for method in getattr(claim, key):
                if methods is not None and method not in methods:
                    problem = f"{where}.claims[{i}].{key} names the method {method!r}"
                    raise UserError(f"{problem}: {did_you_mean(method, methods)}")


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
    """Check that published numbers belong to an existing cell; text is allowed only for setting cells."""
    given = [(axis, value) for axis, values in published.across.items() for value in values]
    given += (published.only or {}).items()
    for path, _ in _leaves(published.numbers):
        given += zip(layout.rows, path, strict=True)
    for axis, value in given:
        if axis in known and value not in known[axis]:
            problem = f"{where} has numbers for {axis}={value}, which no cell can have"
            raise UserError(f"{problem}: {did_you_mean(value, known[axis])}")
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
