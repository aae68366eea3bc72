"""A filled table as Markdown, LaTeX (booktabs) and CSV: text that is the same on every machine."""

import csv
import io
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teq.report.cells import BASELINE, NOT_RUN, PARTIAL, Checked, Place, Table, Value
from teq.report.layout import ANY, CELL, FULL
from teq.report.table import aligned

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


def markdown(table: Table) -> str:
    """The table with caption, legend, claims and footnotes."""
    notes = footnotes(table)
    header = [
        *(axis_title(axis) for axis in table.row_axes),
        *(heading(table, column) for column in table.columns),
    ]
    rows = [header]
    for row in table.rows:
        values = [table.values.get((row, column)) for column in table.columns]
        rows.append([*map(coordinate, row), *(_cell(value, notes) for value in values)])
    rows += quotations(table)
    parts = [f"## {table.layout.title}", table.layout.caption]
    if table.constant:
        parts.append(", ".join(f"{axis}: {value}" for axis, value in table.constant.items()))
    parts.append(aligned(rows))
    parts += [
        "\n".join(f"- {line}" for line in lines) for lines in (legend(table, notes), claims(table.claims))
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(table: Table) -> str:
    """The table as a `table` environment for booktabs."""
    notes = footnotes(table)
    header = [
        *(axis_title(axis) for axis in table.row_axes),
        *(heading(table, column) for column in table.columns),
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(table.layout.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.row_axes)}{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(map(escaped, header)) + r" \\",
        r"\midrule",
    ]
    block = None
    for row in table.rows:
        if block is not None and len(row) > 1 and row[0] != block:
            lines.append(r"\midrule")
        block = row[0]
        cells = [_tex_cell(table.values.get((row, column)), notes) for column in table.columns]
        lines.append(" & ".join([*(escaped(coordinate(part)) for part in row), *cells]) + r" \\")
    quoted = [" & ".join(map(escaped, row)) + r" \\" for row in quotations(table)]
    lines += [r"\midrule", *quoted] if quoted else []
    lines += [r"\bottomrule", r"\end{tabular}"]
    said = [*legend(table, notes), *claims(table.claims)]
    lines += [rf"\par\footnotesize {escaped(line)}" for line in said]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def comma_separated(table: Table) -> str:
    """One line a cell: coordinates, ours with its uncertainty, published, difference, verdict, records."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    axes = [*table.row_axes, *table.column_axes]
    names = [
        "ours",
        "stderr",
        "seed_sd",
        "published",
        "difference",
        "verdict",
        f"minus_{BASELINE}_low",
        f"minus_{BASELINE}_high",
        "noise",
        "synthetic",
        "records",
    ]
    writer.writerow([*axes, *names, "differs_in"])
    for row in table.rows:
        for column in table.columns:
            value = table.values.get((row, column))
            if value is None:
                continue
            plain = [value.ours, value.stderr, value.spread, value.published, value.difference]
            numbers = [_digits(v) if isinstance(v, float) else "" if v is None else v for v in plain]
            # several records are several seeds, each with an interval of its own
            ends = [" ".join(f"{interval[i]:.6g}" for interval in value.beside) for i in (0, 1)]
            records = " ".join(found.record.file.stem for found in value.found)
            differs = "; ".join(f"{key}={had}" for key, (_, had) in value.differences.items())
            flags = [value.verdict, *ends, *(str(flag).lower() for flag in (value.noise, value.synthetic))]
            writer.writerow([*row, *column, *numbers, *flags, records, differs])
    for place, column, number in _quoted(table):
        if number is not None:
            writer.writerow([*place, *column, "", "", "", number, "", "quoted", "", "", "", "", "", ""])
    return out.getvalue()


def _digits(number: float) -> str:
    """Eight digits, as many as are the same on every machine; a whole number has all of its own."""
    return str(int(number)) if number.is_integer() else f"{number:.8g}"


def quotations(table: Table) -> list[list[str]]:
    """Rows of numbers that only others measured, in parentheses as every published number."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for place, column, number in _quoted(table):
        digits = (table.layout.cells or {})[column[-1]].digits
        rows.setdefault(place, list(place)).append("" if number is None else f"({_number(number, digits)})")
    return list(rows.values())


def _quoted(table: Table) -> Iterator[tuple[Place, Place, Any]]:
    """Row, column and number (None: not given) of what only others measured; the row names the source."""
    for quoted in table.layout.quoted:
        place = [coordinate(str(quoted.at.get(axis, FULL))) for axis in table.row_axes]
        place[-1] = f"{place[-1]}, {quoted.source}"
        for column in table.columns:
            at = dict(zip(table.column_axes, column, strict=True))
            picked = table.layout.published.pick(quoted.values, at) if table.layout.published else None
            yield tuple(place), column, picked


def footnotes(table: Table) -> dict[str, str]:
    """What partial cells differ in, each distinct text with its letter."""
    found: dict[str, str] = {}
    for row in table.rows:
        for column in table.columns:
            value = table.values.get((row, column))
            if value is not None and (text := difference_text(value)) and text not in found:
                found[text] = letter(len(found))
    return found


def letter(index: int) -> str:
    """a, b, ..., z, aa, ab, ..."""
    letters = string.ascii_lowercase
    return (letters[index // 26 - 1] if index >= 26 else "") + letters[index % 26]


def difference_text(value: Value) -> str:
    """The settings in which a partial cell's record differs, in one line; empty for any other cell."""
    if value.verdict != PARTIAL:
        return ""
    missing = len({job.run.key() for job in value.jobs}) - len(value.found)
    parts = [settings_text(value.differences)] if value.differences else []
    if missing > 0:
        parts.append(f"{missing} of {missing + len(value.found)} seeds are missing")
    return "; ".join(parts)


def settings_text(differences: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings that differ, each with the record's value and the wanted one."""
    return "; ".join(
        f"{key} {_plain(had)} instead of {_plain(wanted)}" for key, (wanted, had) in differences.items()
    )


def claims(checked: Sequence[Checked]) -> list[str]:
    """One line a claim: what was claimed, what its own numbers say, what ours say."""
    lines = []
    for claim in checked:
        counted = _of(claim.published)
        agrees = "as claimed" if claim.published == claim.claimed else f"claimed: {_of(claim.claimed)}"
        if claim.published[1] < claim.claimed[1]:
            agrees += ", not all of them shown here"
        partly = ", partial cells among them" if claim.partial else ""
        ours = f"ours: {_of(claim.ours)}{partly}" if claim.ours[1] else "ours: no scenario run"
        lines.append(f"Claim: {claim.says}. Published numbers: {counted} ({agrees}); {ours}.")
    return lines


def command(jobs: Sequence["Job"]) -> str:
    """The command that runs the first of some runs."""
    return f"python run.py {' '.join(jobs[0].overrides)}"


def heading(table: Table, column: Sequence[str]) -> str:
    """A column's heading: its coordinates that vary, then the cell's label where there are several cells."""
    varying = [
        coordinate(part)
        for axis, part in zip(table.column_axes, column, strict=True)
        if axis != CELL and axis not in table.constant
    ]
    cells = table.layout.cells or {}
    if len(cells) > 1 or not varying:
        varying.append(cells[column[-1]].label)
    return " ".join(varying)


def _number(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def shown(value: Value, number: float | str | None) -> str:
    """A number in the digits of its cell; a setting as it is written."""
    if value.formula.setting is not None:
        return f"{number:g}" if isinstance(number, float) else str(number)
    return _number(number, value.formula.digits)


def _cell(value: Value | None, notes: Mapping[str, str]) -> str:
    if value is None:
        return ""
    published = None if value.published is None else shown(value, value.published)
    if value.verdict == NOT_RUN:
        return "–" if published is None else f"({published})"
    ours = shown(value, value.ours)
    text = f"**{ours}**" if value.best else ours
    if value.stderr is not None:
        text += f" ± {shown(value, value.stderr)}"
    if value.spread is not None:
        text += f" (sd {shown(value, value.spread)} over {len(value.found)} seeds)"
    text += " ~" if value.noise else ""
    if published is not None:
        change = difference(value)
        text += f" ({', '.join(part for part in (published, change, value.verdict) if part)})"
    marks = [notes[note]] if (note := difference_text(value)) else []
    marks += ["synthetic"] if value.synthetic else []
    return text + (f" [{', '.join(marks)}]" if marks else "")


def difference(value: Value) -> str:
    """Ours minus published with its sign; empty where the printed digits are the same or there is nothing to
    subtract.
    """
    if value.difference is None or shown(value, value.ours) == shown(value, value.published):
        return ""
    return f"{value.difference:+,.{value.formula.digits}f}"


def legend(table: Table, notes: Mapping[str, str]) -> list[str]:
    """What the signs in the table mean, what its partial cells differ in, what is limited or missing."""
    values = list(table.values.values())
    lines = [LEGEND] if any(value.published is not None and value.found for value in values) else []
    if any(value.stderr is not None for value in values):
        lines.append(UNCERTAINTY)
    if any(value.noise for value in values):
        lines.append(NOISE)
    if any(value.best for value in values):
        lines.append("bold: our best of a grid in its column")
    lines += [f"[{mark}] partial: {text}" for text, mark in notes.items()]
    if any(value.synthetic for value in values):
        lines.append("[synthetic] time and memory on made-up weights of the true sizes")
    lines += limits(table)
    missing = [value for value in values if value.verdict == NOT_RUN]
    if missing:
        known = any(value.published is not None for value in missing)
        lines.append(
            f"not run: {len(missing)} of {len(values)} cells"
            f"{' (a published number stands in parentheses)' if known else ''}; "
            f"`python run.py experiments={table.name}` runs what is missing, `{command(missing[0].jobs)}` "
            "the first of them"
        )
    return lines + list(table.layout.notes)


def limits(table: Table) -> list[str]:
    """One line an evaluation of which the shown records hold only a part."""
    found = {}
    for value in table.values.values():
        for one in value.found:
            for name, measured in one.record.metrics.items():
                if name in value.formula.evaluations() and (text := _limited(measured["info"])):
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


def axis_title(axis: str) -> str:
    """The last part of a dotted name."""
    return axis.rpartition(".")[2]


def coordinate(value: str) -> str:
    """A row's or a column's value as it is shown."""
    return "–" if value in (ANY, FULL) else value


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def escaped(text: str) -> str:
    """Plain text for LaTeX."""
    special = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"$\sim$", "±": r"$\pm$"}
    special |= {"−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"}
    special |= {"{": r"\{", "}": r"\}", "^": r"\^{}"}
    return "".join(special.get(letter, letter) for letter in text)


def _tex_cell(value: Value | None, notes: Mapping[str, str]) -> str:
    text = _cell(value, notes)
    if value is None or not value.best:
        return escaped(text)
    _, ours, rest = text.split("**")
    return rf"\textbf{{{escaped(ours)}}}{escaped(rest)}"
