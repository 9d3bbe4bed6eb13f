"""Rounds that last while the draft is sure of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.stops.base import DraftSignals, Outlook, StopRule, check_most_drafts, check_survival


@dataclass(frozen=True)
class ConfidentDrafts(StopRule):
    """Verify when the product of the drafts' own probabilities falls below a limit.

    What a further draft is worth is how likely it is ever looked at; its price is a step and a query more. So the limit
    is the tokens that this price would buy elsewhere.

    Attributes:
        least_survival: The limit, in [0, 1].
        n_drafts: Most drafts of a round, from 1 to 256.
    """

    least_survival: float = 0.3
    n_drafts: int = 16
    kind: ClassVar[str] = "confident_drafts"

    def __post_init__(self) -> None:
        check_most_drafts(self.n_drafts)
        check_survival(self.least_survival)

    @property
    def most_drafts(self) -> int:
        return self.n_drafts

    def decide(self, signals: DraftSignals, outlook: Outlook) -> np.ndarray:
        stops: np.ndarray = (signals.n_drafts >= self.n_drafts) | ~(outlook.survival >= self.least_survival)
        return stops
