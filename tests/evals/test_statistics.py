"""Statistics against scipy, exact enumeration and brute force."""

import itertools
import math
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caftune.errors import CaftuneError

pytest.importorskip("scipy")
from scipy import stats

from caftune.evals.statistics import compare, holm, interval, pass_at_k


@pytest.mark.parametrize("runs", [2, 3, 5, 30])
def test_an_interval_is_scipys(runs):
    values = np.random.default_rng(runs).normal(3, 2, runs)
    mean, half_width = interval(values.tolist())
    theirs = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half_width, mean + half_width) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([0.5], r"values must be of at least 2 runs, got shape \(1,\)\. Train with another seed\."),
        ([[1.0, 2.0], [3.0, 4.0]], r"at least 2 runs, got shape \(2, 2\)"),
        ([1.0, math.nan], r"values must be finite numbers, got \[1\.0, nan\]"),
    ],
)
def test_an_interval_is_refused_where_runs_are_missing(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        interval(values)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_sets_of_k_samples_with_a_pass(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        sets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == sum(map(any, sets)) / len(sets)


def test_pass_at_k_is_exact_for_many_samples():
    assert pass_at_k(10_000, 1, 100) == 0.01
    assert pass_at_k(1000, 500, 500) == 1.0
    assert pass_at_k(1000, 0, 1000) == 0.0


@pytest.mark.parametrize(
    ("n", "c", "k", "sentence"),
    [
        (5, 2, 6, r"k must be between 1 and n = 5, got 6\. Draw at least k samples of each problem\."),
        (5, 2, 0, "k must be between 1 and n = 5, got 0"),
        (5, 6, 1, r"c must be between 0 and n = 5, got 6\."),
    ],
)
def test_pass_at_k_is_refused_where_there_are_not_enough_samples(n, c, k, sentence):
    with pytest.raises(ValueError, match=sentence):
        pass_at_k(n, c, k)


def test_holm_on_an_example_worked_by_hand():
    # sorted: 4 * 0.005 = 0.02, 3 * 0.01 = 0.03, 2 * 0.03 = 0.06, and 1 * 0.04, which may not be less than the one before
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02], abs=1e-15)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    indices = range(len(p_values))
    for measure, found in enumerate(holm(p_values)):
        others = [i for i in indices if i != measure]
        families = [(measure, *more) for size in range(len(p_values)) for more in itertools.combinations(others, size)]
        worst = max(len(family) * min(p_values[i] for i in family) for family in families)
        assert found == pytest.approx(min(worst, 1.0), abs=1e-15)


@pytest.mark.parametrize("values", [[0.1, 1.2], [-0.1], [math.nan, 0.5]])
def test_holm_refuses_what_is_no_p_value(values):
    with pytest.raises(ValueError, match=r"p_values must be a list of numbers in \[0, 1\]"):
        holm(values)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_paired_seeds_that_treat_all_examples_alike_give_the_t_test_of_the_runs():
    effects = 0.4 + noise(5, seed=3)
    baseline = noise(5, 40)
    found = compare(baseline + effects[:, None], baseline, paired_seeds=True)
    theirs = stats.ttest_1samp(effects, 0)
    assert found.difference == pytest.approx(effects.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()), abs=1e-5)
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-4)  # 1 / (resamples + 1)


def test_independent_seeds_that_treat_all_examples_alike_give_welchs_test_of_the_runs():
    difficulty, first, second = noise(40), 0.8 + noise(5, seed=4), 2 * noise(3, seed=5)
    found = compare(difficulty + first[:, None], difficulty + second[:, None])
    theirs = stats.ttest_ind(first, second, equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval()), abs=1e-5)
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-4)
    assert found.num_seeds == (5, 3)
    assert found.num_examples == 40


TIES = 0.7 * np.array([3, 2, 1, 1, 1, -1, -1, 2, 1, 1, -2])


@pytest.mark.parametrize("differences", [0.1 + noise(11, seed=6), 0.5 + noise(11, seed=6), TIES])
def test_runs_that_do_not_vary_give_the_exact_sign_flip_test_of_the_examples(differences):
    signs = np.array(list(itertools.product([-1, 1], repeat=11)))
    exact = (abs(signs @ differences) >= abs(differences.sum()) - 1e-9).mean()
    found = compare(np.tile(differences, (3, 1)), np.zeros((2, 11)), resamples=40_000).p_value
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-4)


def test_no_p_value_is_below_one_in_the_number_of_resamples_plus_one():
    assert compare(np.tile(5 + noise(50), (2, 1)), np.zeros((2, 50)), resamples=199).p_value == 1 / 200


def test_runs_that_do_not_vary_give_the_bootstrap_of_the_examples():
    differences = noise(6, seed=7)
    every = np.array(list(itertools.product(differences, repeat=6))).mean(axis=1)
    exact = differences.mean() + (np.quantile(every, [0.025, 0.975]) - differences.mean()) * math.sqrt(6 / 5)
    found = compare(np.tile(differences, (2, 1)), np.zeros((2, 6)), resamples=100_000)
    assert (found.low, found.high) == pytest.approx(tuple(exact), abs=0.02 * differences.std())


def both_parts(seed):
    """Arms with all that varies: difficulty, runs, examples on which the arms differ, and noise."""
    rng = np.random.default_rng(seed)
    runs, taste = 0.1 * rng.normal(size=(2, 4, 1)), 0.8 * rng.normal(size=60)
    treatment = runs[0] + taste + 0.5 * rng.normal(size=(4, 60))
    return treatment, runs[1] + 0.5 * rng.normal(size=(4, 60))


def covariance(first, second, *, same):
    """Mean over pairs of runs of the covariance over examples; without the pairs of a run with itself where `same`."""
    pairs = [(a, b) for a in range(len(first)) for b in range(len(second)) if not (same and a == b)]
    return np.mean([np.cov(first[a], second[b])[0, 1] for a, b in pairs])


def parts_of_variance(treatment, baseline, *, paired):
    """Of runs, with its degrees of freedom, and of examples: from what the runs agree on."""
    if paired:
        gaps = treatment - baseline
        return np.var(gaps.mean(1), ddof=1) / 4, 3.0, covariance(gaps, gaps, same=True) / 60
    first, second = np.var(treatment.mean(1), ddof=1) / 4, np.var(baseline.mean(1), ddof=1) / 4
    freedom = (first + second) ** 2 / (first**2 / 3 + second**2 / 3)
    agreed = covariance(treatment, treatment, same=True) + covariance(baseline, baseline, same=True)
    return first + second, freedom, (agreed - 2 * covariance(treatment, baseline, same=False)) / 60


@pytest.mark.parametrize("paired", [True, False])
def test_both_parts_add_up_to_the_interval_and_the_p_value_of_a_plain_simulation(paired):
    treatment, baseline = both_parts(8)
    runs, freedom, examples = parts_of_variance(treatment, baseline, paired=paired)
    assert 0.5 < runs / examples < 2  # else this would test one part only
    rng = np.random.default_rng(9)
    chance = math.sqrt(runs) * rng.standard_t(freedom, 400_000) + math.sqrt(examples) * rng.normal(size=400_000)
    found = compare(treatment, baseline, paired_seeds=paired, resamples=100_000)
    half = np.quantile(abs(chance), 0.95)
    # 60 examples' mean is not quite normal, and quantiles of 100,000 draws have an error of their own.
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.03)
    assert found.p_value == pytest.approx((abs(chance) >= abs(found.difference)).mean(), abs=0.01)


@pytest.mark.parametrize("paired", [True, False])
def test_the_minimum_detectable_effect_has_80_percent_power_in_a_t_test_of_that_spread(paired):
    treatment, baseline = both_parts(10)
    runs, first, examples = parts_of_variance(treatment, baseline, paired=paired)
    error, freedom = math.sqrt(runs + examples), (runs + examples) ** 2 / (runs**2 / first + examples**2 / 59)
    effect = compare(treatment, baseline, paired_seeds=paired).minimum_detectable
    rng, trials = np.random.default_rng(11), 400_000
    statistic = (effect / error + rng.normal(size=trials)) / np.sqrt(rng.chisquare(freedom, trials) / freedom)
    found = abs(statistic) > stats.t.ppf(0.975, freedom)
    assert found.mean() == pytest.approx(0.8, abs=0.0021)  # the 99.9% range of the binomial distribution


def test_the_effect_size_is_the_mean_of_the_examples_differences_by_their_deviation():
    treatment, baseline = np.array([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]]), np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    # gaps 0.5, 0, 0.5: mean 1/3, variance 1/12
    assert compare(treatment, baseline).effect_size == pytest.approx(math.sqrt(12) / 3)
    assert compare(baseline + 0.1, baseline).effect_size == math.inf


def test_equal_scores_differ_by_nothing():
    found = compare(np.full((3, 10), 0.5), np.full((3, 10), 0.5))
    assert (found.difference, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)
    assert (found.effect_size, found.minimum_detectable) == (0.0, 0.0)


def test_a_comparison_is_a_function_of_its_arguments():
    arms = both_parts(12)
    assert compare(*arms) == compare(*arms)
    assert compare(*arms) != compare(*arms, seed=1)


def test_a_comparison_moves_with_a_shift_and_grows_with_the_unit():
    treatment, baseline = both_parts(13)
    plain, moved = compare(treatment, baseline), compare(100 * (treatment + 0.3), 100 * baseline)
    for name in ("difference", "low", "high"):
        assert getattr(moved, name) == pytest.approx(100 * (getattr(plain, name) + 0.3))
    assert moved.minimum_detectable == pytest.approx(100 * plain.minimum_detectable)
    assert compare(100 * treatment, 100 * baseline).p_value == pytest.approx(plain.p_value)


def test_arms_are_compared_example_by_example():
    difficulty = 5 * noise(200)
    arms = difficulty + 0.1 * noise(3, 200, seed=1), difficulty + 0.1 * noise(3, 200, seed=2)
    matched, torn = compare(*arms), compare(arms[0], arms[1][:, ::-1])
    assert torn.difference == pytest.approx(matched.difference)
    assert torn.high - torn.low > 20 * (matched.high - matched.low)


def test_what_paired_runs_share_cancels_only_where_they_are_said_to_be_paired():
    shared = 3 * noise(5, 1)
    arms = shared + 0.1 * noise(5, 80, seed=1), shared + 0.1 * noise(5, 80, seed=2)
    paired, independent = compare(*arms, paired_seeds=True), compare(*arms)
    assert independent.high - independent.low > 20 * (paired.high - paired.low)


@pytest.mark.parametrize("paired", [True, False])
def test_two_runs_whose_means_tie_on_different_examples_are_no_certainty(paired):
    baseline = np.zeros((2, 100))
    treatment = baseline.copy()
    treatment[0, 3] = treatment[1, 7] = 1
    found = compare(treatment, baseline, paired_seeds=paired)
    assert found.p_value > 0.05
    # of 200 answers 2 are gained: noise of variance (1 / 99) / 2 an example
    half = stats.norm.ppf(0.975) * math.sqrt(1 / 99 / 2 / 100)
    assert (found.low, found.high) == pytest.approx((0.01 - half, 0.01 + half), abs=1e-5)


def test_an_untrained_baseline_given_twice_leaves_the_variance_of_the_treatments_runs():
    treatment = noise(5, 1) + np.zeros((5, 30))
    found, theirs = compare(treatment, np.zeros((2, 30))), stats.ttest_1samp(treatment[:, 0], 0)
    assert found.p_value == pytest.approx(theirs.pvalue, abs=1e-4)


def test_ten_thousand_resamples_of_a_thousand_examples_stay_within_100_megabytes():
    arms = noise(5, 1000, seed=1), noise(5, 1000, seed=2)
    tracemalloc.start()
    compare(*arms, resamples=10_000)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6


GOOD = np.zeros((3, 4))


@pytest.mark.parametrize(
    ("treatment", "baseline", "options", "sentence"),
    [
        (
            GOOD[:1],
            GOOD,
            {},
            r"treatment must be scores \[seeds, examples\] with at least 2 of each, got shape \(1, 4\)\. Train",
        ),
        (GOOD, GOOD[:, :1], {}, r"baseline must be scores \[seeds, examples\] .*, got shape \(3, 1\)"),
        (GOOD[0], GOOD, {}, r"got shape \(4,\)"),
        (GOOD, GOOD[:, :3], {}, r"baseline must have the treatment's 4 examples, got 3\. Score both on the same\."),
        (
            GOOD,
            GOOD[:2],
            {"paired_seeds": True},
            r"baseline must have the treatment's 3 seeds where seeds are paired, got 2\.",
        ),
        (GOOD, GOOD + math.nan, {}, r"baseline must be finite numbers, got nan at seed 0, example 0 \(from 0\)"),
        (GOOD, GOOD, {"resamples": 10}, r"resamples must be at least 100, got 10\."),
    ],
)
def test_arms_that_cannot_be_compared_are_refused_with_a_sentence(treatment, baseline, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        compare(treatment, baseline, **options)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(CaftuneError, match=r"pip install 'caftune\[eval\]'"):
        interval([1.0, 2.0])
