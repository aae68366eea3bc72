"""What a record's own losses and correctness say about the certainty of its numbers."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from teq import statistics
from teq.record import Record
from teq.report.layout import COSTS, Cell

if TYPE_CHECKING:
    import numpy as np

ARRAYS = {"ppl": ("window_loss", "ppl"), "acc": ("correct", "mean"), "acc_norm": ("correct_norm", "mean")}
RESAMPLES = 1000


def stderr(record: Record, name: str) -> float | None:
    """The standard error of a record's metric, from its packed losses or correctness; None without."""
    evaluation, _, key = name.rpartition(".")
    array, statistic = ARRAYS.get(key, (None, None))
    if evaluation in COSTS or array not in record.metrics[evaluation]["arrays"]:
        return None
    data = record.array(evaluation, array)
    error = statistics.stderr_of_perplexity if statistic == "ppl" else statistics.stderr_of_mean
    found = error(data)
    return None if math.isnan(found) else found


def cell_stderr(formula: Cell, record: Record) -> float | None:
    """The standard error of a cell's mean or sum: its metrics are measured on different documents."""
    errors = [stderr(record, name) for name in formula.names]
    if formula.ratio is not None or any(error is None for error in errors):
        return None
    total = math.sqrt(math.fsum(error**2 for error in errors if error is not None))
    return formula.times * (total / len(errors) if formula.mean else total)


def against(formula: Cell, one: Record, other: Record) -> tuple[float, float] | None:
    """The ends of the 95 % interval of a cell's number in `one` minus that in `other`, by the paired
    bootstrap on the same documents or windows; None where they are not, or nothing can be resampled.
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
    """The values behind a metric in two records, when both were measured on the same tokens or documents."""
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
