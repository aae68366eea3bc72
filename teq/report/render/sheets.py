"""From a filled table, or a figure's panels, to the sheet that the writers print."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from teq.report.cells import NOT_RUN, OURS, PARTIAL, Cell, Place, Table
from teq.report.figure import Figure, Panel
from teq.report.layout import FULL
from teq.report.render import details, wording
from teq.report.sheet import Box, Sheet

NEAR = "[0.75, 1.25]"  # the range around the start that a record's `near` counts


def of_table(table: Table) -> Sheet:
    """Return the sheet of a table: a row per row, then rows of numbers that only others measured."""
    notes = wording.notes_of(table)
    ran = {column for (_, column), cell in table.cells.items() if cell.verdict != NOT_RUN}
    published = {column for (_, column), cell in table.cells.items() if cell.published is not None} - ran
    rows, rules = [], []
    for index, row in enumerate(table.rows):
        if index and len(row) > 1 and row[0] != table.rows[index - 1][0]:
            rules.append(index)
        boxes = [Box(kind="head", ours=wording.coordinate(part)) for part in row]
        boxes[-1] = replace(boxes[-1], mark=notes.rows.get(row, ""))
        for column in table.columns:
            cell = table.cells.get((row, column))
            empty = Box(kind="empty")
            boxes.append(empty if cell is None else _cell_box(table, cell, row, column, notes))
        rows.append(boxes)
    quoted = _quoted_rows(table)
    if quoted:
        rules.append(len(rows))
    headings = [
        wording.heading(table, column) + (" (published)" if ran and column in published else "")
        for column in table.columns
    ]
    return Sheet(
        name=table.name,
        kind=table.layout.kind,
        title=table.layout.title,
        caption=table.layout.caption,
        header=[*(wording.axis_title(axis) for axis in table.row_axes), *headings],
        rows=rows + quoted,
        rules=rules,
        notes=wording.legend(table, notes),
        claims=wording.claims(table.claims),
        constant=", ".join(f"{axis}: {value}" for axis, value in table.constant.items()),
        data=_table_data(table),
    )


def _cell_box(table: Table, cell: Cell, row: Place, column: Place, notes: wording.Notes) -> Box:
    ran = cell.verdict != NOT_RUN
    ours, spread = wording.shown(cell, cell.ours), wording.shown(cell, cell.spread)
    published, change = wording.shown(cell, cell.published), wording.difference(cell)
    known = cell.ours if ran else cell.published
    return Box(
        kind="cell",
        ours=ours if ran else "",
        best=cell.is_best,
        versus=wording.compared(cell, cell.versus),
        spread=spread,
        seeds=len(cell.matches),
        published=published,
        difference=change if ran else "",
        verdict=cell.verdict,
        mark=notes.cells.get((row, column), ""),
        synthetic=cell.synthetic,
        sort="" if known is None else known,
        detail=details.of_cell(table, cell, row, column),
    )


def _table_data(table: Table) -> list[list[Any]]:
    """Return one line per cell: coordinates, ours with its uncertainty, published, verdict, records."""
    names = ["ours", "stderr", "seed_sd", "published", "difference", "verdict", "versus", "paired", "low"]
    names += ["high", "unit", "p", "p_adjusted", "best", "gap", "published_gap"]
    lines: list[list[Any]] = [
        [*table.row_axes, *table.column_axes, *names, "synthetic", "records", "differs_in"]
    ]
    for row in table.rows:
        for column in table.columns:
            cell = table.cells.get((row, column))
            if cell is None:
                continue
            one = cell.versus
            tested: list[Any] = [""] * 7
            if one is not None:
                found = one.difference
                tested = [one.versus, found.mean, found.low, found.high, one.unit, found.p, one.adjusted]
            numbers = [cell.ours, cell.stderr, cell.spread, cell.published, cell.difference]
            line = [
                *numbers,
                cell.verdict,
                *tested,
                cell.is_best,
                cell.gap,
                cell.published_gap,
                cell.synthetic,
            ]
            records = " ".join(match.record.file.stem for match in cell.matches)
            differs = "; ".join(f"{key}={had}" for key, (_, had) in cell.differences.items())
            lines.append([*row, *column, *map(_plain, line), records, differs])
    for place, column, value in _quoted(table):
        if value is not None:
            lines.append([*place, *column, "", "", "", value, "", "quoted", *[""] * 13])
    return lines


def _plain(value: Any) -> Any:
    """Return a value as a table of data holds it: nothing for None, lower-case words for truth."""
    if isinstance(value, float):
        return _digits(value)
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def _digits(value: float) -> int | float:
    """Return eight digits, as many as are the same on every machine; a whole number has all of its own."""
    value = value if value.is_integer() else float(f"{value:.8g}")
    return int(value) if value.is_integer() else value


def _quoted_rows(table: Table) -> list[list[Box]]:
    """Return rows of numbers that only others measured, in parentheses as every published number."""
    rows: dict[Place, list[Box]] = {}
    for place, column, value in _quoted(table):
        digits = (table.layout.cells or {})[column[-1]].digits
        text = "" if value is None else f"({wording.number(value, digits)})"
        row = rows.setdefault(place, [Box(kind="head", ours=part) for part in place])
        row.append(Box(kind="quoted", ours=text))
    return list(rows.values())


def _quoted(table: Table) -> Iterator[tuple[Place, Place, Any]]:
    """Yield row, column and number (None: not given) of what only others measured; rows name the source."""
    for quoted in table.layout.quoted:
        place = [wording.coordinate(str(quoted.at.get(axis, FULL))) for axis in table.row_axes]
        place[-1] = f"{place[-1]}, {quoted.source}"
        for column in table.columns:
            at = dict(zip(table.column_axes, column, strict=True))
            picked = table.layout.published.pick(quoted.values, at) if table.layout.published else None
            yield tuple(place), column, picked


def of_figure(figure: Figure) -> Sheet:
    """Return the sheet of a figure: a row per panel with what the paper observes, in numbers."""
    header = ["model", "grid", f"within {NEAR}", "outliers most in layer", "movement: first third", "middle"]
    header += ["last third", "middle moves least"]
    marks: dict[str, str] = {}
    rows = [_panel_boxes(figure, panel, header, marks) for panel in figure.panels]
    lines = ["movement: the mean of |log2(s / start)|"] if figure.used() else []
    lines += [f"{mark} {text}" for text, mark in marks.items()]
    notes = wording.plain(lines)
    if missing := [panel for panel in figure.panels if panel.match is None]:
        said = f"not run: {len(missing)} of {len(figure.panels)} panels; "
        notes.append((said, wording.command(missing[0].jobs), " runs the first"))
    return Sheet(
        name=figure.name,
        kind=figure.layout.kind,
        title=figure.layout.title,
        caption=figure.layout.caption,
        header=header,
        rows=rows,
        notes=[*notes, *wording.plain(figure.layout.notes)],
        picture=bool(figure.used()),
        data=_figure_data(figure),
    )


def _panel_boxes(figure: Figure, panel: Panel, header: list[str], marks: dict[str, str]) -> list[Box]:
    numbers, differs, verdict = ["–"] * 6, "", NOT_RUN
    if panel.match is not None:
        worst = ", ".join(f"{layer.index} ({1 - layer.near:.1%})" for layer in panel.outlying)
        moves, least = [f"{part:.4f}" for part in panel.thirds], "no"
        if len(panel.layers) < 3:
            moves, least = ["–"] * 3, "–"
        elif panel.thirds[1] == min(panel.thirds):
            least = "yes"
        numbers = [f"{panel.near:.2%}", worst or "none", *moves, least]
        differs = wording.settings_text(panel.match.differences)
        verdict = PARTIAL if differs else OURS
        if differs:
            numbers[0] += f" {marks.setdefault(differs, wording.superscript(len(marks) + 1))}"
    first = Box(
        kind="cell",
        ours=numbers[0],
        verdict=verdict,
        sort="" if panel.match is None else panel.near,
        detail=details.of_panel(figure, panel, verdict, differs, list(zip(header[2:], numbers, strict=True))),
    )
    heads = [Box(kind="head", ours=part) for part in (panel.model, panel.grid)]
    return [*heads, first, *(Box(kind="text", ours=part) for part in numbers[1:])]


def _figure_data(figure: Figure) -> list[list[str]]:
    """Return one line per layer of a panel."""
    lines = [["model", "grid", "layer", "scales", "share_near_start", "mean_abs_log2_movement", "record"]]
    for panel in figure.panels:
        for layer in panel.layers:
            place = [panel.model, panel.grid, str(layer.index), str(layer.channels)]
            stem = panel.match.record.file.stem if panel.match else ""
            lines.append([*place, f"{layer.near:.8g}", f"{layer.movement:.8g}", stem])
    return lines
