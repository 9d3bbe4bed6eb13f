"""Which candidate of each family goes on, decided in closed loop on the validation prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuning.confirm.measured import ClosedLoopArrays
from tuning.search.study import Candidate, Search


@dataclass(frozen=True)
class Winner:
    """The best candidate of a family.

    Attributes:
        search: The family's search.
        candidate: The one of its candidates with the least KL.
        tune_kl: That KL in closed loop on the validation prompts, nats per step.
    """

    search: Search
    candidate: Candidate
    tune_kl: float


def choose_winners(searches: Sequence[Search], runs: Sequence[ClosedLoopArrays]) -> list[Winner]:
    """Choose a winner of each family.

    Args:
        searches: One per family.
        runs: One per validation prompt; its rows are the candidates of all searches, in their order.

    Returns:
        In the order of `searches`.
    """
    kl = iter(np.mean([run.kl.mean(1) for run in runs], axis=0))
    winners = []
    for search in searches:
        losses = [float(next(kl)) for _ in search.candidates]
        best = int(np.argmin(losses))
        winners.append(Winner(search, search.candidates[best], losses[best]))
    return winners
