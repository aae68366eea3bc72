"""The paper's claims, counted again: on its own numbers and on ours."""

from collections.abc import Mapping, Sequence
from typing import Any

from teq.report.cells import PARTIAL, Checked, Table, Value
from teq.report.layout import Claim


def check_claims(tables: Mapping[str, Table]) -> dict[str, list[Checked]]:
    """The claims of every table, counted on published numbers and on ours.

    `tables` holds each table that a claim names.
    """
    return {
        name: [_checked(claim, [tables[t] for t in claim.tables or (name,)]) for claim in table.layout.claims]
        for name, table in tables.items()
    }


def _checked(claim: Claim, tables: Sequence[Table]) -> Checked:
    """In how many scenarios the best winner beats the best loser, of how many that have all the numbers."""
    counts, partial = {True: [0, 0], False: [0, 0]}, False
    for table in tables:
        scenarios: dict[tuple[Any, ...], dict[str, Value]] = {}
        for value in table.values.values():
            place = tuple(v for axis, v in value.at.items() if axis != "method")
            scenarios.setdefault(place, {})[value.at.get("method", "")] = value
        for methods in scenarios.values():
            sides = [[methods.get(m) for m in side] for side in (claim.winners, claim.losers)]
            values = [value for side in sides for value in side if value is not None]
            if len(values) < len(claim.winners) + len(claim.losers):
                continue
            best = min if values[0].formula.best == "lowest" else max
            for published, count in counts.items():
                numbers = [
                    [v.published if published else v.ours for v in side if v is not None] for side in sides
                ]
                if any(not isinstance(n, int | float) for side in numbers for n in side):
                    continue
                ours, theirs = (best(side) for side in numbers)
                count[1] += 1
                count[0] += ours != theirs and best(ours, theirs) == ours
                partial = partial or (not published and any(value.verdict == PARTIAL for value in values))
    return Checked(claim.says, (claim.count, claim.of), tuple(counts[True]), tuple(counts[False]), partial)
