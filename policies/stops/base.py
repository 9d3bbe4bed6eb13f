"""When a round of drafts ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from policies.shown import shown

# Drafts that are verified at once: their logits are all alive, and no model keeps guessing right for so long.
MOST_DRAFTS = 256


@dataclass(frozen=True)
class DraftSignals:
    """What is known of the latest drafted token of some rows; arrays are float64 `(rows,)`.

    Attributes:
        n_drafts: Tokens drafted in this round, this one included.
        probability: Of the drafted token, in the distribution that it is the most likely of.
        margin: How far its logit is above the second, in nats, at least 0.
        entropy: Of that distribution, in nats.
    """

    n_drafts: np.ndarray
    probability: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray


class Outlook(NamedTuple):
    """What becomes of a round if it is verified now, as far as the rule can tell; arrays are float64 `(rows,)`.

    Attributes:
        survival: Chance that all drafts hold: the product of their `acceptance`.
        n_tokens: Tokens of the text that a verification gives in expectation: one, and the sum of the survivals so far.
    """

    survival: np.ndarray
    n_tokens: np.ndarray

    @classmethod
    def before_drafts(cls, n_rows: int) -> Outlook:
        """Of rounds that begin."""
        return cls(np.ones(n_rows), np.ones(n_rows))

    def after(self, acceptance: np.ndarray) -> Outlook:
        """With a draft more, that full attention chooses with these chances."""
        survival = self.survival * acceptance
        return Outlook(survival, self.n_tokens + survival)


class StopRule(ABC):
    """Decides for each row, after each draft, whether to verify what was drafted.

    A rule is a frozen dataclass of numbers and names. It tells how likely full attention is to choose a drafted token
    too, given that it chose all before it; what that makes of a round, its `Outlook`, is kept for it.
    """

    # Its name.
    kind: ClassVar[str]
    # Whether it looks at the drafts' distributions. A rule that counts alone is shown NaN for all else, and lets a
    # device draft on without being waited for.
    reads_distributions: ClassVar[bool] = True

    @property
    @abstractmethod
    def most_drafts(self) -> int:
        """Tokens that a round drafts at most, at least 1."""

    def acceptance(self, signals: DraftSignals) -> np.ndarray:
        """Probability `(rows,)` that full attention chooses the token too; by default that of the draft itself."""
        return signals.probability

    @abstractmethod
    def decide(self, signals: DraftSignals, outlook: Outlook) -> np.ndarray:
        """Which rows stop.

        Args:
            signals: Of the latest drafts.
            outlook: Of the round, the latest draft included.

        Returns:
            bool `(rows,)`. A rule that reads distributions stops a row whose numbers are NaN.
        """


def check_most_drafts(n_drafts: int) -> None:
    """Refuse a length that no round can have.

    Raises:
        ValueError: With the number.
    """
    if not isinstance(n_drafts, int) or isinstance(n_drafts, bool) or not 1 <= n_drafts <= MOST_DRAFTS:
        raise ValueError(f"a round drafts from 1 to {MOST_DRAFTS} tokens, not {shown(n_drafts)}.")


def check_survival(least_survival: float) -> None:
    """Refuse what is no probability.

    Raises:
        ValueError: With the number.
    """
    if not 0 <= least_survival <= 1:
        raise ValueError(f"least_survival must be a probability in [0, 1], not {shown(least_survival)}.")
