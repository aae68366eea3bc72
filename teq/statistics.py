"""Uncertainty of metrics: standard errors, and the paired bootstrap for two methods on the same inputs."""

import math
from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | np.ndarray
CONFIDENCE = 0.95
Z = 1.959963984540054  # the standard normal's 97.5 % quantile


def stderr_of_mean(values: Values) -> float:
    """Return the standard error of the mean of `values [n]`: s / sqrt(n), s the sample deviation.

    It is lm-eval's `acc_stderr`. NaN for fewer than two values, where it is not defined.
    """
    data = _flat(values)
    return float(data.std(ddof=1) / math.sqrt(len(data))) if len(data) > 1 else math.nan


def perplexity(losses: Values) -> float:
    """Return exp of the mean of per-window mean token losses `[n]`: windows are equally long."""
    return float(np.exp(_flat(losses).mean()))


def stderr_of_perplexity(losses: Values) -> float:
    """Return the delta-method standard error of `perplexity(losses)`: perplexity times the mean's error."""
    return perplexity(losses) * stderr_of_mean(losses)


def paired_bootstrap(
    pairs: Sequence[tuple[Values, Values, str]], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the sum of `statistic(a) - statistic(b)` over `pairs`.

    `a` and `b` `[n]` belong to the same n documents or windows: a resample draws n of those with replacement
    and takes both methods' values there (Efron and Tibshirani 1993, chapter 13). Different pairs have others
    and are resampled by themselves. `statistic` is `mean` (of per-document correctness) or `ppl` (of
    per-window losses). For `mean` a resample is drawn as the counts of the distinct differences, which has
    the same distribution and costs nothing for a test set of ten thousand. Raises ValueError when the
    lengths of a pair differ or are zero.
    """
    draw = np.random.default_rng(seed)
    total = np.zeros(resamples)
    for a, b, statistic in pairs:
        first, second = _flat(a), _flat(b)
        if len(first) != len(second) or not len(first):
            raise ValueError(f"a pair needs the same documents: {len(first)} values beside {len(second)}")
        if statistic == "mean":
            values, counts = np.unique(first - second, return_counts=True)
            total += draw.multinomial(len(first), counts / len(first), size=resamples) @ values / len(first)
        else:
            drawn = draw.integers(len(first), size=(resamples, len(first)))
            total += np.exp(first[drawn].mean(1)) - np.exp(second[drawn].mean(1))
    low, high = np.quantile(total, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _flat(values: Values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)
