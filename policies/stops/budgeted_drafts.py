"""Rounds that last until a verification is worth what it may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.shown import shown
from policies.stops.base import DraftSignals, Outlook, StopRule, check_most_drafts


@dataclass(frozen=True)
class BudgetedDrafts(StopRule):
    """Verify once that is expected to give as many tokens as a budget of verifications asks of each.

    For where reading the whole cache is what must be rare, and drafts cost little. Tokens are expected by the drafts'
    own probabilities, so the budget holds as far as these tell the truth; a verification gives one token at least,
    whatever was drafted, and no rule can hold more on a text whose drafts are wrong.

    Attributes:
        budget: Verifications for a token of the text, in (0, 1].
        n_drafts: Most drafts of a round, from 1 to 256, enough for the tokens that the budget asks for.
    """

    budget: float
    n_drafts: int = 64
    kind: ClassVar[str] = "budgeted_drafts"

    def __post_init__(self) -> None:
        check_most_drafts(self.n_drafts)
        if not 0 < self.budget <= 1:
            raise ValueError(f"a budget is verifications for a token, in (0, 1], not {shown(self.budget)}.")
        if (self.n_drafts + 1) * self.budget < 1:
            raise ValueError(
                f"rounds of at most {self.n_drafts} drafts give {self.n_drafts + 1} tokens, and a budget of "
                f"{shown(self.budget)} asks for {1 / self.budget:g}."
            )

    @property
    def most_drafts(self) -> int:
        return self.n_drafts

    def decide(self, signals: DraftSignals, outlook: Outlook) -> np.ndarray:
        stops: np.ndarray = (signals.n_drafts >= self.n_drafts) | ~(outlook.n_tokens * self.budget < 1)
        return stops
