"""The sentences of a report: headings, numbers, footnotes, legends, limits, claims, commands."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teq.data.sources import SOURCES
from teq.report import compare
from teq.report.cells import NOT_RUN, PARTIAL, Cell, ClaimCount, Comparison, Place, Table
from teq.report.layout import ANY, BASELINE, CELL, FULL

if TYPE_CHECKING:
    from teq.config import Job
    from teq.record import Record

LEGEND = "a cell with both: ours (published, ours − published, verdict)"
DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
WORDS = {  # of settings in footnotes
    "quantizer.samples": "GPTQ windows",
    "quantizer.length": "tokens of a GPTQ window",
    "transform.samples": "windows for the scales",
    "transform.length": "tokens of a window for the scales",
    "transform.steps": "training steps",
    "transform.lr": "learning rate",
    "transform.parameter": "trained parameter",
    "transform.init": "start of the scales",
    "quantizer.calib.file": "text for GPTQ",
    "transform.calib.file": "text for the scales",
    "quantizer.calib.rows": "documents for GPTQ",
    "transform.calib.rows": "documents for the scales",
}


@dataclass(frozen=True)
class Notes:
    """What partial cells differ in: what all have in common, numbered notes, and the marks that lead there.

    A mark that all cells of a row share stands at the row instead.
    """

    common: list[str]
    texts: list[str]
    cells: dict[tuple[Place, Place], str]
    rows: dict[Place, str]


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


def notes_of(table: Table) -> Notes:
    """Return the footnotes of a table: settings that differ in the same cells make one note."""
    places = [(row, column) for row in table.rows for column in table.columns]
    ran = [place for place in places if place in table.cells and table.cells[place].matches]
    where: dict[str, list[tuple[Place, Place]]] = {}
    for place in ran:
        for atom in atoms(table.cells[place]):
            where.setdefault(atom, []).append(place)
    groups: dict[tuple[tuple[Place, Place], ...], list[str]] = {}
    for atom, found in where.items():
        groups.setdefault(tuple(found), []).append(atom)
    common = groups.pop(tuple(ran), [])
    marks: dict[tuple[Place, Place], list[int]] = {place: [] for place in ran}
    for number, found in enumerate(groups, 1):
        for place in found:
            marks[place].append(number)
    rows = {}
    for row in table.rows:
        inside = [set(marks[place]) for place in ran if place[0] == row]
        shared = set.intersection(*inside) if inside else set()
        rows[row] = _superscripts(shared)
        for place in ran:
            if place[0] == row:
                marks[place] = [number for number in marks[place] if number not in shared]
    texts = [f"{superscript(number)} {'; '.join(found)}" for number, found in enumerate(groups.values(), 1)]
    return Notes(common, texts, {place: _superscripts(found) for place, found in marks.items()}, rows)


def superscript(number: int) -> str:
    """Return a number as a footnote mark."""
    return str(number).translate(DIGITS)


def _superscripts(numbers: Iterable[int]) -> str:
    return " ".join(superscript(number) for number in sorted(numbers))


def atoms(cell: Cell) -> list[str]:
    """Return what a partial cell's records differ in, without limits, which `limits` says once."""
    if cell.verdict != PARTIAL:
        return []
    found = [
        settings_text({key: pair}) for key, pair in cell.differences.items() if not key.endswith(".limit")
    ]
    missing = len({job.run.key() for job in cell.jobs}) - len(cell.matches)
    if missing > 0:
        found.append(f"{missing} of {missing + len(cell.matches)} seeds are missing")
    return found


def difference_text(cell: Cell) -> str:
    """Return the settings in which a partial cell's record differs, in one line; else nothing."""
    limits = {key: pair for key, pair in cell.differences.items() if key.endswith(".limit")}
    parts = [settings_text(limits)] if limits and cell.verdict == PARTIAL else []
    return "; ".join([*atoms(cell), *parts])


def settings_text(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Return settings that differ, each with the record's value and the wanted one."""
    return "; ".join(
        f"{WORDS.get(key, key)} {_plain(had)} instead of {_plain(wanted)}"
        for key, (wanted, had) in differences.items()
    )


def claims(counts: Sequence[ClaimCount]) -> list[str]:
    """Return one line per claim: what was claimed, what its own numbers say, what ours say."""
    lines = []
    for claim in counts:
        published, ours = claim.published, claim.ours
        agrees = "as claimed" if (published.won, published.of) == claim.claimed else _claimed(claim)
        said = f"{published.won} of {published.of} ({agrees})"
        if published.tested:
            said += f", of which {published.wins} won and {published.losses} lost beyond chance on full sets"
        mine = "no scenario run"
        if ours.of:
            ties = ours.tested - ours.wins - ours.losses
            partly = f"; {claim.partial} partial" if claim.partial else ""
            mine = f"{ours.won} of {ours.of} ({ours.wins} significantly, {ours.losses} significantly lost, "
            mine += f"{ties} ties{partly})"
        lines.append(f"Claim: {claim.says}. Published numbers: {said}; ours: {mine}.")
    return lines


def _claimed(claim: ClaimCount) -> str:
    shown = ", not all of them shown here" if claim.published.of < claim.claimed[1] else ""
    return f"claimed: {claim.claimed[0]} of {claim.claimed[1]}{shown}"


def compared(cell: Cell, one: Comparison | None) -> str:
    """Return a paired difference with its 95 % interval, and ~ where it is not significant."""
    if one is None:
        return ""
    digits, unit = (1, " %") if one.unit == "%" else (cell.formula.digits, "")
    mean, low, high = (
        f"{v:+.{digits}f}" for v in (one.difference.mean, one.difference.low, one.difference.high)
    )
    versus = "" if one.versus == BASELINE else f" vs {one.versus}"
    return f"{mean}{unit} [{low}, {high}]".replace("-", "−") + versus + ("" if one.significant else " ~")


def command(jobs: Sequence["Job"]) -> str:
    """Return the command that runs the first of some runs."""
    return f"python run.py {' '.join(jobs[0].overrides)}"


def legend(table: Table, notes: Notes) -> list[tuple[str, ...]]:
    """Return what was measured, what differs, what the signs mean, and what is missing or to be known."""
    cells = list(table.cells.values())
    lines = [f"ours: {'; '.join(notes.common)}"] if notes.common else []
    lines += [*notes.texts, *limits(table)]
    if any(cell.published is not None and cell.matches for cell in cells):
        lines.append(LEGEND)
    accepted, of = compare.accepted_by_mistake(table.cells)
    if of:
        lines.append(
            "match: within printed digits, allowance and 95 % of the noise of seeds; without that noise it "
            f"accepts {accepted} of {of} published numbers of other methods"
        )
    if any(cell.versus is not None for cell in cells):
        lines.append(
            f"signed: paired difference to {BASELINE} [95 %], of perplexity in per cent; ~ not "
            "significant (t or McNemar, Benjamini-Hochberg within the table); without an sd it is of one seed"
        )
    if any(cell.is_best for cell in cells):
        lines.append("bold: not significantly worse than the best of a grid in its column")
    if any(cell.synthetic for cell in cells):
        lines.append("[synthetic] time and memory on made-up weights of the true sizes")
    lines += reproduction(table)
    if missing := [cell for cell in cells if cell.verdict == NOT_RUN]:
        lines.append(f"not run: {len(missing)} of {len(cells)} cells; ")
        runs = [
            f"python run.py experiments={table.name}",
            " runs them, ",
            command(missing[0].jobs),
            " the first",
        ]
        return [*plain(lines[:-1]), (lines[-1], *runs), *plain(table.layout.notes)]
    return plain([*lines, *table.layout.notes])


def plain(lines: Iterable[str]) -> list[tuple[str, ...]]:
    """Return lines as notes without code."""
    return [(line,) for line in lines]


def reproduction(table: Table) -> list[str]:
    """Return what judges a reproduction: gaps recovered, ours and published, and the order of methods."""
    lines = []
    columns: dict[tuple[str, Place], list[Cell]] = {}
    for (_, column), cell in table.cells.items():
        if cell.matches and cell.published is not None:
            columns.setdefault((cell.at.get("grid", ""), column), []).append(cell)
    for (grid, column), cells in columns.items():
        gaps = [
            f"{cell.at.get('method')} {cell.gap:.0%} ({cell.published_gap:.0%})"
            for cell in cells
            if cell.gap is not None and cell.published_gap is not None
        ]
        tau = compare.order_agreement(cells)
        order = [] if tau is None else [f"order of methods: Kendall's tau {tau:.2f}"]
        if gaps or order:
            recovered = [f"recovered of what RTN costs, ours (published): {', '.join(gaps)}"] if gaps else []
            lines.append(f"{heading(table, column)}, {grid}: {'; '.join([*recovered, *order])}")
    return lines


def limits(table: Table) -> list[str]:
    """Return what the shown records were measured on, where it is a part, and what is known of the files."""
    found: dict[str, None] = {}
    caveats: dict[str, str] = {}
    for cell in table.cells.values():
        for match in cell.matches:
            for name in sorted(cell.formula.evaluations()):
                info = match.record.metrics[name]["info"]
                if text := _limited(info, spaced=name in _spaced(match.record)):
                    found[f"{name}: {text}"] = None
                source = SOURCES.get(info.get("name", ""))
                if source is not None and info.get("sha256") in source.known:
                    caveats[name] = source.known[info["sha256"]]
    lines = [f"measured on: {'; '.join(found)}"] if found else []
    return [*lines, *(f"{name}: {text}" for name, text in caveats.items())]


def _spaced(record: "Record") -> set[str]:
    """Return the names of a record's texts whose windows are spaced evenly, where they are not all."""
    return {e["corpus"] for e in record.data["run"]["evals"] if e.get("windows") == "even"}


def _limited(info: Mapping[str, Any], spaced: bool) -> str:
    parts = []
    windows = ("", " evenly spaced") if spaced else ("the first ", "")
    for what, (before, after) in (("windows", windows), ("documents", ("a seeded draw of ", ""))):
        if what in info and info[what] < info.get(f"available_{what}", 0):
            size = f" of {info['context']} tokens" if "context" in info else ""
            parts.append(f"{before}{info[what]}{after} of {info[f'available_{what}']} {what}{size}")
    if info.get("partial"):
        parts.append(f"from a mirror that holds {info['rows']} of {info['expected_rows']} rows")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
