"""A limit to how old a set may grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals


@dataclass(frozen=True)
class MaxAge(StepPolicy):
    """Do what `policy` does, and run full at the latest when the set is `max_age` steps old.

    To keep a budget as well, put `BudgetConstrained` outside of this, never inside.

    Attributes:
        policy: Who decides before that.
        max_age: Steps, at least 1. 1 means always full.
    """

    policy: StepPolicy
    max_age: PerUnit
    kind: ClassVar[str] = "max_age"

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_age", as_per_unit("max_age", self.max_age, 1, float("inf")))

    @property
    def always_full(self) -> PerUnit:
        always = (np.asarray(self.policy.always_full) == 1) | (np.asarray(self.max_age) == 1)
        return as_per_unit("always_full", always, 0, 1)

    def decide(self, signals: StepSignals) -> Array:
        wanted = self.policy.decide(signals)
        too_old = signals.age >= signals.per_unit(self.max_age)
        signals.because("max_age", too_old & ~wanted)
        return wanted | too_old
