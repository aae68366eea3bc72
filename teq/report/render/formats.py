"""A sheet as Markdown, LaTeX (booktabs) and CSV: text that is the same on every machine."""

import csv
import io
import string
from collections.abc import Sequence

from teq.console import aligned
from teq.report.sheet import Box, Sheet

SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"$\sim$", "±": r"$\pm$"}
SPECIAL |= {"−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$", "{": r"\{", "}": r"\}", "^": r"\^{}"}
SPECIAL |= {mark: rf"$^{{{digit}}}$" for digit, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}

LINE = 345  # points of a line of LaTeX's article class
LETTER = 5.1  # points of a letter there, on average
POINTS = dict.fromkeys(string.ascii_uppercase, 7.2) | dict.fromkeys(" .,:;()[]'|/il", 3.0)
POINTS |= dict.fromkeys("−+%<>=~±mw", 7.8)
SMALL, SCRIPT = 0.9, 0.72  # of that, in these sizes
LEAST = 0.6  # to which a wide table is shrunk before it is split, for a page to hold it
AT_MOST = r"\ifdim\width>\linewidth\linewidth\else\width\fi"


def markdown(sheet: Sheet) -> str:
    """Return the sheet with caption, picture, table, notes and claims."""
    parts = [f"## {sheet.title}", sheet.caption, sheet.constant]
    if sheet.picture:
        parts.append(f"![{sheet.title}](../figures/{sheet.name}.svg)")
    rows = [[f"**{box.ours}**{_rest(box)}" if box.best else _text(box) for box in row] for row in sheet.rows]
    parts.append(aligned([sheet.header, *rows]))
    notes = ["`".join(note) for note in sheet.notes]
    parts += ["\n".join(f"- {line}" for line in lines) for lines in (notes, sheet.claims)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(sheet: Sheet) -> str:
    """Return a `table` or `figure` environment; a figure includes its PNG and has its caption below.

    A table wider than a line is set smaller, its cells in several lines, and in parts of some columns each.
    """
    lines = [rf"\begin{{{sheet.kind}}}", r"\centering"]
    named = [rf"\caption{{{escaped(sheet.caption)}}}", rf"\label{{{sheet.kind[:3]}:{sheet.name}}}"]
    if sheet.kind == "table":
        lines += named
    elif sheet.picture:
        lines.append(rf"\includegraphics[width=\linewidth]{{../figures/{sheet.name}.png}}\\[1ex]")
    texts = [[[title] for title in sheet.header], *([[_text(box)] for box in row] for row in sheet.rows)]
    if sum(_widths(texts, 1.0, 12)) <= LINE:
        rows = [
            [escaped(title) for title in sheet.header],
            *([_tex(box) for box in row] for row in sheet.rows),
        ]
        lines += _fitted("", _tabular(sheet, rows, range(len(sheet.header))))
    else:
        lines += _wide(sheet)
    if sheet.kind == "figure":
        lines += named
    for note in (*sheet.notes, *((claim,) for claim in sheet.claims)):
        parts = (rf"\texttt{{{escaped(part)}}}" if i % 2 else escaped(part) for i, part in enumerate(note))
        lines.append(rf"\par\footnotesize {''.join(parts)}")
    return "\n".join([*lines, rf"\end{{{sheet.kind}}}"]) + "\n"


def _tabular(sheet: Sheet, rows: Sequence[Sequence[str]], columns: Sequence[int]) -> list[str]:
    """Return the lines of a tabular of some `columns` of LaTeX cells, the header's row first."""
    kinds = "".join("l" if column < sheet.heads else "r" for column in columns)
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\toprule"]
    for index, row in enumerate(rows):
        lines += [r"\midrule"] if index == 1 or index - 1 in sheet.rules else []
        lines.append(" & ".join(row[column] for column in columns) + r" \\")
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _wide(sheet: Sheet) -> list[str]:
    """Return the lines of a wide table: as few parts as fit, each with the columns of coordinates."""
    texts = [[title.split() for title in sheet.header], *([_lines(box) for box in row] for row in sheet.rows)]
    widths = _widths(texts, SMALL, 6)
    room, data = LINE / LEAST - sum(widths[: sheet.heads]), range(sheet.heads, len(sheet.header))
    splits = ([data[i : i + size] for i in range(0, len(data), size)] for size in range(len(data), 0, -1))
    fitting = (parts for parts in splits if all(sum(widths[c] for c in part) <= room for part in parts))
    rows = [[_stacked(title, "b") for title in texts[0]]]
    for row, boxes in zip(texts[1:], sheet.rows, strict=True):
        rows.append([_stacked(lines, "t", box.best) for lines, box in zip(row, boxes, strict=True)])
    lines: list[str] = []
    for part in next(fitting, [data[i : i + 1] for i in range(len(data))]):
        lines += [r"\par\medskip"] if lines else []
        tabular = _tabular(sheet, rows, [*range(sheet.heads), *part])
        lines += _fitted(r"\small\setlength{\tabcolsep}{3pt}", tabular)
    return lines


def _fitted(setting: str, tabular: Sequence[str]) -> list[str]:
    """Return the lines of a tabular with a setting, shrunk where it is wider than a line."""
    return [rf"\resizebox{{{AT_MOST}}}{{!}}{{{setting}%", *tabular[:-1], tabular[-1] + "}"]


def _widths(cells: Sequence[Sequence[Sequence[str]]], size: float, gap: float) -> list[float]:
    """Return about the points that the columns of `cells[row][column]` take, lines after the first small."""

    def width(lines: Sequence[str]) -> float:
        points = [sum(POINTS.get(letter, LETTER) for letter in line) for line in lines]
        return max([size * points[0], *(SCRIPT * more for more in points[1:])])

    return [max(map(width, column)) + gap for column in zip(*cells, strict=True)]


def _lines(box: Box) -> list[str]:
    """Return the lines of a cell in a wide table: its number, then what follows it."""
    if box.kind != "cell" or not box.ours:
        return [_text(box)]
    parts = [*_parts(box), *["[synthetic]"] * box.synthetic]
    more = [line for part in parts for line in part.replace(" [", "\n[").split("\n")]
    return [f"{box.ours} {box.mark}".rstrip(), *more]


def _stacked(lines: Sequence[str], place: str, bold: bool = False) -> str:
    """Return the LaTeX of a cell's lines; the first (`place` t) or last (b) is level with its row."""
    first, *more = map(escaped, lines)
    first = rf"\textbf{{{first}}}" if bold else first
    if not more:
        return first
    rows = r"\\".join([first, *(rf"\scriptsize {line}" for line in more)])
    return rf"\begin{{tabular}}[{place}]{{@{{}}r@{{}}}}{rows}\end{{tabular}}"


def comma_separated(sheet: Sheet) -> str:
    """Return the sheet's data."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(sheet.data)
    return out.getvalue()


def escaped(text: str) -> str:
    """Return plain text for LaTeX."""
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def _text(box: Box) -> str:
    if box.kind == "cell" and not box.ours:
        return box.published or "–"
    return box.ours + _rest(box)


def _tex(box: Box) -> str:
    return rf"\textbf{{{escaped(box.ours)}}}{escaped(_rest(box))}" if box.best else escaped(_text(box))


def _rest(box: Box) -> str:
    """Return what follows a cell's number."""
    return "".join(f" {part}" for part in (*_parts(box), box.mark, "[synthetic]" * box.synthetic) if part)


def _parts(box: Box) -> list[str]:
    """Return difference, spread, and what was published, where there are any."""
    spread = f"(sd {box.spread} over {box.seeds} seeds)" if box.spread else ""
    published = ", ".join(part for part in (box.published, box.difference, box.verdict) if part)
    return [part for part in (box.versus, spread, f"({published})" if box.published else "") if part]
