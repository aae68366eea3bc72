"""The report: one self-contained HTML page. What is shown is decided here; how it behaves, in page.js."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from teq.record import Record
from teq.report.cells import (
    BASELINE,
    BETTER,
    DIFFERS,
    MATCH,
    NOT_RUN,
    OURS,
    PARTIAL,
    WORSE,
    Place,
    Table,
    Value,
)
from teq.report.figure import Figure
from teq.report.render import figure_text, text

if TYPE_CHECKING:
    from teq.report.read import Shown

SYMBOLS = {  # a verdict is a sign and a word, so that its colour is never needed
    MATCH: "≈",
    BETTER: "▲",
    WORSE: "▼",
    DIFFERS: "≠",
    PARTIAL: "◐",
    NOT_RUN: "○",
    OURS: "●",
}
MEANINGS = {
    MATCH: "within 95 % of our standard error and spread over seeds, or the same in the printed digits",
    BETTER: "beyond the noise band, on the good side",
    WORSE: "beyond the noise band, on the bad side",
    DIFFERS: "not the published number, where neither side is good",
    PARTIAL: "from the nearest record: some settings differ, the cell lists them",
    NOT_RUN: "no record; the cell gives the command",
    OURS: "nothing published to compare with",
}
UNKNOWN = "not recorded"
MACHINE = ("device", "name", "cpus", "threads", "flags")
CODE = ("sources", "commit", "dirty")
HERE = Path(__file__).parent


def render(shown: Mapping[str, "Shown"], problems: Mapping[str, str]) -> str:
    """The page for experiments by name; `problems` are those that could not be shown."""
    cells: list[dict[str, Any]] = []
    records: dict[str, dict[str, Any]] = {}
    sections = [_section(one, cells, records) for one in shown.values()]
    models = sorted({cell["model"] for cell in cells if cell["model"]})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    data = json.dumps({"cells": cells, "records": records}, separators=(",", ":"))
    return template.render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        data=Markup(data.replace("<", "\\u003c")),
        sections=sections,
        models=models,
        problems=problems,
        verdicts=[(SYMBOLS[name], name, meaning) for name, meaning in MEANINGS.items()],
    )


def _section(one: "Shown", cells: list[dict[str, Any]], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    section = {"name": one.name, "title": one.layout.title, "caption": one.layout.caption, "figure": None}
    for found in one.body.used():
        records.setdefault(found.record.file.stem, summary(found.record))
    if isinstance(one.body, Table):
        return section | _table(one.body, cells)
    return section | _figure(one.body, one.drawings, cells)


def _table(table: Table, cells: list[dict[str, Any]]) -> dict[str, Any]:
    notes = text.footnotes(table)
    columns = [{"title": text.axis_title(axis), "model": ""} for axis in table.row_axes]
    models = [_model(table, column=column) for column in table.columns]
    columns += [
        {"title": text.heading(table, column), "model": model}
        for column, model in zip(table.columns, models, strict=True)
    ]
    rows = []
    for row in table.rows:
        shown = [{"head": text.coordinate(part)} for part in row]
        for column, model in zip(table.columns, models, strict=True):
            value = table.values.get((row, column))
            if value is None:
                shown.append({"empty": True, "model": model})
                continue
            shown.append(_shown(value, notes, len(cells), model))
            cells.append(_cell(table, value, row, column))
        rows.append({"model": _model(table, row=row), "cells": shown})
    quoted = []
    for place in text.quotations(table):
        heads = [{"head": part} for part in place[: len(table.row_axes)]]
        rest = zip(place[len(table.row_axes) :], models, strict=True)
        quoted.append({"model": "", "cells": heads + [{"quoted": part, "model": m} for part, m in rest]})
    constant = ", ".join(f"{axis}: {value}" for axis, value in table.constant.items())
    return {
        "columns": columns,
        "rows": rows + quoted,
        "constant": constant,
        "notes": [_coded(line) for line in text.legend(table, notes) if line != text.LEGEND],
        "claims": text.claims(table.claims),
        "counts": _counts([value.verdict for value in table.values.values()]),
    }


def _figure(figure: Figure, drawings: Mapping[str, bytes], cells: list[dict[str, Any]]) -> dict[str, Any]:
    rows, notes = figure_text.marked(figure)
    body = []
    for row, panel in zip(rows[1:], figure.panels, strict=True):
        shown: list[dict[str, Any]] = [{"head": part} for part in row[:2]]
        verdict = NOT_RUN if panel.found is None else OURS
        verdict = PARTIAL if panel.found is not None and panel.found.differences else verdict
        sort = "" if panel.found is None else panel.near
        symbol = SYMBOLS[verdict]
        shown.append(
            {"index": len(cells), "ours": row[2], "verdict": verdict, "symbol": symbol, "sort": sort}
        )
        shown += [{"text": part} for part in row[3:]]
        body.append({"model": panel.model, "cells": shown})
        cells.append(
            {
                "title": f"{figure.layout.title}: {panel.model} {panel.grid}",
                "model": panel.model,
                "verdict": verdict,
                "records": [] if panel.found is None else [panel.found.record.file.stem],
                "differences": text.settings_text(panel.found.differences) if panel.found else "",
                "command": text.command(panel.jobs),
                "numbers": list(zip(rows[0][2:], row[2:], strict=True)),
            }
        )
    svg = drawings.get("svg", b"").decode()
    return {
        "columns": [{"title": title, "model": ""} for title in rows[0]],
        "rows": body,
        "constant": "",
        "notes": [_coded(line) for line in notes],
        "claims": [],
        "counts": _counts([cell["verdict"] for cell in cells[-len(body) :]]),
        "figure": Markup(svg[svg.index("<svg") :]) if svg else None,
    }


def _shown(value: Value, notes: Mapping[str, str], index: int, model: str) -> dict[str, Any]:
    ours = value.verdict != NOT_RUN
    return {
        "index": index,
        "model": model,
        "ours": text.shown(value, value.ours) if ours else "",
        "best": value.best,
        "stderr": text.shown(value, value.stderr) if value.stderr is not None else "",
        "spread": text.shown(value, value.spread) if value.spread is not None else "",
        "noise": value.noise,
        "published": text.shown(value, value.published) if value.published is not None else "",
        "difference": text.difference(value) if ours else "",
        "verdict": value.verdict,
        "symbol": SYMBOLS[value.verdict],
        "mark": notes.get(text.difference_text(value), ""),
        "synthetic": value.synthetic,
        "sort": value.ours if ours else value.published if value.published is not None else "",
    }


def _cell(table: Table, value: Value, row: Place, column: Place) -> dict[str, Any]:
    """What the details of a cell show."""
    place = [text.coordinate(part) for part in row]
    formula = value.formula
    names = ", ".join(formula.names) or formula.setting or ""
    how = (
        "mean of" if formula.mean else "sum of" if formula.sum else "ratio of" if formula.ratio else "setting"
    )
    numbers = [["from", f"{how} {names}{f' x {formula.times:g}' if formula.times != 1 else ''}"]]
    if value.verdict != NOT_RUN:
        numbers.append(["ours", text.shown(value, value.ours)])
    if value.stderr is not None:
        numbers.append(["standard error", text.shown(value, value.stderr)])
    if value.spread is not None:
        numbers.append([f"spread over {len(value.found)} seeds", text.shown(value, value.spread)])
    if value.published is not None:
        numbers.append(["published", text.shown(value, value.published)])
    if difference := text.difference(value):
        numbers.append(["difference", difference])
    if value.noise:
        numbers.append([f"against {BASELINE}", "not distinguishable (paired bootstrap, 95 %)"])
    return {
        "title": f"{table.layout.title}: {', '.join([*place, text.heading(table, column)])}",
        "model": value.at.get("model", table.constant.get("model", "")),
        "verdict": value.verdict,
        "records": [found.record.file.stem for found in value.found],
        "differences": text.difference_text(value),
        "command": text.command(value.jobs),
        "numbers": numbers,
    }


def summary(record: Record) -> dict[str, Any]:
    """What the page keeps of a record: everything but its packed arrays and histograms.

    `facts` are grouped, flat and textual, so that two records can be compared line by line.
    """
    data = record.data
    machine = data.get("machine", {})
    info = {name: measured["info"] for name, measured in record.metrics.items()}
    values = {name: measured["values"] for name, measured in record.metrics.items()}
    facts = {
        "configuration": dict(_flat(data["run"])),
        "weights": {"identity": str(data.get("identity", ""))},
        "text and tokens": dict(_flat({"calibration": data.get("text") or {}, **info})),
        "results": dict(_flat(values)),
        "cost": dict(_costs(data)),
        "versions": {**dict(_flat(machine.get("versions", {}))), "python": str(machine.get("python"))},
        "machine": dict(_flat({key: machine.get(key, UNKNOWN) for key in MACHINE})),
        "code": _code(data),
        "digests": {name: stage.get("digest", UNKNOWN) for name, stage in data["stages"].items()},
    }
    return {"facts": facts, "created": data["created"], "loss": data.get("training", {}).get("loss", [])}


def _costs(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Seconds and memory of each stage, and what of machine and code was another when it ran: a stage out of
    the cache was not made by whatever wrote the record.
    """
    wrote = _ran(data)
    for name, stage in data["stages"].items():
        cost = stage["cost"]
        yield f"{name} seconds", f"{cost['seconds']:.1f}"
        if cost["peak_bytes"]:
            yield f"{name} peak memory", f"{cost['peak_bytes'] / 2**20:,.0f} MiB"
        for key, value in _ran(cost).items():
            if wrote.get(key) != value:
                yield f"{name} {key}", value


def _ran(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return machine, versions and code of a record or of a stage's cost."""
    return dict(_flat({"flags": UNKNOWN, **entry.get("machine", {})})) | _code(entry)


def _code(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return the code of a record or of a stage's cost; older ones lack parts of it."""
    return dict(_flat({key: entry.get("code", {}).get(key, UNKNOWN) for key in CODE}))


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(part, Mapping) for part in node):
        for i, value in enumerate(node):
            name = value.get("corpus") or value.get("task") if isinstance(value, Mapping) else None
            yield from _flat(value, f"{path}.{name or i}")
    else:
        yield path, json.dumps(node) if isinstance(node, list) else "–" if node is None else str(node)


def _model(table: Table, row: Place | None = None, column: Place | None = None) -> str:
    """The model that a row or a column stands for; empty where it stands for none."""
    axes, place = (table.row_axes, row) if row is not None else (table.column_axes, column or ())
    return dict(zip(axes, place, strict=True)).get("model", "")


def _coded(line: str) -> Markup:
    """A note with what stands in backticks as code."""
    parts = line.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def _counts(verdicts: Sequence[str]) -> list[tuple[str, str, int]]:
    return [(symbol, name, verdicts.count(name)) for name, symbol in SYMBOLS.items() if name in verdicts]
