"""The report: one self-contained HTML page. What is shown is decided here; how it behaves, in page.js."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
from markupsafe import Markup

from teq.record import Record
from teq.report import compare
from teq.report.cells import (
    AS_STATED,
    BETTER,
    DIFFERS,
    MATCH,
    NOT_RUN,
    ONE_SEED,
    OURS,
    PARTIAL,
    UNJUDGED,
    WORSE,
)
from teq.report.render import formats
from teq.report.render.details import largest_errors
from teq.report.render.forest import forest
from teq.report.render.tradeoff import tradeoffs
from teq.report.sheet import Sheet
from teq.spec import digest

SYMBOLS = {  # a verdict is a sign and a word, so that its colour is never needed
    MATCH: "≈",
    BETTER: "▲",
    WORSE: "▼",
    DIFFERS: "≠",
    PARTIAL: "◐",
    NOT_RUN: "○",
    OURS: "●",
    ONE_SEED: "◇",
    AS_STATED: "=",
    UNJUDGED: "·",
}
MEANINGS = {
    MATCH: "within printed digits, the declared allowance and 95 % of the noise of our seeds",
    BETTER: "beyond that, on the good side",
    WORSE: "beyond that, on the bad side",
    DIFFERS: "not the published number, where neither side is good",
    PARTIAL: "from the nearest record: some settings differ, the cell lists them",
    NOT_RUN: "no record; the cell gives the command",
    OURS: "nothing published to compare with",
    ONE_SEED: "one draw of calibration text: the difference is shown, not judged",
    AS_STATED: "configured as the paper states",
    UNJUDGED: "seconds and memory of another machine",
}
UNKNOWN = "not recorded"
MACHINE = ("device", "name", "cpus", "threads", "flags")
CODE = ("sources", "commit", "dirty")
HERE = Path(__file__).parent
SCRIPTS = ("paired.js", "page.js")


def render(
    sheets: Sequence[tuple[Sheet, Sequence[bytes]]], records: Collection[Record], problems: Mapping[str, str]
) -> str:
    """Return the page of some sheets, each with the SVGs of its panels, and the records that they show.

    `problems` are what could not be shown, by experiment.
    """
    cells: list[Mapping[str, Any]] = []
    sections = [_section(sheet, panels, cells) for sheet, panels in sheets]
    filters = {axis: sorted({cell[axis] for cell in cells} - {""}) for axis in ("model", "method", "grid")}
    filters["verdict"] = [name for name in SYMBOLS if any(cell["verdict"] == name for cell in cells)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((HERE / "page.html").read_text(encoding="utf-8"))
    summaries = {record.file.stem: summary(record) for record in records}
    documents = {digest: ids for record in records for digest, ids in _documents(record)}
    data = json.dumps({"cells": cells, "records": summaries, "documents": documents}, separators=(",", ":"))
    return template.render(
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)),
        data=Markup(data.replace("<", "\\u003c")),
        sections=sections,
        filters=filters,
        problems=problems,
        symbols=SYMBOLS,
        forest=forest(cells),
        tradeoffs=tradeoffs(cells, {record.file.stem: record for record in records}),
        verdicts=[(SYMBOLS[name], name, meaning) for name, meaning in MEANINGS.items()],
    )


def _section(sheet: Sheet, panels: Sequence[bytes], cells: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the template reads of a sheet; the details of its boxes go to `cells`."""
    first, rows = len(cells), []
    for row in sheet.rows:
        numbered = []
        for box in row:
            numbered.append((len(cells), box))
            if box.kind == "cell":
                cells.append(box.detail)
        rows.append(numbered)
    verdicts = [cell["verdict"] for cell in cells[first:]]
    counts = [(symbol, name, verdicts.count(name)) for name, symbol in SYMBOLS.items() if name in verdicts]
    pictures = [panel.decode() for panel in panels]
    return {
        "sheet": sheet,
        "rows": rows,
        "counts": counts,
        "csv": quote(formats.comma_separated(sheet)),
        "panels": [Markup(picture[picture.index("<svg") :]) for picture in pictures],
    }


def summary(record: Record) -> dict[str, Any]:
    """Return what the page keeps of a record: everything except loglikelihoods and histograms.

    `arrays` are the values behind metrics, `errors` the largest of its linears', where it has them. `facts`
    are grouped, flat and textual, so that two records can be compared line by line.
    """
    data = record.data
    machine = data.get("machine", {})
    info = {name: measured["info"] for name, measured in record.metrics.items()}
    values = {name: measured["values"] for name, measured in record.metrics.items()}
    facts = {
        "configuration": dict(_flat(data["run"])),
        "weights": {"identity": str(data.get("identity", ""))},
        "text and tokens": dict(_flat({"calibration": data.get("text") or {}, **info})),
        "results": {name: _digits(value) for name, value in _flat(values)},
        "cost": dict(_costs(data)),
        "versions": {**dict(_flat(machine.get("versions", {}))), "python": str(machine.get("python"))},
        "machine": dict(_flat({key: machine.get(key, UNKNOWN) for key in MACHINE})),
        "code": _code(data),
        "digests": {name: stage.get("digest", UNKNOWN) for name, stage in data["stages"].items()},
    }
    loss = data.get("training", {}).get("loss", [])
    shown = {"facts": facts, "created": data["created"], "loss": loss, "arrays": dict(_arrays(record))}
    largest = largest_errors(record)
    return shown if largest is None else {**shown, "errors": largest}


def _arrays(record: Record) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the values behind each metric, with a digest of what they were measured on."""
    for evaluation, measured in record.metrics.items():
        for key in measured["values"]:
            if (behind := compare.values_behind(record, f"{evaluation}.{key}")) is None:
                continue
            values, unit = behind
            whole = np.isin(values, (0, 1)).all()
            yield (
                f"{evaluation}.{key}",
                {
                    "unit": unit,
                    "on": digest(compare.inputs(measured)),
                    "values": "".join(map(str, values.astype(int)))
                    if whole
                    else [float(f"{v:.7g}") for v in values],
                },
            )


def _documents(record: Record) -> Iterator[tuple[str, list[int]]]:
    """Yield the ids of the documents of each task, by the digest of what was measured."""
    for evaluation, measured in record.metrics.items():
        if "document" in measured["arrays"]:
            yield digest(compare.inputs(measured)), record.array(evaluation, "document").tolist()


def _digits(text: str) -> str:
    """Return six significant digits of what is a fraction."""
    try:
        return f"{float(text):.6g}" if "." in text else text
    except ValueError:
        return text


def _costs(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the cost of each stage, and where its machine or code differs from the record's.

    Cached stages may be older than the record.
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
