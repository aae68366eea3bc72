"""Uncertainty of metrics: standard errors, paired differences of two methods, corrections for many tests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Values = Sequence[float] | np.ndarray
LEVEL = 0.05  # of every test; intervals cover 1 - LEVEL


@dataclass(frozen=True)
class Difference:
    """A paired difference: its mean, the ends of its 95 % interval, the p value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    def scaled(self, factor: float) -> "Difference":
        """Return the difference in another unit, `factor` above 0."""
        return Difference(self.mean * factor, self.low * factor, self.high * factor, self.p)

    def percent(self) -> "Difference":
        """Return a difference of logarithms as the percentage by which one exceeds the other."""
        mean, low, high = (100 * math.expm1(value) for value in (self.mean, self.low, self.high))
        return Difference(mean, low, high, self.p)


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


def paired_difference(parts: Sequence[np.ndarray]) -> Difference | None:
    """Return the mean over `parts` of the mean difference, with a t interval; None where it is undefined.

    A part holds the differences of two methods on one set, `[seeds, n]`: the same n windows or documents for
    every seed, and the same seeds in every part. The variance adds that over seeds, of which a seed's scales
    serve all parts, and that over windows, for each part its own; degrees of freedom are Satterthwaite's
    (1946). A single part of one seed gives Student's paired t interval.
    """
    from scipy import stats

    count = len(parts)
    seeds = parts[0].shape[0]
    if any(part.shape[1] < 2 for part in parts):
        return None
    mean = float(np.mean([part.mean() for part in parts]))
    components = [(part.mean(0).var(ddof=1) / part.shape[1] / count**2, part.shape[1] - 1) for part in parts]
    if seeds > 1:
        by_seed = np.mean([part.mean(1) for part in parts], axis=0)
        components.append((by_seed.var(ddof=1) / seeds, seeds - 1))
    variance = sum(part for part, _ in components)
    if variance == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    freedom = variance**2 / sum(part**2 / freedom for part, freedom in components)
    half = stats.t.ppf(1 - LEVEL / 2, freedom) * math.sqrt(variance)
    p = 2 * stats.t.sf(abs(mean) / math.sqrt(variance), freedom)
    return Difference(mean, mean - half, mean + half, float(p))


def mcnemar(differences: Values) -> float:
    """Return the exact p value of McNemar's test (1947) for differences of two correctnesses, `[n]`."""
    from scipy import stats

    data = _flat(differences)
    wins, losses = int((data > 0).sum()), int((data < 0).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def benjamini_hochberg(p: Sequence[float]) -> list[float]:
    """Return p values adjusted so that those below `LEVEL` hold that share of false ones (1995)."""
    from scipy import stats

    return stats.false_discovery_control(p).tolist() if len(p) else []


def holm(p: Sequence[float]) -> list[float]:
    """Return p values adjusted so that any false one is below `LEVEL` that rarely (Holm 1979)."""
    order = np.argsort(p)
    steps = [(len(p) - rank) * p[index] for rank, index in enumerate(order)]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1) if len(p) else []
    return adjusted.tolist()


def prediction_half_width(values: Values) -> float:
    """Return how far another mean of n seeds may lie from that of `values [n]`: t s sqrt(1 + 1/n)."""
    from scipy import stats

    data = _flat(values)
    n = len(data)
    return float(stats.t.ppf(1 - LEVEL / 2, n - 1) * data.std(ddof=1) * math.sqrt(1 + 1 / n))


def _flat(values: Values) -> np.ndarray:
    return np.asarray(values, dtype=np.float64).reshape(-1)
