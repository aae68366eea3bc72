"""Uncertainty of cells: standard errors, intervals to the baseline, marks that need the whole table."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from teq import statistics
from teq.record import Record
from teq.report.cells import PARTIAL, Cell, Cells, Comparison, Place
from teq.report.layout import ANY, FULL, UNMEASURED, Formula, Layout
from teq.statistics import LEVEL

# the values behind a metric, and the unit of its differences; any other may be the mean of its own array
ARRAYS = {
    "ppl": ("window_loss", "%"),
    "kl": ("window_kl", "nats"),
    "top1": ("window_top1", "points"),
    "acc": ("correct", "points"),
    "acc_norm": ("correct_norm", "points"),
}
# what else makes requests of a text
HARNESS = ("task_version", "lm_eval", "bos", "context", "pair", "chat_template", "num_fewshot")


def stderr(record: Record, name: str) -> float | None:
    """Return the standard error of a metric from its packed values; None without."""
    if (behind := values_behind(record, name)) is None:
        return None
    data, unit = behind
    found = (statistics.stderr_of_perplexity if unit == "%" else statistics.stderr_of_mean)(data)
    return None if math.isnan(found) else found


def values_behind(record: Record, name: str) -> "tuple[np.ndarray, str] | None":
    """Return the values `[n]` behind a metric and the unit of its differences; None if it is not of any."""
    evaluation, _, key = name.rpartition(".")
    array, unit = ARRAYS.get(key, (key, "points"))
    if evaluation in UNMEASURED or array not in record.metrics[evaluation]["arrays"]:
        return None
    data = record.array(evaluation, array).astype(np.float64)
    value = record.metrics[evaluation]["values"].get(key)
    is_mean = value is not None and data.ndim == 1 and math.isclose(data.mean(), value, rel_tol=1e-6)
    return (data, unit) if key in ARRAYS or is_mean else None


def cell_stderr(formula: Formula, record: Record) -> float | None:
    """Return the standard error of a mean or sum of metrics, which are measured on different documents."""
    errors = [stderr(record, name) for name in formula.names]
    if formula.ratio is not None or any(error is None for error in errors):
        return None
    total = math.sqrt(math.fsum(error**2 for error in errors if error is not None))
    return formula.times * (total / len(errors) if formula.mean else total)


def compared(formula: Formula, ones: Sequence[Record], others: Sequence[Record]) -> Comparison | None:
    """Return the paired difference of a cell's number, `ones` minus `others`, over their common inputs.

    Several records are several seeds, paired one by one; a single one stands for every seed of the other.
    Perplexities are compared by their logarithms, as a percentage. None where the inputs, or the harness that
    made requests of them, are not the same, or there is nothing to pair.
    """
    pairs = max(len(ones), len(others))
    if formula.ratio or formula.setting or {len(ones), len(others)} - {1, pairs} or not pairs:
        return None
    units, parts = set(), []
    for name in formula.names:
        seeds = [paired(ones[i % len(ones)], others[i % len(others)], name) for i in range(pairs)]
        if any(one is None for one in seeds):
            return None
        parts.append(np.stack([one[0] for one in seeds if one is not None]))
        units |= {one[1] for one in seeds if one is not None}
    found = statistics.paired_difference(parts) if len(units) == 1 else None
    if found is None:
        return None
    (unit,) = units
    n = sum(part.shape[1] for part in parts)
    if unit == "%":
        return Comparison(found.percent(), unit, n=n)
    discordant = None
    if pairs == len(parts) == 1 and np.isin(parts[0], (-1, 0, 1)).all():
        found = dataclasses.replace(found, p=statistics.mcnemar(parts[0]))
        discordant = int((parts[0] > 0).sum()), int((parts[0] < 0).sum())
    return Comparison(found.scaled(formula.factor), unit, n=n, discordant=discordant)


def interval(formula: Formula, records: Sequence[Record]) -> tuple[float, float, int] | None:
    """Return the ends of the 95 % interval of a cell's number, over texts and seeds, and its n.

    None where the number is not a mean over the values of one kind, or an exponential of a single such mean.
    """
    if formula.ratio or formula.setting or not records:
        return None
    units, parts = set(), []
    for name in formula.names:
        seeds = [values_behind(record, name) for record in records]
        if any(one is None or one[0].shape != seeds[0][0].shape for one in seeds):
            return None
        parts.append(np.stack([one[0] for one in seeds]))
        units |= {one[1] for one in seeds}
    found = statistics.paired_difference(parts) if len(units) == 1 else None
    if found is None or ("%" in units and len(parts) > 1):
        return None
    found = found.scaled(formula.factor)
    ends = (found.low, found.high)
    low, high = (math.exp(end) for end in ends) if "%" in units else ends
    return low, high, sum(part.shape[1] for part in parts)


def paired(one: Record, other: Record, name: str) -> "tuple[np.ndarray, str] | None":
    """Return the differences `[n]` behind a metric in two records that measured the same inputs; the unit."""
    evaluation, both = name.rpartition(".")[0], [values_behind(record, name) for record in (one, other)]
    if both[0] is None or both[1] is None:
        return None
    (first, unit), (second, _) = both
    same = inputs(one.metrics[evaluation]) == inputs(other.metrics[evaluation])
    return (first - second, unit) if same and len(first) == len(second) else None


def inputs(measured: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two measurements must share to be paired: tokens or documents, and the harness."""
    info = measured["info"]
    return tuple((key, info[key]) for key in sorted(info) if key.endswith("sha256") or key in HARNESS)


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
        read = {f"{cell.at.get('model')}.weights"}
        read |= {f"{name}.{what}" for name in cell.formula.evaluations() for what in ("text", "harness")}
        matches = []
        for match in cell.matches:
            unlike = {
                name: (_shortened(usual[name]), _shortened(digest))
                for name, digest in _identities(match.record)
                if name in read and digest != usual[name]
            }
            matches.append(dataclasses.replace(match, differences={**match.differences, **unlike}))
        verdict = PARTIAL if any(match.differences for match in matches) else cell.verdict
        out[key] = dataclasses.replace(cell, matches=matches, verdict=verdict)
    return out


def _shortened(identity: str) -> str:
    """Return a digest's first digits; a harness is said in words."""
    return identity if " " in identity else identity[:16]


def _identities(record: Record) -> Iterator[tuple[str, str]]:
    """Yield what a record's numbers were measured on, as (name, digest)."""
    if not record.synthetic:
        yield f"{record.data['run']['model']['name']}.weights", record.data["identity"]
    for name, measured in record.metrics.items():
        info = measured["info"]
        if "sha256" in info:
            yield f"{name}.text", info["sha256"]
        if "lm_eval" in info:
            yield f"{name}.harness", ", ".join(f"{key} {info.get(key)}" for key in HARNESS[:3])


def compare_with_baseline(cells: Cells, layout: Layout) -> Cells:
    """Compare each cell with that of its baseline at the same place; correct for their number."""
    found = {}
    for key, cell in cells.items():
        versus = layout.baseline(cell.at.get("method", ""))
        rivals = (one for one in cells.values() if one is not cell and one.at.get("method") == versus)
        other = next((one for one in rivals if _same_but_method(cell, one)), None)
        if other is not None:
            one = compared(cell.formula, _records(cell), _records(other))
            against = [match.record.file.stem for match in other.matches]
            found |= {} if one is None else {key: dataclasses.replace(one, versus=versus, against=against)}
    adjusted = statistics.benjamini_hochberg([one.difference.p for one in found.values()])
    marked = dict(cells)
    for (key, one), p in zip(found.items(), adjusted, strict=True):
        marked[key] = dataclasses.replace(cells[key], versus=dataclasses.replace(one, adjusted=p))
    return marked


def _records(cell: Cell) -> list[Record]:
    return [match.record for match in cell.matches]


def _same_but_method(cell: Cell, baseline: Cell) -> bool:
    return all(axis == "method" or wanted in (cell.at[axis], ANY) for axis, wanted in baseline.at.items())


def mark_best(cells: Cells, column_axes: Sequence[str]) -> Cells:
    """Mark the best of our numbers in a column, of one grid and model, and all that may be as good.

    Those are the cells whose paired difference to the best one is not significant within the block.
    """
    blocks: dict[tuple[Any, ...], list[tuple[Place, Place]]] = {}
    for key, cell in cells.items():
        if isinstance(cell.ours, float) and cell.formula.best and cell.at.get("grid") != FULL:
            block = key[1], cell.at.get("grid"), cell.at.get("model")
            blocks.setdefault(block, []).append(key)
    marked = dict(cells)
    for keys in blocks.values():
        top = (min if cells[keys[0]].formula.lower_is_better else max)(keys, key=lambda key: cells[key].ours)
        others = [key for key in keys if cells[key].ours != cells[top].ours]
        if not others:
            continue
        tests = {
            key: compared(cells[key].formula, _records(cells[key]), _records(cells[top])) for key in others
        }
        known = {key: one.difference.p for key, one in tests.items() if one is not None}
        adjusted = statistics.benjamini_hochberg(list(known.values()))
        close = {key for key, p in zip(known, adjusted, strict=True) if p >= LEVEL}
        for key in keys:
            if key not in others or key in close:
                marked[key] = dataclasses.replace(cells[key], is_best=True)
    return marked


def recover_gaps(cells: Cells) -> Cells:
    """Note how much of what RTN costs each cell recovers, `(rtn - m) / (rtn - fp)`, ours and published."""
    by_method: dict[tuple[Any, ...], Cell] = {}
    for cell in cells.values():
        by_method[_place(cell, cell.at.get("grid")), cell.at.get("method")] = cell
    found = dict(cells)
    for key, cell in cells.items():
        rtn = by_method.get((_place(cell, cell.at.get("grid")), "rtn"))
        fp = by_method.get((_place(cell, FULL), "fp"))
        if rtn is None or fp is None or cell.at.get("method") in ("rtn", "fp") or not cell.formula.best:
            continue
        gap, published = (
            _gap(*(getattr(one, name) for one in (cell, rtn, fp))) for name in ("ours", "published")
        )
        found[key] = dataclasses.replace(cell, gap=gap, published_gap=published)
    return found


def _place(cell: Cell, grid: str | None) -> tuple[Any, ...]:
    """Return a cell's coordinates without its method, on another grid."""
    rest = sorted((axis, value) for axis, value in cell.at.items() if axis not in ("method", "grid"))
    return grid, *rest


def _gap(cell: Any, rtn: Any, fp: Any) -> float | None:
    if not all(isinstance(value, int | float) for value in (cell, rtn, fp)) or rtn == fp:
        return None
    return float((rtn - cell) / (rtn - fp))


def order_agreement(cells: Sequence[Cell]) -> float | None:
    """Return Kendall's tau of our order of some cells and the published one; None of fewer than three."""
    from scipy import stats

    pairs = [(cell.ours, cell.published) for cell in cells if isinstance(cell.ours, float)]
    pairs = [pair for pair in pairs if isinstance(pair[1], int | float)]
    return float(stats.kendalltau(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else None


def accepted_by_mistake(cells: Cells) -> tuple[int, int]:
    """Return how many published numbers of other methods the tolerances of the cells accept, of how many.

    Each stands for the mean of three seeds without spread, at the same place and grid.
    """
    accepted = of = 0
    for cell in cells.values():
        for other in cells.values():
            numbers = cell.published, other.published
            if other is cell or any(not isinstance(number, int | float) for number in numbers):
                continue
            if _place(cell, cell.at.get("grid")) == _place(other, other.at.get("grid")):
                of += 1
                accepted += abs(numbers[0] - numbers[1]) <= tolerance(cell.formula, numbers[0], ())
    return accepted, of


def tolerance(formula: Formula, published: float, seeds: Sequence[float]) -> float:
    """Return how far ours may lie from a published number: digits, allowance, and noise of several `seeds`.

    No sampling error of the texts: ours and the paper's are measured on the same ones.
    """
    width = 0.5000001 * 10**-formula.digits + formula.allowance
    width += formula.allowance_percent / 100 * abs(published)
    return width + (statistics.prediction_half_width(seeds) if len(seeds) > 1 else 0.0)
