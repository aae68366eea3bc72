"""The paper's claims, counted again on its own numbers and on ours: wins, ties and losses beyond chance."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from teq import statistics
from teq.report import compare
from teq.report.cells import PARTIAL, Cell, ClaimCount, Comparison, Outcome, Table
from teq.report.layout import Claim, Formula
from teq.statistics import LEVEL

Sides = tuple[Cell, Cell]  # the best winner and the best loser of a scenario


def count_claims(tables: Mapping[str, Table]) -> dict[str, list[ClaimCount]]:
    """Count the claims of every table on published numbers and on ours.

    `tables` holds each table that a claim names. Tests are corrected within a table's claims (Holm).
    """
    counted = {}
    for name, table in tables.items():
        claims = table.layout.claims
        named = [[tables[other] for other in claim.tables or (name,)] for claim in claims]
        found = [_scenarios(claim, each) for claim, each in zip(claims, named, strict=True)]
        tests = _tests([sides for ours, _ in found for sides in ours])
        published = _tests_of_published([sides for _, theirs in found for sides in theirs], named)
        counted[name] = [
            ClaimCount(
                claim.says,
                (claim.count, claim.of),
                _outcome(theirs, "published", published),
                _outcome(ours, "ours", tests),
                sum(any(cell.verdict == PARTIAL for cell in sides) for sides in ours),
            )
            for claim, (ours, theirs) in zip(claims, found, strict=True)
        ]
    return counted


def _scenarios(claim: Claim, tables: Sequence[Table]) -> tuple[list[Sides], list[Sides]]:
    """Return the scenarios that have all of a claim's numbers, ours and published."""
    found: tuple[list[Sides], list[Sides]] = [], []
    for table in tables:
        scenarios: dict[tuple[Any, ...], dict[str, Cell]] = {}
        for cell in table.cells.values():
            if not cell.formula.is_cost:
                place = tuple(v for axis, v in cell.at.items() if axis != "method")
                scenarios.setdefault(place, {})[cell.at.get("method", "")] = cell
        for methods in scenarios.values():
            sides = [[methods.get(method) for method in side] for side in (claim.winners, claim.losers)]
            for name, kept in zip(("ours", "published"), found, strict=True):
                cells = [
                    [c for c in side if c is not None and _number(c, name) is not None] for side in sides
                ]
                if [len(side) for side in cells] == [len(claim.winners), len(claim.losers)]:
                    best = min if cells[0][0].formula.lower_is_better else max
                    winner, loser = (best(side, key=lambda c: _number(c, name)) for side in cells)
                    kept.append((winner, loser))
    return found


def _number(cell: Cell, name: str) -> Any:
    value = getattr(cell, name)
    return value if isinstance(value, int | float) else None


def _compare(winner: Cell, loser: Cell) -> Comparison | None:
    ours = ([match.record for match in cell.matches] for cell in (winner, loser))
    return compare.compared(winner.formula, *ours)


def _key(sides: Sides) -> tuple[int, int]:
    return id(sides[0]), id(sides[1])


def _tests(sides: Sequence[Sides]) -> dict[tuple[int, int], bool]:
    """Return of the scenarios that can be tested whether the difference is significant."""
    found = {_key(pair): one.difference.p for pair in sides if (one := _compare(*pair)) is not None}
    return {key: p < LEVEL for key, p in zip(found, statistics.holm(list(found.values())), strict=True)}


def _tests_of_published(
    sides: Sequence[Sides], tables: Sequence[Sequence[Table]]
) -> dict[tuple[int, int], bool]:
    """Return of published scenarios whether they differ by more than the paired error of full test sets.

    That error is estimated from our own records of the same two methods, scaled to all windows or documents.
    """
    ours = [cell for each in tables for table in each for cell in table.cells.values() if cell.matches]
    found = {}
    for pair in sides:
        error = next((e for e in (_full_error(pair, one, ours) for one in ours) if e is not None), None)
        if error is not None:
            winner, loser = (float(cell.published) for cell in pair)
            lower = pair[0].formula.lower_is_better
            size = abs(math.log(winner / loser)) if lower else abs(winner - loser) / pair[0].formula.times
            found[_key(pair)] = math.erfc(size / error / math.sqrt(2))
    return {key: p < LEVEL for key, p in zip(found, statistics.holm(list(found.values())), strict=True)}


def _full_error(pair: Sides, one: Cell, ours: Sequence[Cell]) -> float | None:
    """Return the standard error of a paired difference on full sets, from a cell of ours and its rival."""
    winner, loser = pair
    if one.formula != winner.formula or one.at.get("method") != winner.at.get("method"):
        return None
    for other in ours:
        rest = {axis: value for axis, value in one.at.items() if axis != "method"}
        same = rest == {axis: value for axis, value in other.at.items() if axis != "method"}
        if same and other.formula == one.formula and other.at.get("method") == loser.at.get("method"):
            return _scaled_error(one.formula, one, other)
    return None


def _scaled_error(formula: Formula, one: Cell, other: Cell) -> float | None:
    total = 0.0
    for name in formula.names:
        record, rival = one.matches[0].record, other.matches[0].record
        pairs = compare.paired(record, rival, name)
        if pairs is None or len(pairs[0]) < 2:
            return None
        differences = pairs[0]
        info = record.metrics[name.rpartition(".")[0]]["info"]
        full = info.get("available_documents") or info.get("available_windows") or len(differences)
        total += differences.var(ddof=1) / full
    return math.sqrt(total) / (len(formula.names) if formula.mean else 1) or None


def _outcome(sides: Sequence[Sides], name: str, tests: Mapping[tuple[int, int], bool]) -> Outcome:
    won = [_wins(pair, name) for pair in sides]
    tested = [key in tests for key in map(_key, sides)]
    significant = [tests.get(key, False) for key in map(_key, sides)]
    wins = sum(w and s for w, s in zip(won, significant, strict=True))
    return Outcome(sum(won), len(sides), sum(tested), wins, sum(significant) - wins)


def _wins(pair: Sides, name: str) -> bool:
    winner, loser = (getattr(cell, name) for cell in pair)
    return winner < loser if pair[0].formula.lower_is_better else winner > loser
