"""A filled table as Markdown, LaTeX (booktabs) and CSV: text that is the same on every machine."""

import csv
import io
import string
from collections.abc import Mapping, Sequence
from typing import Any

from teq.layout import ANY, CELL, FULL
from teq.tables import BASELINE, NOT_RUN, PARTIAL, Checked, Table, Value, aligned

LEGEND = (
    "A cell: ours ± standard error (published, ours − published, verdict). match: within the noise band, 95 % of the "
    "standard error and of the spread over seeds, or equal in the printed digits."
)
NOISE = f"~ not distinguishable from {BASELINE} on the same documents or windows (paired bootstrap, 95 %)"


def markdown(table: Table) -> str:
    """The table with caption, legend, claims and footnotes."""
    notes = footnotes(table)
    header = [
        *(_axis(axis) for axis in table.row_axes),
        *(heading(table, column) for column in table.columns),
    ]
    rows = [header]
    for row in table.rows:
        values = [table.values.get((row, column)) for column in table.columns]
        rows.append([*map(_coordinate, row), *(_cell(value, notes) for value in values)])
    for quoted in table.quoted:
        place = [_coordinate(str(quoted.at.get(axis, ""))) for axis in table.row_axes]
        place[-1] = f"{place[-1]} ({quoted.source})"
        rows.append([*place, *(f"({number(v, table)})" for v in quoted.values)])
    parts = [f"## {table.layout.title}", table.layout.caption]
    if table.constant:
        parts.append(", ".join(f"{axis}: {value}" for axis, value in table.constant.items()))
    parts.append(aligned(rows))
    parts += [
        "\n".join(f"- {line}" for line in lines) for lines in (_legend(table, notes), claims(table.claims))
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(table: Table) -> str:
    """The table as a `table` environment for booktabs."""
    notes = footnotes(table)
    header = [
        *(_axis(axis) for axis in table.row_axes),
        *(heading(table, column) for column in table.columns),
    ]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(table.layout.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{'l' * len(table.row_axes)}{'r' * len(table.columns)}}}",
        r"\toprule",
        " & ".join(map(_tex, header)) + r" \\",
        r"\midrule",
    ]
    block = None
    for row in table.rows:
        if block is not None and len(row) > 1 and row[0] != block:
            lines.append(r"\midrule")
        block = row[0]
        cells = [_tex_cell(table.values.get((row, column)), notes) for column in table.columns]
        lines.append(" & ".join([*(_tex(_coordinate(part)) for part in row), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    lines += [rf"\par\footnotesize {_tex(line)}" for line in _legend(table, notes)]
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
            numbers = ["" if v is None else f"{v:.8g}" if isinstance(v, float) else v for v in plain]
            records = " ".join(found.record.file.stem for found in value.found)
            differs = "; ".join(f"{key}={had}" for key, (_, had) in value.differences.items())
            flags = [value.verdict, *(str(flag).lower() for flag in (value.noise, value.synthetic))]
            writer.writerow([*row, *column, *numbers, *flags, records, differs])
    return out.getvalue()


def footnotes(table: Table) -> dict[str, str]:
    """What partial cells differ in, each distinct text with its letter."""
    found: dict[str, str] = {}
    for row in table.rows:
        for column in table.columns:
            value = table.values.get((row, column))
            if value is not None and (text := difference_text(value)) and text not in found:
                index = len(found)
                letters = string.ascii_lowercase
                found[text] = (letters[index // 26 - 1] if index >= 26 else "") + letters[index % 26]
    return found


def difference_text(value: Value) -> str:
    """The settings in which a partial cell's record differs, in one line; empty for any other cell."""
    if value.verdict != PARTIAL:
        return ""
    missing = len({job.run.key() for job in value.jobs}) - len(value.found)
    parts = [
        f"{key} {_plain(had)} instead of {_plain(wanted)}" for key, (wanted, had) in value.differences.items()
    ]
    if missing > 0:
        parts.append(f"{missing} of {missing + len(value.found)} seeds are missing")
    return "; ".join(parts)


def claims(checked: Sequence[Checked]) -> list[str]:
    """One line a claim: what was claimed, what its own numbers say, what ours say."""
    lines = []
    for claim in checked:
        counted = f"{claim.published[0]} of {claim.published[1]}"
        agrees = "as claimed" if claim.published == claim.claimed else f"claimed: {_of(claim.claimed)}"
        ours = f"ours: {_of(claim.ours)}" if claim.ours[1] else "ours: no scenario run"
        lines.append(f"Claim: {claim.says}. Published numbers: {counted} ({agrees}); {ours}.")
    return lines


def command(value: Value) -> str:
    """The command that runs a cell's runs."""
    return f"python run.py {' '.join(value.jobs[0].overrides)}"


def heading(table: Table, column: Sequence[str]) -> str:
    """A column's heading: its coordinates that vary, then the cell's label where there are several cells."""
    varying = [
        _coordinate(part)
        for axis, part in zip(table.column_axes, column, strict=True)
        if axis != CELL and axis not in table.constant
    ]
    cells = table.layout.cells or {}
    if len(cells) > 1 or not varying:
        varying.append(cells[column[-1]].label)
    return " ".join(varying)


def number(value: Any, table: Table, cell: str | None = None) -> str:
    """A number in a cell's digits; anything else as it is."""
    formula = (table.layout.cells or {})[cell or next(iter(table.layout.cells or {}))]
    return _number(value, formula.digits)


def _number(value: Any, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:,.{digits}f}" if isinstance(value, int | float) else str(value)


def _cell(value: Value | None, notes: Mapping[str, str]) -> str:
    if value is None:
        return ""
    digits = value.formula.digits
    if value.formula.setting is not None:
        digits = 4
    published = None if value.published is None else _number(value.published, digits)
    if value.verdict == NOT_RUN:
        return "–" if published is None else f"({published})"
    ours = _number(value.ours, digits)
    text = f"**{ours}**" if value.best else ours
    if value.stderr is not None:
        text += f" ± {_number(value.stderr, digits)}"
    if value.spread is not None:
        text += f" (sd {_number(value.spread, digits)} over {len(value.found)} seeds)"
    text += " ~" if value.noise else ""
    if published is not None:
        change = f"{value.difference:+,.{digits}f}, " if value.difference is not None else ""
        text += f" ({published}, {change}{value.verdict})"
    marks = [notes[note]] if (note := difference_text(value)) else []
    marks += ["synthetic"] if value.synthetic else []
    return text + (f" [{', '.join(marks)}]" if marks else "")


def _legend(table: Table, notes: Mapping[str, str]) -> list[str]:
    values = list(table.values.values())
    lines = [LEGEND] if any(v.published is not None and v.found for v in values) else []
    if any(value.noise for value in values):
        lines.append(NOISE)
    if any(value.best for value in values):
        lines.append("bold: our best of a grid in its column")
    lines += [f"[{letter}] partial: {text}" for text, letter in notes.items()]
    if any(value.synthetic for value in values):
        lines.append("[synthetic] time and memory on made-up weights of the true sizes")
    lines += limits(table)
    missing = [value for value in values if value.verdict == NOT_RUN]
    if missing:
        lines.append(
            f"not run: {len(missing)} of {len(values)} cells (a published number stands in parentheses); "
            f"`python run.py experiments={table.name}` runs what is missing, `{command(missing[0])}` the first of them"
        )
    return lines + list(table.layout.notes)


def limits(table: Table) -> list[str]:
    """One line an evaluation of which the shown records hold only a part."""
    found = {}
    for value in table.values.values():
        for one in value.found:
            evals = zip(one.record.metrics.items(), one.record.data["run"]["evals"], strict=True)
            for (name, measured), settings in evals:
                if name in value.formula.evaluations() and (text := _limited(settings, measured["info"])):
                    found[f"{name}: {text}"] = None
    return [f"limited: {text}" for text in found]


def _limited(settings: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    parts = []
    if settings.get("limit") is not None:
        size = f"{info['windows']} windows of {info['context']} tokens" if "windows" in info else ""
        parts.append(f"the first {size}" if size else f"{settings['limit']} documents, a seeded sample")
    if info.get("partial"):
        parts.append(f"from a part of the set ({info.get('rows', 'unknown')} rows)")
    return ", ".join(parts)


def _axis(axis: str) -> str:
    return axis.rpartition(".")[2]


def _coordinate(value: str) -> str:
    return "–" if value in (ANY, FULL) else value


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _of(pair: tuple[int, int]) -> str:
    return f"{pair[0]} of {pair[1]}"


def _tex(text: str) -> str:
    special = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"$\sim$", "±": r"$\pm$"}
    special |= {"−": "$-$", "–": "--", "{": r"\{", "}": r"\}", "<": "$<$", ">": "$>$", "^": r"\^{}"}
    return "".join(special.get(letter, letter) for letter in text)


def _tex_cell(value: Value | None, notes: Mapping[str, str]) -> str:
    text = _cell(value, notes)
    bold = value is not None and value.best
    return rf"\textbf{{{_tex(text.split('**')[1])}}}{_tex(text.split('**')[2])}" if bold else _tex(text)
