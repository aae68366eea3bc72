"""The paper's claims, counted again: on its own numbers and on ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from teq.report.cells import PARTIAL, Cell, ClaimCount, Table
from teq.report.layout import Claim


def count_claims(tables: Mapping[str, Table]) -> dict[str, list[ClaimCount]]:
    """Count the claims of every table on published numbers and on ours.

    `tables` holds each table that a claim names.
    """
    return {
        name: [_count(claim, [tables[t] for t in claim.tables or (name,)]) for claim in table.layout.claims]
        for name, table in tables.items()
    }


def _count(claim: Claim, tables: Sequence[Table]) -> ClaimCount:
    """Count the scenarios in which the best winner beats the best loser, of those with all numbers."""
    counts, partial = {True: [0, 0], False: [0, 0]}, False
    for table in tables:
        scenarios: dict[tuple[Any, ...], dict[str, Cell]] = {}
        for cell in table.cells.values():
            scenario = tuple(v for axis, v in cell.at.items() if axis != "method")
            scenarios.setdefault(scenario, {})[cell.at.get("method", "")] = cell
        for methods in scenarios.values():
            sides = [[methods.get(m) for m in side] for side in (claim.winners, claim.losers)]
            cells = [cell for side in sides for cell in side if cell is not None]
            if len(cells) < len(claim.winners) + len(claim.losers):
                continue
            best = min if cells[0].formula.lower_is_better else max
            for published, count in counts.items():
                numbers = [
                    [c.published if published else c.ours for c in side if c is not None] for side in sides
                ]
                if any(not isinstance(n, int | float) for side in numbers for n in side):
                    continue
                ours, theirs = (best(side) for side in numbers)
                count[1] += 1
                count[0] += ours != theirs and best(ours, theirs) == ours
                partial = partial or (not published and any(cell.verdict == PARTIAL for cell in cells))
    return ClaimCount(claim.says, (claim.count, claim.of), tuple(counts[True]), tuple(counts[False]), partial)
