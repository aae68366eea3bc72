"""Standard errors, paired differences and corrections: against closed forms, scipy and simulation."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import subprocess
import zlib

import numpy as np
import pytest
from scipy import stats

from teq import record, statistics
from teq.report import read as report
from teq.report.match import RecordIndex
from teq.report.render import page

RECORDS = pathlib.Path(__file__).resolve().parent.parent / "results" / "records"


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


def test_one_set_and_one_seed_are_students_paired_t_test():
    rng = np.random.default_rng(5)
    a, b = rng.normal(3, 0.3, size=12), rng.normal(3.2, 0.3, size=12)
    found = statistics.paired_difference([(a - b)[None]])
    expected = stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((expected.pvalue, interval.low, interval.high))


def test_pairing_removes_the_variance_that_windows_share():
    rng = np.random.default_rng(3)
    easy = rng.normal(3.0, 1.0, size=200)
    better = easy - 0.05 + rng.normal(0, 0.02, size=200)
    found = statistics.paired_difference([(better - easy)[None]])
    assert found.low < -0.05 < found.high < 0  # although the two means' own errors are ten times that
    shuffled = statistics.paired_difference([(better - rng.permutation(easy))[None]])
    assert shuffled.low < 0 < shuffled.high


def test_a_percentage_is_that_of_the_perplexities():
    rng = np.random.default_rng(6)
    a, b = rng.normal(3, 0.3, size=(2, 20))
    found = statistics.paired_difference([(a - b)[None]]).percent()
    ratio = statistics.perplexity(a) / statistics.perplexity(b)
    assert found.mean == pytest.approx(100 * (ratio - 1), rel=1e-12)
    assert found.low < found.mean < found.high


def test_what_cannot_be_told_is_none_or_certain():
    assert statistics.paired_difference([np.ones((1, 1))]) is None
    same = statistics.paired_difference([np.zeros((1, 5))])
    assert (same.mean, same.p) == (0, 1)


def test_mcnemar_is_the_binomial_test_of_the_discordant_documents():
    differences = [1] * 9 + [-1] * 2 + [0] * 189
    assert statistics.mcnemar(differences) == pytest.approx(stats.binomtest(9, 11, 0.5).pvalue)
    assert statistics.mcnemar(np.zeros(10)) == 1


def test_mcnemars_false_alarms_are_at_most_nominal():
    rng = np.random.default_rng(7)
    for rate in (0.02, 0.1, 0.3):
        wrong = rng.binomial(200, rate, size=4000)
        wins = rng.binomial(wrong, 0.5)
        p = [statistics.mcnemar(np.repeat([1, -1], [w, n - w])) for w, n in zip(wins, wrong, strict=True)]
        assert np.mean(np.array(p) < 0.05) <= 0.05


def test_holm_and_benjamini_hochberg_on_a_known_example():
    p = [0.01, 0.04, 0.03, 0.005]
    assert statistics.holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.benjamini_hochberg(p) == pytest.approx([0.02, 0.04, 0.04, 0.02])
    assert statistics.holm([]) == statistics.benjamini_hochberg([]) == []


@pytest.mark.parametrize("correct", [statistics.holm, statistics.benjamini_hochberg])
def test_without_any_effect_a_table_has_a_false_mark_in_one_of_twenty(correct):
    rng = np.random.default_rng(8)
    found = [min(correct(rng.uniform(size=24).tolist())) < 0.05 for _ in range(4000)]
    assert np.mean(found) <= 0.06


def own_differences():
    """Standardized differences of per-window losses between the methods of a model in our records."""
    groups = {}
    for one in record.load(RECORDS):
        for name, measured in one.metrics.items():
            if "window_loss" in measured["arrays"]:
                key = one.data["run"]["model"]["name"], name, measured["info"]["tokens_sha256"]
                groups.setdefault(key, {})[one.id] = one.array(name, "window_loss")
    found = []
    for losses in groups.values():
        first, *others = (losses[run] for run in sorted(losses))
        found += [(other - first) for other in others]
    found = [(d - d.mean()) / d.std(ddof=1) for d in found if len(d) > 4 and d.std() > 0]
    assert len(found) > 10
    return found


def simulated(rng, pool, n, repeats):
    """Differences `[repeats, n]` without an effect: our own, in our own autocorrelation.

    A Gaussian AR(1) series with the mean lag-1 autocorrelation of the pool is mapped to the pool's
    distribution, value by value.
    """
    lag = float(np.mean([np.corrcoef(d[:-1], d[1:])[0, 1] for d in pool]))
    values = np.sort(np.concatenate(pool))
    series = np.empty((repeats, n))
    series[:, 0] = rng.standard_normal(repeats)
    for i in range(1, n):
        noise = rng.standard_normal(repeats)
        series[:, i] = lag * series[:, i - 1] + math.sqrt(1 - lag**2) * noise
    return np.quantile(values, stats.norm.cdf(series)) - values.mean()


@pytest.mark.parametrize("n", [8, 10, 16, 50])
def test_the_intervals_cover_as_often_as_they_say(n):
    rng = np.random.default_rng(zlib.crc32(str(n).encode()))
    draws = simulated(rng, own_differences(), n, 4000)
    found = [statistics.paired_difference([draw[None]]) for draw in draws]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert 0.93 <= covered <= 0.97, covered


@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
def test_three_seeds_cover_too(spread):
    """Windows are the same for every seed, a seed moves all of its windows, and each a little more."""
    rng = np.random.default_rng(11)
    windows = simulated(rng, own_differences(), 16, 2000)
    seeds = spread * rng.standard_normal((2000, 3, 1)) / 4
    noise = 0.3 * rng.standard_normal((2000, 3, 16))
    found = [
        statistics.paired_difference([w[None] + s + e]) for w, s, e in zip(windows, seeds, noise, strict=True)
    ]
    covered = np.mean([one.low <= 0 <= one.high for one in found])
    assert covered >= 0.93, covered


def test_a_seed_that_moves_all_sets_is_counted_once():
    rng = np.random.default_rng(12)
    found = []
    for _ in range(1500):
        seeds = rng.standard_normal((3, 1))
        parts = [seeds + 0.5 * rng.standard_normal((1, n)) for n in (40, 80)]
        found.append(statistics.paired_difference(parts))
    assert np.mean([one.low <= 0 <= one.high for one in found]) >= 0.93


def test_another_mean_of_seeds_lies_within_the_prediction():
    rng = np.random.default_rng(13)
    draws = rng.standard_normal((4000, 3))
    one = rng.standard_normal(4000)
    inside = [
        abs(d.mean() - x) <= statistics.prediction_half_width(d) for d, x in zip(draws, one, strict=True)
    ]
    assert 0.93 <= np.mean(inside) <= 0.97


def on_the_page(expressions, given=""):
    """The values of JavaScript expressions over the page's own statistics."""
    if (node := shutil.which("node")) is None:
        pytest.skip("needs node (Debian: apt-get install nodejs)")
    script = (pathlib.Path(page.__file__).parent / "paired.js").read_text()
    code = f"{script}\n{given}\nconsole.log(JSON.stringify([{', '.join(expressions)}]))"
    return json.loads(
        subprocess.run([node, "-"], input=code, capture_output=True, text=True, check=True).stdout
    )


def test_the_page_has_the_quantiles_of_student_and_the_p_values_of_mcnemar():
    freedoms = [1, 1.5, 2.7, *range(7, 1000, 31), 999]
    found = on_the_page([f"tQuantile({freedom})" for freedom in freedoms])
    assert found == pytest.approx([stats.t.ppf(0.975, freedom) for freedom in freedoms], rel=1e-9)
    counts = [(0, 0), (1, 0), (3, 3), (12, 5), (5, 12), (0, 40), (150, 101)]
    found = on_the_page([f"mcnemar({gained}, {lost})" for gained, lost in counts])
    expected = [statistics.mcnemar([1] * gained + [-1] * lost) for gained, lost in counts]
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_page_has_the_intervals_of_the_tables():
    rng = np.random.default_rng(0)
    cases = [
        [rng.normal(0.1, 1, (1, 8))],
        [rng.normal(0.1, 1, (3, 16))],
        [rng.integers(-1, 2, (1, n)) for n in (20, 200, 1000)],
        [rng.normal(0, 1, (2, 30)), rng.normal(1, 3, (2, 9))],
        [np.ones((1, 4))],
    ]
    found = on_the_page([f"pairedDifference({json.dumps([p.tolist() for p in parts])})" for parts in cases])
    for one, parts in zip(found, cases, strict=True):
        assert one == pytest.approx(dataclasses.asdict(statistics.paired_difference(parts)), rel=1e-8)
    assert on_the_page(["pairedDifference([[[1]]])"]) == [None]


def test_the_page_recomputes_the_differences_of_the_published_tables():
    shown, _ = report.read_all(["smollm2", "seeds"], (), RecordIndex(RECORDS))
    (text,) = re.findall(r'id="data">(.*?)</script>', report.page_of(shown, {}), re.DOTALL)
    cells = [cell for cell in json.loads(text)["cells"] if cell.get("interval")]
    expressions = [
        f"compareCells(data.records, {json.dumps(cell['records'])}, {json.dumps(cell['against'])}, "
        f"{{metrics: {json.dumps(cell['metrics'])}, factor: {cell['factor']}}})"
        for cell in cells
    ]
    found = on_the_page(expressions, f"const data = {text};")
    assert len(found) > 20 and {one["unit"] for one in found} == {"%", "points"}
    assert any(len(cell["records"]) > 1 for cell in cells) and any("gained" in one for one in found)
    for one, cell in zip(found, cells, strict=True):
        interval = {end: cell["interval"][end] for end in ("mean", "low", "high")}
        assert {end: one[end] for end in interval} == pytest.approx(interval, rel=1e-4, abs=1e-4), cell[
            "title"
        ]
