"""Upper bounds on what a policy loses on average, from what it lost on some prompts: true at any number of them.

The prompts are independent of each other. They need not be alike: where kinds of text are sampled one by one, the
bounds are on the mean over the kinds, in the proportions that they have among the prompts.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binomtest

_N_HALVINGS = 60
_MOST_PROMPTS = 10**9


def mean_upper_bound(values: np.ndarray, cap: float, confidence: float) -> float:
    """Upper confidence bound on the mean loss of a prompt, counted up to `cap`: on E[min(X, cap)].

    One-sided and valid at every number of prompts, whatever the distribution: the mean exceeds the bound with a
    probability of at most `1 - confidence`.

    It is the betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686). Somebody bets that the mean of X, scaled to
    [0, 1], is below m: a stake of s, at most 1 / (1 - m), multiplies the capital by 1 - s (X - m) at a prompt, which
    is 1 or less in expectation if the mean is m or more. So the final capital reaches 1 / (1 - confidence) with a
    probability of at most 1 - confidence (Markov), and the bound is the least m at which it did. A third of the
    capital each goes to three constant stakes (as in their diversified Kelly): the highest, which is best where losses
    vary little; sqrt(8 log(1 / (1 - confidence)) / prompts), which is best where they vary as much as they can
    (Hoeffding's); and halfway between.

    Deviation: Learn then Test (arXiv 2110.01052) takes the same paper's predictable plug-in, whose bets follow the
    prompts seen so far, and the most that the capital ever was. That needs prompts in random order, and here they are
    so many of each kind, sorted: with five of each of six unlike kinds the plug-in at 90% missed the mean in a third of
    draws. With a constant stake the expected capital is the product over prompts of 1 - s (mean of X_i - m), by the
    inequality of means at most 1 whenever the mean over all of them is m or more, in any order.

    Args:
        values: `(prompts,)`, what each lost, at least 0.
        cap: Above 0, in the unit of `values`.
        confidence: In (0, 1).

    Returns:
        In (0, cap]; cap where every prompt reaches it.

    Raises:
        ValueError: If there are no prompts, or a value is negative or no number.
    """
    scaled = _scaled(values, cap)
    low, high = float(scaled.mean()), 1.0
    for _ in range(_N_HALVINGS):
        middle = (low + high) / 2
        if middle < 1 and _is_refuted(middle, scaled, len(scaled), confidence):
            high = middle
        else:
            low = middle
    return cap * high


def share_upper_bound(n_exceeding: int, n_prompts: int, confidence: float) -> float:
    """Upper confidence bound on the share of prompts that exceed something, after Clopper and Pearson: exact.

    For prompts of several kinds it holds too, as exceeding then varies less (Hoeffding 1956), at a confidence of 0.75
    or more and as long as at least two prompts do not exceed.

    Args:
        n_exceeding: How many did.
        n_prompts: Out of how many, at least 1.
        confidence: In (0, 1).

    Returns:
        In (0, 1].

    Raises:
        ValueError: If `n_exceeding` is not in [0, n_prompts].
    """
    if not 0 <= n_exceeding <= n_prompts or n_prompts < 1:
        raise ValueError(f"{n_exceeding} of {n_prompts} prompts is no share.")
    interval = binomtest(n_exceeding, n_prompts, alternative="less").proportion_ci(confidence, method="exact")
    return float(interval.high)


def conformal_risk(values: np.ndarray, cap: float) -> float:
    """What conformal risk control (arXiv 2208.02814) compares with a limit: n / (n + 1) mean + cap / (n + 1).

    The cheapest policy whose risk, like that of all more expensive ones, is within a limit loses no more than the
    limit on the next prompt: in expectation over the prompts measured and the next one, which are exchangeable, with
    no confidence, and if losses are monotone. Monotone means: on every single prompt, a cheaper policy loses at least
    as much as a more expensive one. At a confidence of 1 - 1/e or more it is at most `mean_upper_bound`, so what was
    chosen by that has this guarantee too.

    Args:
        values: `(prompts,)`, what each lost, at least 0; counted up to `cap`.
        cap: Above 0, in the unit of `values`.

    Raises:
        ValueError: If there are no prompts, or a value is negative or no number.
    """
    scaled = _scaled(values, cap)
    return cap * float(scaled.sum() + 1) / (len(scaled) + 1)


def fewest_prompts(limit: float, cap: float, confidence: float, values: np.ndarray | None = None) -> int | None:
    """Fewest prompts that give a `mean_upper_bound` within a limit, if they lose as `values` do.

    Args:
        limit: In (0, cap).
        cap: Above 0.
        confidence: In (0, 1).
        values: `(prompts,)`, what prompts lose, in the same proportions at any number; None: none loses anything,
            which is the fewest that there can be.

    Returns:
        At least 1; None if no number would do, or only one above a thousand million.
    """
    scaled = _scaled(np.zeros(1) if values is None else values, cap)
    mean = limit / cap
    if scaled.mean() >= mean:
        return None
    # Once the capital suffices it only grows: there are more prompts, and a smaller stake earns more for its size.
    high = 1
    while not _is_refuted(mean, scaled, high, confidence):
        high *= 2
        if high > _MOST_PROMPTS:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _is_refuted(mean, scaled, middle, confidence) else (middle, high)
    return high


def _is_refuted(mean: float, scaled: np.ndarray, n_prompts: int, confidence: float) -> bool:
    """Whether betting against a mean in [0, 1) has won enough after so many prompts, in the proportions of `scaled`."""
    wanted = -math.log1p(-confidence)
    # As shares of the highest stake, 1 / (1 - mean).
    careful = min(math.sqrt(8 * wanted / n_prompts) * (1 - mean), 1.0)
    stakes = np.array([1.0, (1 + careful) / 2, careful])
    # The logarithm is -inf where a prompt takes all.
    with np.errstate(divide="ignore"):
        growth = np.log1p(stakes[:, None] * (mean - scaled) / (1 - mean)).mean(1)
    return bool(np.logaddexp.reduce(n_prompts * growth) - math.log(len(stakes)) >= wanted)


def _scaled(values: np.ndarray, cap: float) -> np.ndarray:
    losses = np.asarray(values, dtype=np.float64)
    if not losses.size:
        raise ValueError("there is no prompt to bound anything by.")
    # Not `losses < 0`: what is no number bounds nothing.
    if not (losses >= 0).all():
        raise ValueError(f"a loss is at least 0, not {losses[~(losses >= 0)][0]:g}.")
    return np.minimum(losses, cap) / cap
