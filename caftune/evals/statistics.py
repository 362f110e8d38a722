"""Difference between two arms: its interval, its p-value, and corrections for several measures.

Runs (seeds) and examples are both random factors. Runs are few and examples many, so the runs' variance decides: an analysis
that counts examples only is invalid, however many there are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from caftune.errors import CaftuneError
from caftune.evals.requirements import required

Array = NDArray[np.float64]
LEVEL, POWER = 0.05, 0.8
_BLOCK = 2_000_000  # draws in memory at once: 32 MB


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`, in the unit of the scores."""

    difference: float  # mean of the treatment less mean of the baseline
    low: float  # lower end of the 95% interval of the difference
    high: float  # its upper end
    p_value: float  # two-sided, of equal means over all runs and examples
    effect_size: float  # Cohen's d_z over examples, each averaged over its seeds; infinite if all differ by the same
    minimum_detectable: float  # true difference that a test at level 0.05 finds with a power of 80%; 0 without a spread
    num_seeds: tuple[int, int]  # of the treatment and of the baseline
    num_examples: int  # of both


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Mean and half-width of the two-sided 95% Student-t interval over independent runs, one value each.

    Raises:
        CaftuneError: fewer than two values, or one that is not a finite number.
    """
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) < 2:
        raise CaftuneError(f"values must be of at least 2 runs, got shape {runs.shape}. Train with another seed.")
    if not np.isfinite(runs).all():
        raise CaftuneError(f"values must be finite numbers, got {runs.tolist()}. Repeat or name the run that failed.")
    reach = load_scipy()[0].t.ppf(1 - LEVEL / 2, len(runs) - 1)
    return float(runs.mean()), float(reach * runs.std(ddof=1) / math.sqrt(len(runs)))


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n-c, k) / C(n, k): the unbiased chance that one of k samples passes, if c of n samples passed.

    >>> pass_at_k(n=5, c=2, k=2)
    0.7

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.

    Raises:
        CaftuneError: not 0 <= c <= n, or not 1 <= k <= n.
    """
    if not 0 <= c <= n:
        raise CaftuneError(f"c must be between 0 and n = {n}, got {c}. Count the passes among the n samples.")
    if not 1 <= k <= n:
        raise CaftuneError(f"k must be between 1 and n = {n}, got {k}. Draw at least k samples of each problem.")
    sets = math.comb(n, k)
    return (sets - math.comb(n - c, k)) / sets


def holm(p_values: Sequence[float] | Array) -> Array:
    """Adjusted p-values, in the order given: those of at most 0.05 hold together, at that level for the whole family.

    The i-th smallest of m becomes the largest of (m - j + 1) * p_(j) over j <= i, at most 1, however the measures depend.

    Source: Holm 1979, Scandinavian Journal of Statistics 6(2).

    Raises:
        CaftuneError: a value outside [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise CaftuneError(
            f"p_values must be a list of numbers in [0, 1], got {values.tolist()}. Leave out what has none."
        )
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def compare(
    treatment: ArrayLike, baseline: ArrayLike, *, paired_seeds: bool = False, resamples: int = 10_000, seed: int = 0
) -> Comparison:
    """Two arms scored on the same examples by several runs each.

    The variance of the difference is V_runs + V_examples:

        V_runs      variance of the runs' means over the number of runs (independent seeds: the sum over both arms, Welch's
                    degrees of freedom). At least what the noise alone would give, as two runs can tie by luck.
        V_examples  variance of the examples' differences without the noise within runs (the residual of examples x seeds;
                    at least 0), over the number of examples.

    The interval bootstraps the examples' differences, shrunk to V_examples, and adds Student's t scaled by V_runs to every
    draw. The test does the same with random signs: an example's arms are swapped in all its runs at once. Both can disagree
    where p is very near 0.05. Runs are taken as normal, which a few runs cannot check; nothing is assumed of the examples.

    Simulated without a true difference (eight worlds, 100 examples, 2,000 comparisons each): five seeds reject at 0.05 in
    1.7 to 4.3% and cover 95.5 to 98.1%; three 0.8 to 5.1%, 94.6 to 99.2%; two 0.1 to 3.6%, 96.1 to 99.7%.

    Args:
        treatment: scores [seeds, examples], at least two of each; samples of one example by one run are averaged before.
            For an untrained model, give its row twice.
        baseline: scores [seeds, examples], the same examples in the same order.
        paired_seeds: run s of both arms shares its data and their order. It costs half of the degrees of freedom and pays
            where runs correlate by more than about 0.3. False is valid too, and wider.
        resamples: of the interval and of the test; the smallest p-value is 1 / (resamples + 1).
        seed: of the resampling.

    Source: two random factors, Clark 1973 (Journal of Verbal Learning and Verbal Behavior 12), less the residual that its
    min F' counts twice; bootstrap of crossed factors, Owen 2007 (Annals of Applied Statistics 1(2)), for the examples only.

    Raises:
        CaftuneError: arms that cannot be compared, or a score that is not finite.
    """
    first, second = _scores("treatment", treatment), _scores("baseline", baseline)
    _check_pair(first, second, paired_seeds)
    if resamples < 100:
        raise CaftuneError(f"resamples must be at least 100, got {resamples}. Ten thousand take under a second.")
    examples = first.mean(axis=0) - second.mean(axis=0)
    spread = _Spread.of(examples, [first - second] if paired_seeds else [first, second])
    difference = float(first.mean() - second.mean())
    rng = np.random.default_rng(seed)
    low, high = _bootstrap_interval(examples, spread, resamples, rng)
    return Comparison(
        difference=difference,
        low=difference + low,
        high=difference + high,
        p_value=_sign_flip(examples, spread, resamples, rng),
        effect_size=_standardised(difference, _deviation(examples)),
        minimum_detectable=_minimum_detectable(spread, len(examples)),
        num_seeds=(len(first), len(second)),
        num_examples=len(examples),
    )


def compare_runs(treatment: Sequence[float], baseline: Sequence[float]) -> Comparison:
    """Two arms by one number per run, for measures that are not means over examples (an F1 of a data set, a loss).

    Student's paired t test over the runs; it says nothing of other examples. `effect_size` is over runs, `num_examples` is 0,
    and without any spread p is 1.

    Raises:
        CaftuneError: fewer than two runs, arms of different length, or a value that is not finite.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (treatment, baseline))
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise CaftuneError(
            f"treatment and baseline must be one number for each of the same 2 or more runs, got {len(first)} and "
            f"{len(second)}. Leave out runs without a partner."
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise CaftuneError("treatment and baseline must be finite numbers. Repeat or name the run that failed.")
    differences = first - second
    count, deviation = len(differences), _deviation(differences)
    spread = _Spread(deviation**2 / count, count - 1, examples=0.0, shrinkage=0.0)
    difference, scale = float(differences.mean()), deviation / math.sqrt(count)
    reach = float(load_scipy()[0].t.ppf(1 - LEVEL / 2, count - 1)) * scale
    p_value = float(2 * load_scipy()[0].t.sf(abs(difference) / scale, count - 1)) if scale else 1.0
    return Comparison(
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p_value=p_value,
        effect_size=_standardised(difference, deviation),
        minimum_detectable=_minimum_detectable(spread, 2),
        num_seeds=(count, count),
        num_examples=0,
    )


@dataclass(frozen=True)
class _Spread:
    """The two parts of the difference's variance, and the degrees of freedom of the runs' part."""

    runs: float
    runs_freedom: float
    examples: float
    shrinkage: float  # an example's difference times this has no noise of runs in its variance

    @classmethod
    def of(cls, examples: Array, arms: list[Array]) -> "_Spread":
        parts = [float(arm.mean(axis=1).var(ddof=1)) / len(arm) for arm in arms]
        weights = sum(part**2 / (len(arm) - 1) for part, arm in zip(parts, arms, strict=True))
        freedom = sum(parts) ** 2 / weights if weights > 0 else 1.0
        seen, noise = _deviation(examples) ** 2, sum(_residual(arm) / len(arm) for arm in arms)
        stats = load_scipy()[0]
        reaches = stats.norm.ppf(1 - LEVEL / 2) / stats.t.ppf(1 - LEVEL / 2, freedom)
        runs = max(sum(parts), noise / len(examples) * float(reaches) ** 2)
        kept = max(seen - noise, 0.0)
        return cls(runs, freedom, kept / len(examples), math.sqrt(kept / seen) if seen > 0 else 0.0)


def _residual(arm: Array) -> float:
    """Mean square of what neither the run nor the example explains."""
    rest = arm - arm.mean(axis=1, keepdims=True) - arm.mean(axis=0, keepdims=True) + arm.mean()
    return float((rest**2).sum()) / ((arm.shape[0] - 1) * (arm.shape[1] - 1))


def _bootstrap_interval(
    examples: Array, spread: _Spread, resamples: int, rng: np.random.Generator
) -> tuple[float, float]:
    """Both ends, as distances from the difference."""
    count = len(examples)
    # A resample's variance is (n-1)/n of the unbiased one.
    deviations = (examples - examples.mean()) * spread.shrinkage * math.sqrt(count / (count - 1))
    drawn = [deviations[rng.integers(count, size=(rows, count))].mean(axis=1) for rows in _blocks(resamples, count)]
    # Equally spaced quantiles, not random draws: without a part of the examples it is the t interval.
    quantiles = load_scipy()[0].t.ppf((np.arange(resamples) + 0.5) / resamples, spread.runs_freedom)
    draws = np.concatenate(drawn) + math.sqrt(spread.runs) * quantiles
    low, high = np.quantile(draws, [LEVEL / 2, 1 - LEVEL / 2], method="hazen")
    return float(low), float(high)


def _sign_flip(examples: Array, spread: _Spread, resamples: int, rng: np.random.Generator) -> float:
    count = len(examples)
    shrunk = examples * spread.shrinkage
    signs = (rng.integers(2, size=(rows, count), dtype=np.int8) * 2 - 1 for rows in _blocks(resamples, count))
    flipped = np.concatenate([block @ shrunk for block in signs]) / count
    # The margin keeps a flip that equals what was seen from falling short of it by rounding.
    seen, scale, freedom = abs(float(examples.mean())) * (1 - 1e-12), math.sqrt(spread.runs), spread.runs_freedom
    if scale == 0:
        beyond = (np.abs(flipped) >= seen).astype(np.float64)
    else:
        beyond = sum(load_scipy()[0].t.sf((seen + side * flipped) / scale, freedom) for side in (-1, 1))
    return float((beyond.sum() + 1) / (resamples + 1))


def _blocks(resamples: int, count: int) -> list[int]:
    rows = max(1, _BLOCK // count)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _minimum_detectable(spread: _Spread, count: int) -> float:
    """The true difference that a two-sided t test finds with the power wanted; degrees of freedom after Satterthwaite."""
    variance = spread.runs + spread.examples
    if variance == 0:
        return 0.0
    freedom = variance**2 / (spread.runs**2 / spread.runs_freedom + spread.examples**2 / (count - 1))
    stats, special = load_scipy()
    reach = stats.t.ppf(1 - LEVEL / 2, freedom)
    # Less than a millionth of the noncentral t lies beyond the other end.
    return math.sqrt(variance) * float(special.nctdtrinc(freedom, 1 - POWER, reach))


def _deviation(examples: Array) -> float:
    deviation = float(examples.std(ddof=1))
    return deviation if deviation > 1e-9 * abs(examples.mean()) else 0.0  # less is rounding


def _standardised(difference: float, deviation: float) -> float:
    if deviation > 0:
        return difference / deviation
    return math.copysign(math.inf, difference) if difference else 0.0


def _scores(arm: str, values: ArrayLike) -> Array:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 2 or min(scores.shape) < 2:
        raise CaftuneError(
            f"{arm} must be scores [seeds, examples] with at least 2 of each, got shape {scores.shape}. Train with another "
            "seed: one run cannot tell the method from chance."
        )
    if not np.isfinite(scores).all():
        run, example = np.argwhere(~np.isfinite(scores))[0].tolist()
        raise CaftuneError(
            f"{arm} must be finite numbers, got {scores[run, example]} at seed {run}, example {example} (from 0). Give a "
            "failed answer the lowest score, or leave the example out of both arms."
        )
    return scores


def _check_pair(first: Array, second: Array, paired: bool) -> None:
    if first.shape[1] != second.shape[1]:
        raise CaftuneError(
            f"baseline must have the treatment's {first.shape[1]} examples, got {second.shape[1]}. Score both on the same."
        )
    if paired and len(first) != len(second):
        raise CaftuneError(
            f"baseline must have the treatment's {len(first)} seeds where seeds are paired, got {len(second)}. Leave out what "
            "has no partner, or set paired_seeds to False."
        )


def load_scipy() -> tuple[Any, Any]:
    """scipy.stats and scipy.special.

    Raises:
        CaftuneError: scipy is not installed.
    """
    with required("scipy", "statistics"):
        from scipy import special, stats
    return stats, special
