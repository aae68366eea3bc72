"""Uncertainty of cells: standard errors, intervals to the baseline, marks that need the whole table."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from teq import statistics
from teq.record import Record
from teq.report.cells import BASELINE, PARTIAL, Cell, Cells, Place
from teq.report.layout import ANY, COSTS, FULL, Formula

if TYPE_CHECKING:
    import numpy as np

ARRAYS = {"ppl": ("window_loss", "ppl"), "acc": ("correct", "mean"), "acc_norm": ("correct_norm", "mean")}
RESAMPLES = 1000


def stderr(record: Record, name: str) -> float | None:
    """Return the standard error of a metric from its packed losses or correctness; None without."""
    evaluation, _, key = name.rpartition(".")
    array, statistic = ARRAYS.get(key, (None, None))
    if evaluation in COSTS or array not in record.metrics[evaluation]["arrays"]:
        return None
    data = record.array(evaluation, array)
    error = statistics.stderr_of_perplexity if statistic == "ppl" else statistics.stderr_of_mean
    found = error(data)
    return None if math.isnan(found) else found


def cell_stderr(formula: Formula, record: Record) -> float | None:
    """Return the standard error of a mean or sum of metrics, which are measured on different documents."""
    errors = [stderr(record, name) for name in formula.names]
    if formula.ratio is not None or any(error is None for error in errors):
        return None
    total = math.sqrt(math.fsum(error**2 for error in errors if error is not None))
    return formula.times * (total / len(errors) if formula.mean else total)


def difference_interval(formula: Formula, one: Record, other: Record) -> tuple[float, float] | None:
    """Return the 95 % interval of a cell's number in `one` minus that in `other`, by the paired bootstrap.

    None where they were not measured on the same documents or windows, or nothing can be resampled.
    """
    if formula.ratio or formula.setting:
        return None
    pairs = []
    for name in formula.names:
        pair = _paired(one, other, name)
        if pair is None:
            return None
        pairs.append(pair)
    low, high = statistics.paired_bootstrap(pairs, RESAMPLES)
    scale = formula.times / (len(pairs) if formula.mean else 1)
    return scale * low, scale * high


def _paired(one: Record, other: Record, name: str) -> "tuple[np.ndarray, np.ndarray, str] | None":
    """Return the values behind a metric in two records, if both measured the same tokens or documents."""
    evaluation, _, key = name.rpartition(".")
    array, statistic = ARRAYS.get(key, (None, None))
    if evaluation in COSTS or array is None or statistic is None:
        return None
    both = [record.metrics[evaluation] for record in (one, other)]
    if any(array not in measured["arrays"] for measured in both) or len({_inputs(m) for m in both}) != 1:
        return None
    pair = one.array(evaluation, array), other.array(evaluation, array)
    return (*pair, statistic) if len(pair[0]) == len(pair[1]) else None


def _inputs(measured: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(value for key, value in sorted(measured["info"].items()) if key.endswith("sha256"))


def flag_mismatched_inputs(cells: Cells) -> Cells:
    """Mark as partial the cells whose weights or text differ from those of most records of the table.

    Under one name these are another commit of a revision, or the embedded text of another Python.
    """
    records = {match.record.file: match.record for cell in cells.values() for match in cell.matches}
    counts: dict[str, Counter[str]] = {}
    for record in records.values():
        for name, digest in _identities(record):
            counts.setdefault(name, Counter())[digest] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in counts.items()}
    out = {}
    for key, cell in cells.items():
        read = {f"{cell.at.get('model')}.weights"} | {f"{name}.text" for name in cell.formula.evaluations()}
        matches = []
        for match in cell.matches:
            unlike = {
                name: (usual[name][:16], digest[:16])
                for name, digest in _identities(match.record)
                if name in read and digest != usual[name]
            }
            matches.append(dataclasses.replace(match, differences={**match.differences, **unlike}))
        verdict = PARTIAL if any(match.differences for match in matches) else cell.verdict
        out[key] = dataclasses.replace(cell, matches=matches, verdict=verdict)
    return out


def _identities(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what a record's numbers were measured on, as (name, digest)."""
    if not record.synthetic:
        yield f"{record.data['run']['model']['name']}.weights", record.data["identity"]
    for name, measured in record.metrics.items():
        if "sha256" in measured["info"]:
            yield f"{name}.text", measured["info"]["sha256"]


def compare_with_baseline(cells: Cells) -> Cells:
    """Compare each cell with its baseline on the same documents or windows."""
    baselines = [cell for cell in cells.values() if cell.at.get("method") == BASELINE]
    out = {}
    for key, cell in cells.items():
        candidates = [one for one in baselines if one is not cell and _same_but_method(cell, one)]
        if candidates and candidates[0].matches and cell.matches:
            baseline = candidates[0].matches[0].record
            intervals = [difference_interval(cell.formula, one.record, baseline) for one in cell.matches]
            if None not in intervals:
                cell = dataclasses.replace(cell, baseline_intervals=intervals)
        out[key] = cell
    return out


def _same_but_method(cell: Cell, baseline: Cell) -> bool:
    return all(axis == "method" or wanted in (cell.at[axis], ANY) for axis, wanted in baseline.at.items())


def mark_best(cells: Cells, column_axes: Sequence[str]) -> Cells:
    """Mark the best of our numbers in a column among the rows of one grid and one model."""
    blocks: dict[tuple[Any, ...], list[tuple[Place, Place]]] = {}
    for key, cell in cells.items():
        if isinstance(cell.ours, float) and cell.formula.best and cell.at.get("grid") != FULL:
            block = key[1], cell.at.get("grid"), cell.at.get("model")
            blocks.setdefault(block, []).append(key)
    out = dict(cells)
    for keys in blocks.values():
        numbers = [cells[key].ours for key in keys if isinstance(cells[key].ours, float)]
        top = min(numbers) if cells[keys[0]].formula.lower_is_better else max(numbers)
        for key in keys if len(keys) > 1 else []:
            if cells[key].ours == top:
                out[key] = dataclasses.replace(cells[key], is_best=True)
    return out
