"""Standard errors and the paired bootstrap against closed forms."""

import math

import numpy as np
import pytest

from teq import statistics


def test_stderr_of_accuracy_is_the_binomial_one():
    correct = np.array([1] * 30 + [0] * 70)
    assert statistics.stderr_of_mean(correct) == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    assert math.isnan(statistics.stderr_of_mean([1.0]))


def test_stderr_of_perplexity_is_the_spread_of_perplexities():
    rng = np.random.default_rng(2)
    found = [statistics.perplexity(rng.normal(2.0, 0.3, size=80)) for _ in range(2000)]
    assert statistics.stderr_of_perplexity(rng.normal(2.0, 0.3, size=80)) == pytest.approx(
        np.std(found), rel=0.3
    )


def resampled(a, b, statistic, resamples=4000):
    """The interval of one pair, drawn index by index: what the name says and nothing clever."""
    draw, found = np.random.default_rng(9), []
    for _ in range(resamples):
        drawn = draw.integers(len(a), size=len(a))
        found.append(statistic(a[drawn]) - statistic(b[drawn]))
    return np.quantile(found, [0.025, 0.975])


def test_the_bootstrap_is_the_plain_one():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 2, size=(2, 300))
    found = statistics.paired_bootstrap([(a, b, "mean")], 4000)
    assert found == pytest.approx(resampled(a, b, np.mean), abs=0.01)
    a, b = rng.normal(3, 0.3, size=50), rng.normal(3.2, 0.3, size=50)
    found = statistics.paired_bootstrap([(a, b, "ppl")], 4000)
    assert found == pytest.approx(resampled(a, b, statistics.perplexity), abs=0.4)


def test_pairing_removes_the_variance_that_documents_share():
    rng = np.random.default_rng(3)
    easy = rng.normal(3.0, 1.0, size=200)
    better = easy - 0.05 + rng.normal(0, 0.02, size=200)
    low, high = statistics.paired_bootstrap([(better, easy, "mean")])
    assert low < -0.05 < high < 0  # although the two means' own errors are ten times the difference
    closed = 1.96 * statistics.stderr_of_mean(better - easy)
    assert high - low == pytest.approx(2 * closed, rel=0.15)
    low, high = statistics.paired_bootstrap([(better, rng.permutation(easy), "mean")])
    assert low < 0 < high


def test_intervals_of_several_pairs_add_up_and_are_seeded():
    rng = np.random.default_rng(4)
    a, b = rng.normal(3, 0.3, size=(2, 50))
    one = statistics.paired_bootstrap([(a, b, "ppl")])
    assert one == statistics.paired_bootstrap([(a, b, "ppl")])
    assert one != statistics.paired_bootstrap([(a, b, "ppl")], seed=1)
    one = statistics.paired_bootstrap([(a, b, "ppl")], 20_000)
    low, high = statistics.paired_bootstrap([(a, b, "ppl"), (a, b, "ppl")], 20_000)
    # variances of independent resamples add
    assert high - low == pytest.approx(math.sqrt(2) * (one[1] - one[0]), rel=0.05)


def test_two_lengths_are_no_pair():
    with pytest.raises(ValueError, match="3 values beside 2"):
        statistics.paired_bootstrap([([1, 0, 1], [1, 0], "mean")])
