"""What the page shows of a cell that is opened."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from teq.record import OUTPUT_ERROR, WEIGHT_ERROR, Record
from teq.report import compare
from teq.report.cells import NOT_RUN, Cell, Comparison, Place, Table
from teq.report.figure import Figure, Panel
from teq.report.layout import BASELINE
from teq.report.render import wording

SHOWN = 5  # linears of a record, those with the largest errors
ERRORS = {OUTPUT_ERROR: "outputs on the calibration inputs", WEIGHT_ERROR: "weights"}


def of_cell(table: Table, cell: Cell, row: Place, column: Place) -> dict[str, Any]:
    """Return what a cell of a table shows."""
    formula = cell.formula
    how = {"mean": "mean of", "sum": "sum of", "ratio": "ratio of"}
    kind = next((words for name, words in how.items() if getattr(formula, name)), "setting")
    names = ", ".join(formula.names) or formula.setting or ""
    one = cell.versus
    kind = "" if len(formula.names) == 1 else f"{kind} "
    lines = {
        "from": f"{kind}{names}{f' x {formula.times:g}' if formula.times != 1 else ''}",
        "ours": "" if cell.verdict == NOT_RUN else _with_interval(cell),
        f"spread over {len(cell.matches)} seeds": wording.shown(cell, cell.spread),
        f"minus {one.versus if one else BASELINE}, paired [95 %]": wording.compared(cell, one),
        "test": "" if one is None else _tested(cell, one),
        "p value": "" if one is None else f"{one.difference.p:.2g}",
        "p value, adjusted for the table": "" if one is None else f"{one.adjusted:.2g}",
        "recovered of what RTN costs": "" if cell.gap is None else f"{cell.gap:.1%}",
        "the same, published": "" if cell.published_gap is None else f"{cell.published_gap:.1%}",
        "published": wording.shown(cell, cell.published),
        "difference": wording.difference(cell),
    }
    place = [*(wording.coordinate(part) for part in row), wording.heading(table, column)]
    axes = {axis: cell.at.get(axis, table.constant.get(axis, "")) for axis in ("model", "method", "grid")}
    return {
        **axes,
        "link": "/".join([table.name, *row, *column]),
        "title": f"{table.layout.title}: {', '.join(place)}",
        "group": table.layout.title,
        "place": ", ".join(place),
        "verdict": cell.verdict,
        "records": [match.record.file.stem for match in cell.matches],
        "differences": wording.difference_text(cell),
        "command": wording.command(cell.jobs),
        "numbers": [[key, text] for key, text in lines.items() if text],
        "interval": None if one is None else _interval(one),
        "value": float(f"{cell.ours:.6g}") if isinstance(cell.ours, float) else None,
        "metrics": formula.names,
        "factor": 0 if formula.ratio else formula.factor,
        "versus": "" if one is None else one.versus,
        "against": () if one is None else one.against,
    }


def _interval(one: Comparison) -> dict[str, Any]:
    """Return a comparison as the page draws it."""
    found = one.difference
    ends = {name: float(f"{getattr(found, name):.6g}") for name in ("mean", "low", "high")}
    return {**ends, "unit": one.unit, "significant": one.significant}


def _with_interval(cell: Cell) -> str:
    """Return our number with its 95 % interval, where it has one."""
    found = compare.interval(cell.formula, [match.record for match in cell.matches])
    if found is None:
        return wording.shown(cell, cell.ours)
    low, high, n = found
    ends = f"{wording.shown(cell, low)}, {wording.shown(cell, high)}".replace("-", "−")
    return f"{wording.shown(cell, cell.ours)}, 95 % [{ends}], n = {n} {_inputs(cell)}"


def _inputs(cell: Cell) -> str:
    """Return what a cell's metrics have a value for each of: windows or documents."""
    arrays = {compare.ARRAYS.get(name.rpartition(".")[2], ("", ""))[0] for name in cell.formula.names}
    return "windows" if all(array.startswith("window_") for array in arrays) else "documents"


def _tested(cell: Cell, one: Comparison) -> str:
    """Return the test behind a comparison: its name, n, and the discordant counts of McNemar's."""
    if one.discordant is None:
        return f"paired t interval, n = {one.n} {_inputs(cell)}"
    gained, lost = one.discordant
    return (
        f"exact McNemar, n = {one.n} documents, only this one right {gained}, only {one.versus} right {lost}"
    )


def largest_errors(record: Record) -> dict[str, Any] | None:
    """Return a title and the linears with the largest relative errors; None where the record has none."""
    for kind, what in ERRORS.items():
        if found := record.data["quantization"].get(kind):
            order = sorted(found, key=found.__getitem__, reverse=True)[:SHOWN]
            middle = f"median {median(found.values()):.2%}"
            title = f"Squared error of {len(found)} linears' {what}, relative: {middle}, the largest"
            return {"title": title, "rows": [[name, f"{found[name]:.2%}"] for name in order]}
    return None


def of_panel(
    figure: Figure, panel: Panel, verdict: str, differs: str, numbers: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Return what a panel of a figure shows."""
    return {
        "title": f"{figure.layout.title}: {panel.model} {panel.grid}",
        "link": f"{figure.name}/{panel.model}/{panel.grid}",
        "model": panel.model,
        "method": "",
        "grid": panel.grid,
        "metrics": [],
        "verdict": verdict,
        "records": [] if panel.match is None else [panel.match.record.file.stem],
        "differences": differs,
        "command": wording.command(panel.jobs),
        "numbers": numbers,
    }
