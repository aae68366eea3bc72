"""What only the other cells of a table tell of one: that it read other weights or texts than they, that it
cannot be told from plain rounding, that it is the best.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from teq.record import Record
from teq.report.cells import BASELINE, PARTIAL, Place, Value
from teq.report.layout import ANY, FULL
from teq.report.uncertainty import against


def mark_strangers(values: dict[tuple[Place, Place], Value]) -> dict[tuple[Place, Place], Value]:
    """Make partial the cells whose records read other weights or another text than most records here did,
    under the same name: another commit of a revision, the embedded text of another Python.
    """
    records = {f.record.file: f.record for value in values.values() for f in value.found}.values()
    counts: dict[str, Counter[str]] = {}
    for record in records:
        for name, digest in _read(record):
            counts.setdefault(name, Counter())[digest] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
    out = {}
    for place, value in values.items():
        mine = {f"{value.at.get('model')}.weights"} | {f"{name}.text" for name in value.formula.evaluations()}
        found = []
        for one in value.found:
            strange = {
                n: (usual[n][:16], d[:16]) for n, d in _read(one.record) if n in mine and d != usual[n]
            }
            found.append(dataclasses.replace(one, differences={**one.differences, **strange}))
        verdict = PARTIAL if any(one.differences for one in found) else value.verdict
        out[place] = dataclasses.replace(value, found=found, verdict=verdict)
    return out


def _read(record: Record) -> Iterator[tuple[str, str]]:
    """What a record's numbers were measured on, as (name, digest)."""
    if not record.synthetic:
        yield f"{record.data['run']['model']['name']}.weights", record.data["identity"]
    for name, measured in record.metrics.items():
        if "sha256" in measured["info"]:
            yield f"{name}.text", measured["info"]["sha256"]


def compare_with_baseline(values: dict[tuple[Place, Place], Value]) -> dict[tuple[Place, Place], Value]:
    """Compare each cell with its baseline on the same documents or windows."""
    baselines = [value for value in values.values() if value.at.get("method") == BASELINE]
    out = {}
    for place, value in values.items():
        beside = [one for one in baselines if one is not value and _same_but_method(value, one)]
        if beside and beside[0].found and value.found:
            baseline = beside[0].found[0].record
            intervals = [against(value.formula, one.record, baseline) for one in value.found]
            if None not in intervals:
                value = dataclasses.replace(value, beside=intervals)
        out[place] = value
    return out


def _same_but_method(value: Value, baseline: Value) -> bool:
    return all(axis == "method" or wanted in (value.at[axis], ANY) for axis, wanted in baseline.at.items())


def mark_best(
    values: dict[tuple[Place, Place], Value], column_axes: Sequence[str]
) -> dict[tuple[Place, Place], Value]:
    """Mark the best of our numbers in a column among the rows of one grid and one model."""
    blocks: dict[tuple[Any, ...], list[tuple[Place, Place]]] = {}
    for place, value in values.items():
        if isinstance(value.ours, float) and value.formula.best and value.at.get("grid") != FULL:
            block = place[1], value.at.get("grid"), value.at.get("model")
            blocks.setdefault(block, []).append(place)
    out = dict(values)
    for places in blocks.values():
        numbers = [values[place].ours for place in places if isinstance(values[place].ours, float)]
        top = min(numbers) if values[places[0]].formula.best == "lowest" else max(numbers)
        for place in places if len(places) > 1 else []:
            if values[place].ours == top:
                out[place] = dataclasses.replace(values[place], best=True)
    return out
