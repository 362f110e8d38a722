"""What the statistics promise, against simulated comparisons.

Rates are held to the 99.9% range of the binomial distribution at the stated rate.
"""

import dataclasses
import math

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import stats

from caftune.evals.statistics import compare, interval


def in_binomial_range(hits, trials, rate):
    low, high = stats.binom.interval(0.999, trials, rate)
    return low <= hits <= high


@pytest.mark.parametrize("runs", [2, 3, 5])
def test_an_interval_covers_the_mean_in_95_of_100_repetitions(runs):
    rng, trials = np.random.default_rng(1), 2000
    found = [interval(values) for values in rng.normal(7, 3, (trials, runs))]
    assert in_binomial_range(sum(abs(mean - 7) <= half for mean, half in found), trials, 0.95)


@dataclasses.dataclass(frozen=True)
class World:
    """Where scores come from. Standard deviations, and whether scores are right or wrong only."""

    runs: float = 0.0  # of a run of either arm
    shared: float = 0.0  # of what run s of both arms has in common
    taste: float = 0.0  # of the examples' true differences, whose mean over all examples is the effect
    noise: float = 1.0
    binary: bool = False
    turned: float = 0.0  # share of the answers that chance alone turns round, where they are right or wrong
    seeds: int = 5
    examples: int = 100

    def draw(self, rng, effect=0.0):
        shape = (2, self.seeds, self.examples)
        common = self.shared * rng.normal(size=(1, self.seeds, 1)) + 2 * rng.normal(size=(1, 1, self.examples))
        arms = common + self.runs * rng.normal(size=(2, self.seeds, 1)) + self.noise * rng.normal(size=shape)
        arms[0] += effect + self.taste * rng.normal(size=self.examples)
        return (arms > 0) ^ (rng.random(shape) < self.turned) if self.binary else arms


def comparisons(world, trials, *, effect=0.0, paired=False, seed=0):
    rng = np.random.default_rng(seed)
    return [compare(*world.draw(rng, effect), paired_seeds=paired, resamples=600) for _trial in range(trials)]


PURE_NOISE = {
    "noise within runs": World(),
    "right or wrong": World(binary=True),
    "runs": World(runs=0.3),
    "runs, right or wrong": World(runs=0.3, binary=True),
    "three seeds": World(runs=0.3, seeds=3),
    "paired": World(runs=0.3, shared=1.0),
}


@pytest.mark.parametrize("name", PURE_NOISE)
def test_two_identical_arms_are_told_apart_in_5_of_100_comparisons(name):
    found = comparisons(PURE_NOISE[name], 200, paired=name == "paired")
    assert in_binomial_range(sum(each.p_value <= 0.05 for each in found), 200, 0.05)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("paired", [True, False])
def test_identical_arms_of_which_few_answers_differ_are_told_apart_in_no_more_than_5_of_100(seeds, paired):
    found = comparisons(World(noise=0.0, binary=True, turned=0.01, seeds=seeds), 300, paired=paired)
    most = stats.binom.ppf(0.999, 300, 0.05)
    assert sum(each.p_value <= 0.05 for each in found) <= most
    assert sum(not each.low <= 0 <= each.high for each in found) <= most


@pytest.mark.parametrize("runs", [0.0, 0.1])
def test_arms_that_differ_on_single_examples_only_are_told_apart_in_no_more_than_5_of_100(runs):
    found = comparisons(World(runs=runs, taste=1.0), 300)
    claims = sum(each.p_value <= 0.05 for each in found)
    assert 0.01 * 300 <= claims <= stats.binom.ppf(0.999, 300, 0.05)


def per_example_flips(treatment, baseline, rng):
    """The test we do not use: arms swapped per example, in all runs at once, as if the runs were all there are."""
    gaps = treatment.mean(0) - baseline.mean(0)
    flipped = rng.choice([-1, 1], size=(400, len(gaps))) @ gaps
    return (1 + (abs(flipped) >= abs(gaps.sum())).sum()) / 401


def test_swapping_arms_per_example_alone_would_tell_identical_arms_apart_far_more_often():
    rng = np.random.default_rng(0)
    claims = [per_example_flips(*World(runs=0.3).draw(rng), rng) <= 0.05 for _trial in range(200)]
    assert np.mean(claims) > 0.3


COVERED = {
    "no variance of runs": World(taste=0.5),
    "runs": World(taste=0.5, runs=0.3),
    "three seeds": World(taste=0.5, runs=0.3, seeds=3),
    "paired": World(taste=0.5, runs=0.3, shared=1.0),
}


@pytest.mark.parametrize("name", COVERED)
def test_the_interval_covers_the_true_difference_in_at_least_95_of_100_comparisons(name):
    found = comparisons(COVERED[name], 300, effect=0.7, paired=name == "paired", seed=1)
    covered = sum(each.low <= 0.7 <= each.high for each in found)
    assert stats.binom.ppf(0.001, 300, 0.95) <= covered <= 0.99 * 300


def two_level_bootstrap(treatment, baseline, rng, resamples=400):
    """The interval we do not use: percentiles of resampled examples and resampled runs."""

    def counts(size):
        return rng.multinomial(size, np.full(size, 1 / size), resamples) / size

    drawn = counts(treatment.shape[1])
    means = [(counts(len(arm)) @ arm * drawn).sum(1) for arm in (treatment, baseline)]
    return np.quantile(means[0] - means[1], [0.025, 0.975])


def test_percentiles_of_a_plain_two_level_bootstrap_would_cover_too_little():
    rng, covered = np.random.default_rng(3), 0
    for _trial in range(200):
        low, high = two_level_bootstrap(*World(runs=0.3, seeds=3).draw(rng), rng)
        covered += low <= 0 <= high
    assert covered < stats.binom.ppf(0.001, 200, 0.95)


@pytest.mark.parametrize(
    ("world", "paired"), [(World(), False), (World(runs=0.3, taste=0.5), False), (World(runs=0.3), True)]
)
def test_an_effect_of_the_minimum_detectable_size_is_found_in_about_80_of_100_comparisons(world, paired):
    # One comparison knows the spread roughly; the root mean square of many is what it is on average.
    pilots = comparisons(world, 150, paired=paired, seed=4)
    effect = math.sqrt(np.mean([each.minimum_detectable**2 for each in pilots]))
    found = comparisons(world, 250, effect=effect, paired=paired, seed=5)
    assert np.mean([each.p_value <= 0.05 for each in found]) == pytest.approx(0.8, abs=0.08)
