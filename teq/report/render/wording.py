"""The sentences of a report: headings, numbers, footnotes, legends, limits, claims, commands."""

import string
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teq.report.cells import BASELINE, NOT_RUN, PARTIAL, Cell, ClaimCount, Table
from teq.report.layout import ANY, CELL, FULL

if TYPE_CHECKING:
    from teq.config import Job

LEGEND = (
    "A cell: ours ± standard error (published, ours − published, verdict). match: within the noise band, 95 "
    "% of the standard error and of the spread over seeds, or equal in the printed digits."
)
UNCERTAINTY = "±: standard error over windows or documents, of the first seed where there are several"
NOISE = (
    f"~ not distinguishable from {BASELINE} on the same documents or windows (paired bootstrap, 95 %; of "
    "several seeds in at least one)"
)


def axis_title(axis: str) -> str:
    """Return the last part of a dotted name."""
    return axis.rpartition(".")[2]


def coordinate(value: str) -> str:
    """Return a row's or a column's value as it is shown."""
    return "–" if value in (ANY, FULL) else value


def heading(table: Table, column: Sequence[str]) -> str:
    """Return a column's heading: its coordinates that vary, and the label where there are several cells."""
    varying = [
        coordinate(part)
        for axis, part in zip(table.column_axes, column, strict=True)
        if axis != CELL and axis not in table.constant
    ]
    cells = table.layout.cells or {}
    if len(cells) > 1 or not varying:
        varying.append(cells[column[-1]].label)
    return " ".join(varying)


def number(value: Any, digits: int) -> str:
    """Return a number with so many digits, a text as it is, a dash for nothing."""
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def shown(cell: Cell, value: float | str | None) -> str:
    """Return a number in the digits of its cell; a setting as it is written; nothing for None."""
    if value is None:
        return ""
    if cell.formula.setting is not None:
        return f"{value:g}" if isinstance(value, float) else str(value)
    return number(value, cell.formula.digits)


def difference(cell: Cell) -> str:
    """Return ours minus published with its sign; empty where the printed digits are the same."""
    if cell.difference is None or shown(cell, cell.ours) == shown(cell, cell.published):
        return ""
    return f"{cell.difference:+,.{cell.formula.digits}f}"


def letter(index: int) -> str:
    """Return a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return (letters[index // 26 - 1] if index >= 26 else "") + letters[index % 26]


def footnotes(table: Table) -> dict[str, str]:
    """Return what partial cells differ in, each distinct text with its letter."""
    found: dict[str, str] = {}
    for row in table.rows:
        for column in table.columns:
            cell = table.cells.get((row, column))
            if cell is not None and (text := difference_text(cell)) and text not in found:
                found[text] = letter(len(found))
    return found


def difference_text(cell: Cell) -> str:
    """Return the settings in which a partial cell's record differs, in one line; else nothing."""
    if cell.verdict != PARTIAL:
        return ""
    missing = len({job.run.key() for job in cell.jobs}) - len(cell.matches)
    parts = [settings_text(cell.differences)] if cell.differences else []
    if missing > 0:
        parts.append(f"{missing} of {missing + len(cell.matches)} seeds are missing")
    return "; ".join(parts)


def settings_text(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return settings that differ, each with the record's value and the wanted one."""
    return "; ".join(
        f"{key} {_plain(had)} instead of {_plain(wanted)}" for key, (wanted, had) in differences.items()
    )


def claims(counts: Sequence[ClaimCount]) -> list[str]:
    """Return one line per claim: what was claimed, what its own numbers say, what ours say."""
    lines = []
    for claim in counts:
        counted = _of(claim.published)
        agrees = "as claimed" if claim.published == claim.claimed else f"claimed: {_of(claim.claimed)}"
        if claim.published[1] < claim.claimed[1]:
            agrees += ", not all of them shown here"
        partly = ", partial cells among them" if claim.partial else ""
        ours = f"ours: {_of(claim.ours)}{partly}" if claim.ours[1] else "ours: no scenario run"
        lines.append(f"Claim: {claim.says}. Published numbers: {counted} ({agrees}); {ours}.")
    return lines


def command(jobs: Sequence["Job"]) -> str:
    """Return the command that runs the first of some runs."""
    return f"python run.py {' '.join(jobs[0].overrides)}"


def legend(table: Table, notes: Mapping[str, str]) -> list[str]:
    """Return what the signs mean, what partial cells differ in, what is limited, missing or to be known."""
    cells = list(table.cells.values())
    lines = [LEGEND] if any(cell.published is not None and cell.matches for cell in cells) else []
    if any(cell.stderr is not None for cell in cells):
        lines.append(UNCERTAINTY)
    if any(cell.not_significant for cell in cells):
        lines.append(NOISE)
    if any(cell.is_best for cell in cells):
        lines.append("bold: our best of a grid in its column")
    lines += [f"[{mark}] partial: {text}" for text, mark in notes.items()]
    if any(cell.synthetic for cell in cells):
        lines.append("[synthetic] time and memory on made-up weights of the true sizes")
    lines += limits(table)
    missing = [cell for cell in cells if cell.verdict == NOT_RUN]
    if missing:
        known = any(cell.published is not None for cell in missing)
        lines.append(
            f"not run: {len(missing)} of {len(cells)} cells"
            f"{' (a published number stands in parentheses)' if known else ''}; "
            f"`python run.py experiments={table.name}` runs what is missing, `{command(missing[0].jobs)}` "
            "the first of them"
        )
    return lines + list(table.layout.notes)


def limits(table: Table) -> list[str]:
    """Return one line per evaluation of which the shown records hold only a part."""
    found = {}
    for cell in table.cells.values():
        for match in cell.matches:
            for name, measured in match.record.metrics.items():
                if name in cell.formula.evaluations() and (text := _limited(measured["info"])):
                    found[f"{name}: {text}"] = None
    return [f"limited: {text}" for text in found]


def _limited(info: Mapping[str, Any]) -> str:
    parts = []
    for what, how in (("windows", "the first"), ("documents", "a seeded draw of")):
        if what in info and info[what] < info.get(f"available_{what}", 0):
            size = f" of {info['context']} tokens" if "context" in info else ""
            parts.append(f"{how} {info[what]} of {info[f'available_{what}']} {what}{size}")
    if info.get("partial"):
        parts.append(f"from a mirror that holds {info['rows']} of {info['expected_rows']} rows")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"
