"""Uncertainty of metrics: standard errors, and the paired bootstrap for two methods on the same inputs."""

import math
from collections.abc import Callable, Sequence

import numpy as np

Values = Sequence[float] | np.ndarray
CONFIDENCE = 0.95
Z = 1.959963984540054  # the standard normal's 97.5 % quantile
STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": lambda values: float(values.mean()),
    "ppl": lambda losses: float(np.exp(losses.mean())),
}


def stderr_of_mean(values: Values) -> float:
    """Standard error of the mean of `values [n]`: s / sqrt(n) with the sample deviation s.

    It is lm-eval's `acc_stderr`. NaN for fewer than two values, where it is not defined.
    """
    data = _flat(values)
    return float(data.std(ddof=1) / math.sqrt(len(data))) if len(data) > 1 else math.nan


def perplexity(losses: Values) -> float:
    """exp of the mean of per-window mean token losses `[n]`: equally long windows count the same."""
    return STATISTICS["ppl"](_flat(losses))


def stderr_of_perplexity(losses: Values) -> float:
    """Standard error of `perplexity(losses)` by the delta method: the perplexity times the mean's error."""
    return perplexity(losses) * stderr_of_mean(losses)


def perplexity_interval(losses: Values) -> tuple[float, float]:
    """The 95 % interval of `perplexity(losses)`: exp of the normal interval of the mean loss."""
    mean, error = float(_flat(losses).mean()), stderr_of_mean(losses)
    return math.exp(mean - Z * error), math.exp(mean + Z * error)


def paired_bootstrap(
    a: Values, b: Values, statistic: str = "mean", resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """The difference `statistic(a) - statistic(b)` and the ends of its 95 % percentile interval.

    `a` and `b` `[n]` belong to the same n documents or windows; each resample draws n of those with
    replacement and takes both methods' values there (Efron and Tibshirani 1993, chapter 13). `statistic` is
    `mean` (of per-document correctness) or `ppl` (of per-window losses). Raises ValueError when the lengths
    differ or are zero.
    """
    first, second = _flat(a), _flat(b)
    if len(first) != len(second) or not len(first):
        raise ValueError(f"a pair needs the same documents: {len(first)} values beside {len(second)}")
    measure = STATISTICS[statistic]
    draw = np.random.default_rng(seed)
    differences = np.empty(resamples)
    for i in range(resamples):
        drawn = draw.integers(len(first), size=len(first))
        differences[i] = measure(first[drawn]) - measure(second[drawn])
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return measure(first) - measure(second), float(low), float(high)


def _flat(values: Values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)


def combined_bootstrap(
    pairs: Sequence[tuple[Values, Values, str]], resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The ends of the 95 % interval of the sum over `pairs` (a, b, statistic) of `statistic(a) -
    statistic(b)`.

    Each pair is resampled by itself, as in `paired_bootstrap`: its values belong to the same documents or
    windows, those of different pairs to different ones. For `mean` a resample of n documents is drawn as the
    counts of their distinct differences, which has the same distribution and costs nothing for a test set of
    ten thousand.
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
