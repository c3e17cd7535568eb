"""Statistics of a few paired seeds: intervals, exact sign flips, correction for several arms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# So few seeds give no p below 0.05: of 2 ** 5 sign patterns, 2 are as extreme as the most extreme.
MIN_SEEDS = 6

_CONFIDENCE = 0.95
_NUM_RESAMPLES = 9999
# Up to 20 pairs every sign pattern is counted; of more, so many are drawn.
_MAX_FLIPS = 2**20
# Means that are nearer than this are equal, as scores have single precision: also those of patterns
# of signs.
_TIE = 1e-6


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        mean: The mean.
        low: Lower end of its 95 % interval; None where there is no interval.
        high: Upper end of it.
        num: Values.
        remark: Why there is no interval, or "".
    """

    mean: float
    low: float | None
    high: float | None
    num: int
    remark: str = ""


def mean_with_interval(values: Sequence[float]) -> Mean:
    """Return a mean with its 95 % interval: bias-corrected and accelerated bootstrap (BCa).

    Args:
        values: One per seed, at least one.

    References:
        Efron, Better Bootstrap Confidence Intervals, JASA 82, 1987; `scipy.stats.bootstrap`.
    """
    mean = float(np.mean(values))
    if len(values) < 2:
        return Mean(mean, None, None, len(values), "one seed has no interval")
    if np.ptp(values) <= _TIE:
        return Mean(mean, None, None, len(values), "all seeds give the same value: no interval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        interval = stats.bootstrap(
            (np.asarray(values, dtype=float),),
            np.mean,
            confidence_level=_CONFIDENCE,
            n_resamples=_NUM_RESAMPLES,
            method="BCa",
            rng=np.random.default_rng(0),
        ).confidence_interval
    if not np.isfinite([interval.low, interval.high]).all():
        return Mean(mean, None, None, len(values), "the bootstrap finds no interval")
    return Mean(mean, float(interval.low), float(interval.high), len(values))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p of paired differences whose signs would be random without an effect.

    Every pattern of signs is counted up to 20 differences; the smallest p of n of them is
    2 / 2 ** n.

    Args:
        differences: One per seed, at least one; of scores in [0, 1].
    """
    values = np.asarray(differences, dtype=float)
    is_exact = 2 ** len(values) <= _MAX_FLIPS
    generator = np.random.default_rng(0)
    sums = np.zeros(1 if is_exact else _MAX_FLIPS)
    for value in values:
        if is_exact:
            sums = np.concatenate([sums + value, sums - value])
        else:
            sums += value * generator.choice((-1.0, 1.0), size=len(sums))
    num_extreme = np.count_nonzero(np.abs(sums) >= abs(values.sum()) - _TIE * len(values))
    # What was seen is a pattern, too, which those that are drawn may lack.
    drawn = 0 if is_exact else 1
    return (int(num_extreme) + drawn) / (len(sums) + drawn)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number, in the same order.

    References:
        Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
