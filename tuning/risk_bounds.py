"""Upper bounds on what a policy loses on average, from what it lost on some prompts: true at any number of them.

The prompts are independent of each other. They need not be alike: where kinds of text are sampled one by one, the
bounds are on the mean over the kinds, in the proportions that they have among the prompts.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import betaincinv

# Half of the capital is bet all in, which is best where losses vary little; the rest is spread evenly, for where they
# vary much. More bets change no bound by a hundredth of the cap.
_BETS = np.arange(1, 21) / 20
_LOG_WEIGHTS = np.log(np.where(_BETS == 1, 0.5, 0) + 0.5 / len(_BETS))

_N_HALVINGS = 60


def mean_upper_bound(values: np.ndarray, cap: float, confidence: float) -> float:
    """Upper confidence bound on the mean loss of a prompt, counted up to `cap`: on E[min(X, cap)].

    One-sided and valid at every number of prompts, whatever the distribution: the mean exceeds the bound with a
    probability of at most `1 - confidence`.

    It is the betting bound of Waudby-Smith and Ramdas (arXiv 2010.09686). Somebody bets that the mean of X, scaled to
    [0, 1], is below m, and stakes a share b of what can be staked: a prompt multiplies the capital by
    1 - b (X - m) / (1 - m), which is 1 or less in expectation if the mean is m or more. So the final capital reaches
    1 / (1 - confidence) with a probability of at most 1 - confidence (Markov), and the bound is the least m at which
    it did. Bets are constant and several at once (their diversified Kelly), and the capital is counted at the end.

    Deviation: Learn then Test (arXiv 2110.01052) takes the same paper's predictable plug-in, whose bets follow the
    prompts seen so far, and the most that the capital ever was. That needs prompts in random order. Here they are so
    many of each kind, sorted; with 30 of six kinds the plug-in at 90% missed the mean in 34% of draws. With a constant
    bet the expected capital is the product over prompts of 1 - b (mean of X_i - m) / (1 - m), by the inequality of
    means at most 1 whenever the mean over prompts is m or more; and no order has a part in it.

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
        if middle < 1 and _log_capital(scaled, middle) >= -math.log1p(-confidence):
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
    return 1.0 if n_exceeding == n_prompts else float(betaincinv(n_exceeding + 1, n_prompts - n_exceeding, confidence))


def conformal_risk(values: np.ndarray, cap: float) -> float:
    """What conformal risk control (arXiv 2208.02814) compares with a limit: n / (n + 1) mean + cap / (n + 1).

    The cheapest policy whose risk, like that of all more expensive ones, is within a limit loses no more than the
    limit on the next prompt: in expectation over the prompts measured and the next one, with no confidence, and if
    losses are monotone. Monotone means: on every single prompt, a cheaper policy loses at least as much as a more
    expensive one. At a confidence of 1 - 1/e or more it is at most `mean_upper_bound`, so what was chosen by that
    has this guarantee too.

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
        At least 1; None if no number would do.
    """
    scaled = _scaled(np.zeros(1) if values is None else values, cap)
    growth = _log_growth(scaled, limit / cap).mean(1)
    wanted = -math.log1p(-confidence)

    def suffices(n_prompts: int) -> bool:
        return bool(np.logaddexp.reduce(_LOG_WEIGHTS + n_prompts * growth) >= wanted)

    if growth.max() <= 0:
        return None
    # The capital is convex in the number of prompts and starts below what is wanted: it gets there once.
    high = 1
    while not suffices(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _log_capital(scaled: np.ndarray, mean: float) -> float:
    """Logarithm of what 1 has become after all prompts, by betting against a mean in [0, 1)."""
    return float(np.logaddexp.reduce(_LOG_WEIGHTS + _log_growth(scaled, mean).sum(1)))


def _log_growth(scaled: np.ndarray, mean: float) -> np.ndarray:
    """Logarithms `(bets, prompts)` of what each prompt multiplies each bet by; -inf where all is lost."""
    with np.errstate(divide="ignore"):
        growth: np.ndarray = np.log1p(_BETS[:, None] * (mean - scaled) / (1 - mean))
    return growth


def _scaled(values: np.ndarray, cap: float) -> np.ndarray:
    losses = np.asarray(values, dtype=np.float64)
    if not losses.size:
        raise ValueError("there is no prompt to bound anything by.")
    # Not `losses < 0`: what is no number bounds nothing.
    if not (losses >= 0).all():
        raise ValueError(f"a loss is at least 0, not {losses[~(losses >= 0)][0]:g}.")
    return np.minimum(losses, cap) / cap
