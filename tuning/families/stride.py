"""Clocks: one for all units, or one for each."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import optuna

from policies import BudgetConstrained, FixedStride, StepPolicy
from tuning.divide.tuning_data import TuningData
from tuning.families.family import Family, divided, staggered, within_division


class SharedStride(Family):
    """One stride for all units; the search may put neighbouring units out of step."""

    name: ClassVar[str] = "fixed_stride"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        stride = 1 / data.budget
        step_apart = trial.suggest_int("phase_between_units", 0, max(math.ceil(stride) - 1, 0))
        phases = np.arange(math.prod(data.traces.units)) * step_apart % stride
        return BudgetConstrained(FixedStride(stride, phases.reshape(data.traces.units).tolist()), data.budget)


class StrideProfile(Family):
    """A stride for each unit, by what refreshing it is worth."""

    name: ClassVar[str] = "stride_profile"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        division = divided(trial, data)
        return within_division(staggered(division.rates), division)
