"""Standard errors and the paired bootstrap against closed forms."""

import math

import numpy as np
import pytest

from teq import statistics


def test_stderr_of_accuracy_is_the_binomial_one():
    correct = np.array([1] * 30 + [0] * 70)
    assert statistics.stderr_of_mean(correct) == pytest.approx(math.sqrt(0.3 * 0.7 / 99), rel=1e-12)
    assert math.isnan(statistics.stderr_of_mean([1.0]))


def test_perplexity_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        low, high = statistics.perplexity_interval(rng.normal(3.0, 0.2, size=60))
        covered += low < math.exp(3.0) < high
    assert 0.92 <= covered / 400 <= 0.98


def test_stderr_of_perplexity_is_the_spread_of_perplexities():
    rng = np.random.default_rng(2)
    found = [statistics.perplexity(rng.normal(2.0, 0.3, size=80)) for _ in range(2000)]
    assert statistics.stderr_of_perplexity(rng.normal(2.0, 0.3, size=80)) == pytest.approx(
        np.std(found), rel=0.3
    )


def test_pairing_removes_the_variance_that_documents_share():
    rng = np.random.default_rng(3)
    easy = rng.normal(3.0, 1.0, size=200)
    better = easy - 0.05 + rng.normal(0, 0.02, size=200)
    difference, low, high = statistics.paired_bootstrap(better, easy)
    assert difference == pytest.approx(-0.05, abs=0.01)
    assert low < difference < high < 0  # although the two means' own errors are ten times the difference
    closed = 1.96 * statistics.stderr_of_mean(better - easy)
    assert high - low == pytest.approx(2 * closed, rel=0.15)
    shuffled = rng.permutation(easy)
    _, low, high = statistics.paired_bootstrap(better, shuffled)
    assert low < 0 < high


def test_bootstrap_of_perplexities_is_seeded_and_antisymmetric():
    rng = np.random.default_rng(4)
    a, b = rng.normal(3, 0.3, size=50), rng.normal(3.2, 0.3, size=50)
    found = statistics.paired_bootstrap(a, b, "ppl")
    assert found == statistics.paired_bootstrap(a, b, "ppl")
    assert found[0] == pytest.approx(statistics.perplexity(a) - statistics.perplexity(b))
    back = statistics.paired_bootstrap(b, a, "ppl")
    assert back == pytest.approx((-found[0], -found[2], -found[1]))
    assert statistics.paired_bootstrap(a, b, "ppl", seed=1)[1:] != found[1:]


def test_two_lengths_are_no_pair():
    with pytest.raises(ValueError, match="3 values beside 2"):
        statistics.paired_bootstrap([1, 0, 1], [1, 0])
