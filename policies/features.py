"""The inputs of the learned policies, as array expressions over signals.

Operators only: `x**0.5` is the same on NumPy and torch, a logarithm is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from policies.arrays import Array
from policies.signals import StepSignals


@dataclass(frozen=True)
class Feature:
    """One number per unit that a learned policy weighs.

    Attributes:
        needs: The measured signal that it is made of, or None if it comes for free.
        of: Its value; NaN where that signal is.
    """

    needs: str | None
    of: Callable[[StepSignals], Array]


FEATURES: Mapping[str, Feature] = MappingProxyType(
    {
        "age": Feature(None, lambda signals: signals.age),
        "sqrt_age": Feature(None, lambda signals: signals.age**0.5),
        "inverse_age": Feature(None, lambda signals: 1 / signals.age),
        "query_drift": Feature("query_similarity", lambda signals: 1 - signals.query_similarity),
        "step_drift": Feature("step_similarity", lambda signals: 1 - signals.step_similarity),
        "refresh_loss": Feature("refresh_mass", lambda signals: 1 - signals.refresh_mass),
        "refresh_churn": Feature("refresh_overlap", lambda signals: 1 - signals.refresh_overlap),
    }
)
