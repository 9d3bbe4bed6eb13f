"""A budget that follows what audits find, so that the divergence from full attention holds a limit."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from policies import AlwaysFull, BudgetConstrained, StepPolicy

# How strongly one window's error, in limits, moves the logarithm of the budget, up and down. Below what a text needs,
# its divergence is ten times as large with a budget a fifth smaller, and the output never makes good for it.
_GAIN_UP, _GAIN_DOWN = 0.5, 0.1
_MOST_ERROR = 2.0
# Of the budget asked for; below it there is nothing to save.
_LEAST_FACTOR = 1 / 16


class GovernedWindow(NamedTuple):
    """The steps from one audit to the next.

    Attributes:
        budget: Share of unit-steps that could run full, in [0, 1]; 1 where full attention had to help out.
        kl: What the audit found, mean over rows and steps, in nats; NaN if nothing of it is finite.
    """

    budget: float
    kl: float


class Governor:
    """Raises a budget where audits find more than a limit, lowers it where they find less.

    An integral control of the logarithm of the budget, as online conformal prediction controls its rate of misses
    (arXiv 2106.00170, 2307.16895); unlike there, the error is that of a mean and not a count, and has a range. A window
    that is above the limit, in an output whose mean so far is above it, is followed by full ones until the mean is
    within it again: so an output ends above its limit by what its last windows added, and no more. What is done follows
    from what audits found, and from nothing else. Every output begins with the budget of the policy.

    Args:
        policy: With the budget that is steered, outermost.
        limit_kl: Nats, above 0.
        most: Largest budget of all units together, in [0, 1]; None for the policy's own.

    Raises:
        ValueError: If the policy has no budget, or one of the others is out of range.
    """

    def __init__(self, policy: StepPolicy, limit_kl: float, most: float | None = None) -> None:
        if not isinstance(policy, BudgetConstrained):
            raise ValueError(
                f"govern_kl steers a budget, and the policy {policy.kind!r} has none: put BudgetConstrained around it."
            )
        if not 0 < limit_kl < math.inf:
            raise ValueError(f"govern_kl must be a number of nats above 0, not {limit_kl}.")
        asked = policy.mean_budget
        most = asked if most is None else most
        if not 0 < asked <= most <= 1:
            raise ValueError(f"most must be a share from the policy's budget, {asked:.3g}, to 1, not {most}.")
        self._policy, self._limit_kl, self._most_factor = policy, limit_kl, most / asked
        self.begin()

    def begin(self) -> None:
        """Begin another output."""
        self._factor, self._helps_out = 1.0, False
        self._kl_sum, self._n = 0.0, 0

    @property
    def policy(self) -> StepPolicy:
        """Who decides until the next audit."""
        return AlwaysFull() if self._helps_out else self._policy.scaled(self._factor)

    def learn(self, kl: np.ndarray) -> GovernedWindow:
        """Take in an audit of the steps that `policy` decided.

        Args:
            kl: Of all rows and steps, in nats; what is not finite, as of a row whose numbers are not, has no say.
        """
        policy, known = self.policy, kl[np.isfinite(kl)]
        budget = policy.mean_budget if isinstance(policy, BudgetConstrained) else 1.0
        if not known.size:
            return GovernedWindow(budget, float("nan"))
        found = float(known.mean(dtype=np.float64))
        self._kl_sum += found * known.size
        self._n += known.size
        # What full attention adds says nothing of the budget.
        if not self._helps_out:
            error = min(found / self._limit_kl - 1, _MOST_ERROR)
            gain = _GAIN_UP if error > 0 else _GAIN_DOWN
            self._factor = min(max(self._factor * math.exp(gain * error), _LEAST_FACTOR), self._most_factor)
        is_above = self._kl_sum / self._n > self._limit_kl
        self._helps_out = is_above and (self._helps_out or found > self._limit_kl)
        return GovernedWindow(budget, found)
