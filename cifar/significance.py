"""How sure a figure is: the spread of repetitions, and tests of differences. SciPy does the sums."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.05  # below which a p value is called significant


def spread(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Mean, sample standard deviation and the mean's 95% interval (Student 1908) of two values or more.

    least, most: what the mean can be at all, where the interval ends in any case.
    """
    from scipy.stats import t

    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, len(values) - 1)) * deviation / len(values) ** 0.5
    return {
        "mean": mean,
        "standard_deviation": deviation,
        "interval_95": [max(mean - half, least), min(mean + half, most)],
    }


def mcnemar(only_first: int, only_second: int) -> float:
    """The p value of the exact test that two networks are equally often right (McNemar 1947).

    only_first, only_second: the images on which one alone is right; the others say nothing.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_first, only_first + only_second).pvalue) if only_first + only_second else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values corrected for being many (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    factors = np.arange(len(p_values), 0, -1)
    corrected[order] = np.maximum.accumulate(factors * np.array(p_values)[order]).clip(max=1)
    return corrected.tolist()
