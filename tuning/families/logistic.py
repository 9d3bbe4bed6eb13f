"""A logistic model of the loss, with the budget divided by itself or by allocation."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import optuna

from policies import LearnedLogistic, StepPolicy
from tuning.divide.calibration import calibrate
from tuning.divide.tuning_data import TuningData
from tuning.families.family import Family, divided, own_rates, within_division, within_rates
from tuning.families.fit import DEFAULT_FEATURES, fit_logistic

# Log-odds far beyond any that a fit produces.
_FAR = 100.0


class SharedLogistic(Family):
    """One model for all units, who divide the budget as the model itself divides it."""

    name: ClassVar[str] = "learned_logistic"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        fitted = _fitted(trial, data)
        asked = trial.suggest_float("asked", 0.5, 2.0, log=True)

        def policy_at(shift: np.ndarray) -> LearnedLogistic:
            return shifted(fitted, np.full_like(shift, shift.flat[0]))

        even = calibrate(data.traces, policy_at, data.budget, -_FAR, _FAR)
        rates = own_rates(policy_at(even), data)
        shift = calibrate(data.traces, policy_at, min(asked * data.budget, 1.0), -_FAR, _FAR)
        return within_rates(policy_at(shift), rates)


class LogisticProfile(Family):
    """An account for each unit by what refreshing it is worth, and an intercept that asks for `asked` times that."""

    name: ClassVar[str] = "logistic_profile"

    def suggest(self, trial: optuna.trial.BaseTrial, data: TuningData) -> StepPolicy:
        fitted = _fitted(trial, data)
        division = divided(trial, data)
        rates = division.rates
        asked = trial.suggest_float("asked", 0.5, 2.0, log=True)

        def policy_at(shift: np.ndarray) -> LearnedLogistic:
            return shifted(fitted, shift)

        shift = calibrate(data.traces, policy_at, np.minimum(asked * rates, 1), -_FAR, _FAR)
        shift = np.where(rates >= 1, _FAR, shift)
        return within_division(policy_at(shift), division)


def _fitted(trial: optuna.trial.BaseTrial, data: TuningData) -> LearnedLogistic:
    extra = ("refresh_churn",) if trial.suggest_categorical("refresh_churn", [False, True]) else ()
    return fit_logistic(
        data.traces,
        data.unit_cost,
        min(trial.suggest_float("positive_share", 0.03, 0.4, log=True), 0.5),
        features=DEFAULT_FEATURES + extra,
        regularisation=trial.suggest_float("regularisation", 1e-3, 10.0, log=True),
    )


def shifted(policy: LearnedLogistic, shift: np.ndarray | float) -> LearnedLogistic:
    """The same with its log-odds higher by a number, or by one for each unit, `(layers, kv_heads)`."""
    return dataclasses.replace(policy, intercept=(np.asarray(policy.intercept) + shift).tolist())
