"""A family of policies: a search space and how to build a policy from a point of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
import optuna

from policies import BudgetConstrained, FixedStride, RefreshKeys, StepPolicy
from tuning.divide.tuning_data import Division, TuningData
from tuning.replay.run import replay_full_share

# Fractions of the golden ratio fill the unit interval evenly for any number of units.
_GOLDEN = 0.6180339887498949


class Family(ABC):
    """What Optuna searches; one instance serves all trials.

    Policies of every family are wrapped by `BudgetConstrained`, so none can exceed the budget anywhere.
    """

    name: ClassVar[str]

    @abstractmethod
    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        """Build the policy of a trial; the same parameters and data give the same policy."""


def within_rates(policy: StepPolicy, rates: np.ndarray) -> BudgetConstrained:
    """Give each unit an account of its own rate, `(layers, kv_heads)`."""
    return BudgetConstrained(policy, rates.tolist())


def divided(trial: optuna.trial.BaseTrial, data: TuningData) -> Division:
    """A division of the budget, with how sharply to trust unit costs and whether to refresh by keys alone searched."""
    sharpness = trial.suggest_float("sharpness", 0.5, 2.0)
    return data.divide(sharpness, keys_only=trial.suggest_categorical("keys_only", [False, True]))


def within_division(policy: StepPolicy, division: Division) -> BudgetConstrained:
    """Give each unit its account, and let those that should refresh by keys alone do so."""
    if division.keys_only.any():
        policy = RefreshKeys(policy, division.keys_only.astype(int).tolist())
    return within_rates(policy, division.rates)


def own_rates(policy: StepPolicy, data: TuningData) -> np.ndarray:
    """How a policy itself divides the budget: its full share per unit in replay, `(layers, kv_heads)`.

    Scaled down where even the laziest threshold runs full too often, as with a signal that is missing until the first
    full step.
    """
    rates = replay_full_share(data.traces, policy)
    mean = float(rates.mean())
    return rates * (data.budget / mean) if mean > data.budget else rates


def staggered(rates: np.ndarray) -> FixedStride:
    """Each unit on a clock of its own rate `(layers, kv_heads)`, all out of step with each other."""
    strides = 1 / rates
    phases = (np.arange(rates.size) * _GOLDEN % 1).reshape(rates.shape) * strides
    return FixedStride(strides.tolist(), phases.tolist())
