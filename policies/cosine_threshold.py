"""Full attention when the query has turned away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals


@dataclass(frozen=True)
class CosineThreshold(StepPolicy):
    """Run full when the query is less similar to that of the last full step than `threshold`.

    Source: the dynamic schedule of Recycled Attention (arXiv 2411.05787). The paper averages over all heads of a layer
    and decides per layer; here every unit decides on the mean query of its own group. The paper does not say whether
    its query is taken before or after rotary embedding; ours is taken after.

    Attributes:
        threshold: Cosine in [-1, 1].
        check_every: Steps between two looks at the similarity (the paper's QC, 5 or 10), at least 1.
    """

    threshold: PerUnit
    check_every: PerUnit = 1
    kind: ClassVar[str] = "cosine_threshold"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", as_per_unit("threshold", self.threshold, -1, 1))
        check_every = as_per_unit("check_every", self.check_every, 1, float("inf"))
        object.__setattr__(self, "check_every", check_every)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query_similarity"})

    def decide(self, signals: StepSignals) -> Array:
        similarity = signals.query_similarity
        due = (signals.step + 1) % signals.per_unit(self.check_every) < 1
        turned_away = due & ~(similarity >= signals.per_unit(self.threshold))
        return turned_away | (similarity != similarity)
