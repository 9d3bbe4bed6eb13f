"""A hard limit to how often units run full."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals

_ROUNDING = 1e-12


@dataclass(frozen=True)
class BudgetConstrained(StepPolicy):
    """Do what `policy` wants as far as each unit's account allows.

    After n steps a unit has run full at most `budget * n + burst` times, for every n. Accounts are per unit and per
    row, so no unit waits for another, and in total full unit-steps stay below mean(budget) x unit-steps + sum(burst).
    The guarantee covers decode steps; prefill always runs full and does not count. What a unit saves it may spend
    later, all at once. The guarantee is that of the outermost policy: wrap this one in nothing that decides.

    Accounts count full decisions, full steps and keys-only refreshes alike: for the same reading, a unit that refreshes
    by its keys alone may have twice the budget. Only `mean_budget` weighs them, if `RefreshKeys` is inside of this; it
    may be outside as well, and then `mean_budget` takes every refresh for a full step and is too high.

    Attributes:
        policy: Who asks for full steps.
        budget: Share of steps in [0, 1]; per unit, the mean over units, with keys-only refreshes counted half, is the
            budget of the whole.
        burst: Full steps that a unit may take ahead of its budget, at least 0. With 0, the first full step is allowed
            once `budget * n` reaches 1.
    """

    policy: StepPolicy
    budget: PerUnit
    burst: PerUnit = 0
    kind: ClassVar[str] = "budget_constrained"

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", as_per_unit("budget", self.budget, 0, 1))
        object.__setattr__(self, "burst", as_per_unit("burst", self.burst, 0, float("inf")))

    @property
    def always_full(self) -> PerUnit:
        always = (np.asarray(self.policy.always_full) == 1) & (np.asarray(self.budget) == 1)
        return as_per_unit("always_full", always, 0, 1)

    @property
    def highest_rate(self) -> PerUnit:
        least = np.minimum(np.asarray(self.budget), np.asarray(self.policy.highest_rate))
        return as_per_unit("highest_rate", least, 0, 1)

    @property
    def mean_budget(self) -> float:
        """Budget of all units together, in [0, 1]: what the full share may reach, keys-only refreshes counted half."""
        return float(np.mean(np.asarray(self.budget) * np.asarray(self.policy.full_cost)))

    def scaled(self, factor: float) -> BudgetConstrained:
        """The same with every budget times a factor, at most 1."""
        budget = np.minimum(np.asarray(self.budget) * factor, 1)
        return replace(self, budget=as_per_unit("budget", budget, 0, 1))

    def decide(self, signals: StepSignals) -> Array:
        wanted = self.policy.decide(signals)
        allowance = signals.per_unit(self.budget) * (signals.step + 1)
        # A budget of 1/49 times 49 is a hair below 1: without slack a clock of stride 49 would lose its turns.
        affordable = signals.n_full + 1 <= (allowance + signals.per_unit(self.burst)) * (1 + _ROUNDING)
        signals.because("budget", wanted & ~affordable)
        return wanted & affordable
