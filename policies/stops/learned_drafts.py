"""Rounds that last while drafts are likely to hold, by a chance that was learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.shown import shown
from policies.stops.base import DraftSignals, Outlook, StopRule, check_most_drafts, check_survival

# What a chance may be learned from, in numbers of moderate size; a NaN among them is a NaN of the chance.
FEATURES = ("n_drafts", "log_probability", "log_margin", "entropy")
# Of a margin or a probability, before its logarithm.
_LEAST = 1e-6


@dataclass(frozen=True)
class LearnedDrafts(StopRule):
    """Verify when the chance that all drafts of the round hold falls below a limit.

    The chance of one is a logistic of what drafting shows, learned from rounds whose outcome is known
    (`python -m tuning.optimize --exact`). A draft's own probability, which `ConfidentDrafts` multiplies, is another
    thing: full attention may choose the same token as unsurely.

    Attributes:
        features: Names from `FEATURES`, each once.
        weights: One per feature.
        bias: What is added.
        least_survival: The limit, in [0, 1].
        n_drafts: Most drafts of a round, from 1 to 256.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    least_survival: float
    n_drafts: int
    kind: ClassVar[str] = "learned_drafts"

    def __post_init__(self) -> None:
        check_most_drafts(self.n_drafts)
        check_survival(self.least_survival)
        for name in self.features:
            if name not in FEATURES:
                raise ValueError(f"unknown feature {shown(name)} of drafts: known are {', '.join(FEATURES)}.")
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features of drafts must differ from each other, unlike {shown(self.features)}.")
        if len(self.weights) != len(self.features):
            raise ValueError(f"{len(self.features)} features of drafts have {len(self.weights)} weights.")
        for number in (*self.weights, self.bias):
            if not math.isfinite(number):
                raise ValueError(f"weights and bias must be finite, not {shown(number)}.")

    @property
    def most_drafts(self) -> int:
        return self.n_drafts

    def acceptance(self, signals: DraftSignals) -> np.ndarray:
        score = np.full(len(signals.n_drafts), self.bias)
        for weight, column in zip(self.weights, draft_features(signals, self.features), strict=True):
            score = score + weight * column
        # What is beyond is 0 or 1 to all digits.
        chance: np.ndarray = 1 / (1 + np.exp(-np.clip(score, -700, 700)))
        return chance

    def decide(self, signals: DraftSignals, outlook: Outlook) -> np.ndarray:
        stops: np.ndarray = (signals.n_drafts >= self.n_drafts) | ~(outlook.survival >= self.least_survival)
        return stops


def draft_features(signals: DraftSignals, names: tuple[str, ...]) -> list[np.ndarray]:
    """Features by name, float64 `(rows,)` each."""
    known = {
        "n_drafts": signals.n_drafts,
        "log_probability": np.log(np.maximum(signals.probability, _LEAST)),
        "log_margin": np.log(np.maximum(signals.margin, _LEAST)),
        "entropy": signals.entropy,
    }
    return [known[name] for name in names]
