"""Full attention when a logistic model expects too much loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.features import FEATURES
from policies.per_unit import PerUnit, as_per_unit
from policies.shown import shown
from policies.signals import StepSignals


@dataclass(frozen=True)
class LearnedLogistic(StepPolicy):
    """Run full when sigmoid(intercept + sum of weight x feature) reaches `threshold`.

    The sigmoid is never evaluated: the sum is compared with the threshold's log-odds.

    Attributes:
        features: Names out of `policies.features.FEATURES`, each at most once.
        weights: One weight per feature, each one number or one per unit, for the features as they are (a scaler used
            in fitting is folded in).
        intercept: Log-odds with all features at zero.
        threshold: Probability in (0, 1).
    """

    features: tuple[str, ...]
    weights: tuple[PerUnit, ...]
    intercept: PerUnit
    threshold: float = 0.5
    kind: ClassVar[str] = "learned_logistic"

    def __post_init__(self) -> None:
        infinity = float("inf")
        object.__setattr__(self, "features", tuple(self.features))
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown:
            raise ValueError(f"unknown feature {shown(unknown[0])}: known are {', '.join(FEATURES)}.")
        if len(set(self.features)) < len(self.features) or len(self.weights) != len(self.features):
            raise ValueError(
                f"each feature needs exactly one weight, not features {shown(list(self.features))} "
                f"with {len(self.weights)} weights."
            )
        weights = tuple(
            as_per_unit(f"weight of {name}", weight, -infinity, infinity)
            for name, weight in zip(self.features, self.weights, strict=True)
        )
        object.__setattr__(self, "weights", weights)
        intercept = as_per_unit("intercept", self.intercept, -infinity, infinity)
        object.__setattr__(self, "intercept", intercept)
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be a probability in (0, 1), not {shown(self.threshold)}.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(need for name in self.features if (need := FEATURES[name].needs))

    def log_odds(self, signals: StepSignals) -> Array:
        """Log-odds, over units, that a recycled step now loses too much; NaN where a feature is."""
        total = signals.per_unit(self.intercept) + 0 * signals.age
        for name, weight in zip(self.features, self.weights, strict=True):
            total = total + signals.per_unit(weight) * FEATURES[name].of(signals)
        return total

    def decide(self, signals: StepSignals) -> Array:
        limit = math.log(self.threshold / (1 - self.threshold))
        return ~(self.log_odds(signals) < limit)
