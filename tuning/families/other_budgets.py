"""A family's policy at budgets that the family was not searched at."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from optuna.trial import FixedTrial

from policies import FixedStride, StepPolicy
from tuning.divide.allocation import STRIDES
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.families.stride import SharedStride


def at_budget(family: str, parameters: Mapping[str, Any], data: TuningData, budget: float) -> StepPolicy:
    """The policy of a family at another budget than that of `data`, with the same parameters.

    Args:
        family: Its name.
        parameters: What the search chose at the budget of `data`.
        data: What the family was searched on.
        budget: In (0, 1].
    """
    if family == SharedStride.name:
        # Steps between neighbouring units are steps of a stride: they shrink and grow with it.
        step_apart = int(parameters["phase_between_units"] * data.budget / budget)
        parameters = {"phase_between_units": min(step_apart, math.ceil(1 / budget) - 1)}
    return FAMILIES[family].suggest(FixedTrial(dict(parameters)), dataclasses.replace(data, budget=budget))


def references(family: str, parameters: Mapping[str, Any], data: TuningData) -> dict[str, StepPolicy]:
    """Fixed strides, and a family with the same parameters, at half and at twice the budget, by label."""
    policies: dict[str, StepPolicy] = {}
    for budget in (data.budget / 2, data.budget * 2):
        if budget > 1:
            continue
        policies[stride_label(budget)] = FixedStride(1 / budget)
        # Below the longest stride there is nothing to allocate.
        if family != SharedStride.name and budget >= 1 / STRIDES[-1]:
            policies[budget_label(family, budget)] = at_budget(family, parameters, data, budget)
    return policies


def stride_label(budget: float) -> str:
    """What to call all units full at once, as often as a budget allows."""
    return f"fixed stride {1 / budget:.4g}"


def budget_label(family: str, budget: float) -> str:
    """What to call a family at another budget than the one searched."""
    return f"{family} at {budget:g}"
