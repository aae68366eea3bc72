"""A figure's numbers as Markdown, LaTeX and CSV."""

import csv
import io

from teq.report import figure as figures
from teq.report.figure import Figure
from teq.report.render.text import command, escaped, letter, settings_text
from teq.report.table import aligned


def markdown(figure: Figure) -> str:
    """The figure by reference, its numbers, and what is missing or differs."""
    rows, notes = marked(figure)
    parts = [f"## {figure.layout.title}", figure.layout.caption]
    if figure.used():
        parts.append(f"![{figure.layout.title}](../figures/{figure.name}.svg)")
    parts += [aligned(rows), "\n".join(f"- {line}" for line in notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(figure: Figure) -> str:
    """A `figure` environment that includes the PNG, with the numbers as a booktabs table below it."""
    rows, notes = marked(figure)
    lines = [r"\begin{figure}", r"\centering"]
    if figure.used():
        lines.append(rf"\includegraphics[width=\linewidth]{{../figures/{figure.name}.png}}\\[1ex]")
    lines += [rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}", r"\toprule"]
    lines += [" & ".join(map(escaped, rows[0])) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows[1:]]
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escaped(figure.layout.caption)}}}"]
    lines += [rf"\label{{fig:{figure.name}}}", *(rf"\par\footnotesize {escaped(note)}" for note in notes)]
    return "\n".join([*lines, r"\end{figure}"]) + "\n"


def comma_separated(figure: Figure) -> str:
    """One line a layer of a panel."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(figures.by_layer(figure))
    return out.getvalue()


def marked(figure: Figure) -> tuple[list[list[str]], list[str]]:
    """The rows of `figures.numbers` with the marks of partial panels, and the notes below them."""
    rows, texts = figures.numbers(figure), {}
    for row, panel in zip(rows[1:], figure.panels, strict=True):
        if panel.found is not None and panel.found.differences:
            text = settings_text(panel.found.differences)
            row[2] += f" [{texts.setdefault(text, letter(len(texts)))}]"
    notes = ["movement: the mean of |log2(s / start)|"] if figure.used() else []
    notes += [f"[{mark}] partial: {text}" for text, mark in texts.items()]
    missing = [panel for panel in figure.panels if panel.found is None]
    if missing:
        notes.append(
            f"not run: {len(missing)} of {len(figure.panels)} panels; `{command(missing[0].jobs)}` runs the "
            "first"
        )
    return rows, [*notes, *figure.layout.notes]
