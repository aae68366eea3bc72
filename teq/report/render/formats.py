"""A sheet as Markdown, LaTeX (booktabs) and CSV: text that is the same on every machine."""

import csv
import io

from teq.console import aligned
from teq.report.sheet import Box, Sheet

SPECIAL = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"$\sim$", "±": r"$\pm$"}
SPECIAL |= {"−": "$-$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$", "{": r"\{", "}": r"\}", "^": r"\^{}"}
SPECIAL |= {mark: rf"$^{{{digit}}}$" for digit, mark in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}


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
    """Return a `table` or `figure` environment; a figure includes its PNG and has its caption below."""
    lines = [rf"\begin{{{sheet.kind}}}", r"\centering"]
    named = [rf"\caption{{{escaped(sheet.caption)}}}", rf"\label{{{sheet.kind[:3]}:{sheet.name}}}"]
    if sheet.kind == "table":
        lines += named
    elif sheet.picture:
        lines.append(rf"\includegraphics[width=\linewidth]{{../figures/{sheet.name}.png}}\\[1ex]")
    columns = "l" * sheet.heads + "r" * (len(sheet.header) - sheet.heads)
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, sheet.header)) + r" \\", r"\midrule"]
    for index, row in enumerate(sheet.rows):
        lines += [r"\midrule"] if index in sheet.rules else []
        lines.append(" & ".join(map(_tex, row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if sheet.kind == "figure":
        lines += named
    for note in (*sheet.notes, *((claim,) for claim in sheet.claims)):
        parts = (rf"\texttt{{{escaped(part)}}}" if i % 2 else escaped(part) for i, part in enumerate(note))
        lines.append(rf"\par\footnotesize {''.join(parts)}")
    return "\n".join([*lines, rf"\end{{{sheet.kind}}}"]) + "\n"


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
    text = f" {box.versus}" if box.versus else ""
    text += f" (sd {box.spread} over {box.seeds} seeds)" if box.spread else ""
    if box.published:
        text += f" ({', '.join(part for part in (box.published, box.difference, box.verdict) if part)})"
    text += f" {box.mark}" if box.mark else ""
    return text + (" [synthetic]" if box.synthetic else "")
