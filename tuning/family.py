"""A family of policies: a search space and how to build a policy from a point of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import optuna

from policies import BudgetConstrained, FixedStride, StepPolicy
from tuning.tuning_data import TuningData

# Fractions of the golden ratio fill the unit interval evenly for any number of units.
_GOLDEN = 0.6180339887498949
# A bucket that is a hair too small would refuse a step that falls due exactly.
_ROUNDING = 1e-9


class Family(ABC):
    """What Optuna searches; one instance serves all trials.

    Policies of every family are wrapped by `BudgetConstrained`, so none can exceed the budget anywhere.
    """

    name: ClassVar[str]

    @abstractmethod
    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        """Build the policy of a trial; the same parameters and data give the same policy."""


def within_budget(policy: StepPolicy, budget: float) -> BudgetConstrained:
    """Give every unit the same bucket."""
    return BudgetConstrained(policy, min(1.0, budget * (1 + _ROUNDING)))


def within_rates(policy: StepPolicy, rates: np.ndarray) -> BudgetConstrained:
    """Give each unit a bucket of its own rate, `(layers, kv_heads)`."""
    return BudgetConstrained(policy, np.minimum(rates * (1 + _ROUNDING), 1).tolist())


def staggered(rates: np.ndarray) -> FixedStride:
    """Each unit on a clock of its own rate `(layers, kv_heads)`, all out of step with each other."""
    strides = 1 / rates
    phases = (np.arange(rates.size) * _GOLDEN % 1).reshape(rates.shape) * strides
    return FixedStride(strides.tolist(), phases.tolist())
