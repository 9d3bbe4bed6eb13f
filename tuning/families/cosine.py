"""Similarity of queries: one threshold for all units, or one for each."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import optuna

from policies import CosineThreshold, StepPolicy
from tuning.divide.calibration import calibrate
from tuning.divide.tuning_data import TuningData
from tuning.families.family import Family, divided, own_rates, within_division, within_rates


class SharedCosine(Family):
    """One threshold for all units, who divide the budget as the threshold itself divides it.

    Accounts are what each unit runs full in replay when all together run full as often as the budget allows; the
    threshold then asks for `asked` times that.
    """

    name: ClassVar[str] = "cosine_threshold"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        asked = trial.suggest_float("asked", 0.5, 2.0, log=True)
        check_every = trial.suggest_categorical("check_every", [1, 2, 5])

        def policy_at(thresholds: np.ndarray) -> CosineThreshold:
            return CosineThreshold(float(thresholds.flat[0]), check_every)

        even = calibrate(data.traces, policy_at, data.budget, -1, 1)
        rates = own_rates(policy_at(even), data)
        thresholds = calibrate(data.traces, policy_at, min(asked * data.budget, 1.0), -1, 1)
        return within_rates(policy_at(thresholds), rates)


class CosineProfile(Family):
    """An account for each unit by what refreshing it is worth, and a threshold that asks for `asked` times that."""

    name: ClassVar[str] = "cosine_profile"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        division = divided(trial, data)
        rates = division.rates
        asked = trial.suggest_float("asked", 0.5, 2.0, log=True)

        def policy_at(thresholds: np.ndarray) -> CosineThreshold:
            return CosineThreshold(thresholds.tolist())

        thresholds = calibrate(data.traces, policy_at, np.minimum(asked * rates, 1), -1, 1)
        # A unit that may always run full needs no reason to.
        thresholds = np.where(rates >= 1, 1.0, thresholds)
        return within_division(policy_at(thresholds), division)
