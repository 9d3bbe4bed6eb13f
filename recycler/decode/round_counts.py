"""What rounds of drafts and verifications came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundCounts:
    """What rounds did, summed over rows.

    Attributes:
        n_rounds: Verifications, one for each row that took part.
        n_drafts: Tokens that were drafted.
        n_accepted: Those of them that full attention chose too, given that it chose all before them in the round, and
            that the text went on with: what is drawn may leave them.
        n_tokens: Tokens of the text.
    """

    n_rounds: int = 0
    n_drafts: int = 0
    n_accepted: int = 0
    n_tokens: int = 0

    def __add__(self, other: RoundCounts) -> RoundCounts:
        return RoundCounts(
            self.n_rounds + other.n_rounds,
            self.n_drafts + other.n_drafts,
            self.n_accepted + other.n_accepted,
            self.n_tokens + other.n_tokens,
        )

    @property
    def tokens_per_round(self) -> float:
        """Tokens of the text for a verification, mean; NaN without one."""
        return self.n_tokens / self.n_rounds if self.n_rounds else float("nan")

    @property
    def drafts_per_round(self) -> float:
        """Drafts for a verification, mean; NaN without one."""
        return self.n_drafts / self.n_rounds if self.n_rounds else float("nan")
