"""What was seen of exact decoding: rounds of drafts and what became of them, what rounds take, and what they gain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies.stops.base import DraftSignals


@dataclass(frozen=True)
class DraftedRounds:
    """Rounds of one number of drafts.

    Attributes:
        signals: Arrays float64 `(rounds, drafts)`.
        n_held: int64 `(rounds,)`: how many drafts hold, from the first on.
        text: int64 `(rounds,)`: index of the text that a round is of.
    """

    signals: DraftSignals
    n_held: np.ndarray
    text: np.ndarray

    @property
    def most_drafts(self) -> int:
        """Drafts of a round."""
        return int(self.signals.n_drafts.shape[1])


@dataclass(frozen=True)
class RoundCosts:
    """What a round takes, in milliseconds, at one batch and context.

    Attributes:
        draft_ms: A draft.
        verify_ms: A verification, but for what grows with its tokens.
        token_ms: What it takes for each token, drafts and the first.
        full_ms: A step with every unit full, which decodes the same text without drafts.
    """

    draft_ms: float
    verify_ms: float
    token_ms: float
    full_ms: float

    def __post_init__(self) -> None:
        for name in ("draft_ms", "verify_ms", "token_ms", "full_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, not {getattr(self, name)}.")
        if self.draft_ms + self.verify_ms + self.token_ms == 0:
            raise ValueError("a round that takes no time says nothing of when to end it.")

    def round_ms(self, n_drafts: float) -> float:
        """What a round of so many drafts takes; of a mean of them, the mean."""
        return n_drafts * self.draft_ms + self.verify_ms + (n_drafts + 1) * self.token_ms


@dataclass(frozen=True)
class MeasuredRounds:
    """Milliseconds per token on held-out prompts, of the same engine in turns.

    Attributes:
        exact_ms: In rounds.
        full_ms: With every unit full.
        tokens_per_round: Of rounds.
        n_equal: Texts of which rounds and full attention gave the same tokens.
        n_texts: All of them.
    """

    exact_ms: float
    full_ms: float
    tokens_per_round: float
    n_equal: int
    n_texts: int

    @property
    def gain(self) -> float:
        """How many times as fast as with every unit full."""
        return self.full_ms / self.exact_ms
