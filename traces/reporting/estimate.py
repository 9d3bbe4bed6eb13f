"""Means over prompts and how sure they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with a percentile bootstrap interval.

    Attributes:
        value: The mean.
        low: Lower end of the 95% interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Mean of one number per prompt; prompts are resampled, because steps of one prompt are not independent.

    Args:
        values: `(prompts,)`, at least one.
        n_resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    means = values[_resamples(len(values), n_resamples, seed)].mean(1)
    return Estimate(float(values.mean()), *_interval(means))


def bootstrap_ratio(values: np.ndarray, reference: np.ndarray, *, n_resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Ratio of two means over the same prompts, resampled together.

    Args:
        values: `(prompts,)`.
        reference: `(prompts,)`, above 0.
        n_resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    index = _resamples(len(values), n_resamples, seed)
    ratios = values[index].mean(1) / reference[index].mean(1)
    return Estimate(float(values.mean() / reference.mean()), *_interval(ratios))


def _resamples(n_prompts: int, n_resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, n_prompts, (n_resamples, n_prompts))


def _interval(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
