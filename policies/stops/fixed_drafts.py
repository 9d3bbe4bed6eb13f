"""Rounds of one length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.stops.base import DraftSignals, Outlook, StopRule, check_most_drafts


@dataclass(frozen=True)
class FixedDrafts(StopRule):
    """Verify after so many drafts, as speculative decoding does (arXiv 2211.17192).

    Attributes:
        n_drafts: From 1 to 256.
    """

    n_drafts: int
    kind: ClassVar[str] = "fixed_drafts"
    reads_distributions: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_most_drafts(self.n_drafts)

    @property
    def most_drafts(self) -> int:
        return self.n_drafts

    def decide(self, signals: DraftSignals, outlook: Outlook) -> np.ndarray:
        stops: np.ndarray = signals.n_drafts >= self.n_drafts
        return stops
