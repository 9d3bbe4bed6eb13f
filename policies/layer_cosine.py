"""Full attention for a whole layer when its mean query has turned away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals


@dataclass(frozen=True)
class LayerCosine(StepPolicy):
    """Run a layer full when its mean query is less similar to that of its last full step than `threshold`.

    Source: the dynamic schedule of RefreshKV (arXiv 2411.05787, version 2 and later): every QC = 5 or 10 steps, each
    layer compares its query, averaged over all heads, with that of its last full step, and runs full below a
    threshold. The paper does not say whether its query is taken before or after rotary embedding; ours is taken after.
    `CosineThreshold` is the same decision per KV head. With a number for each parameter, or the same number for all
    units of a layer, the units of a layer always decide alike; under a budget per unit they no longer need to.

    Attributes:
        threshold: Cosine in [-1, 1].
        check_every: Steps between two looks at the similarity (the paper's QC), at least 1. Unmeasured, the layer runs
            full also between looks.
    """

    threshold: PerUnit
    check_every: PerUnit = 5
    kind: ClassVar[str] = "layer_cosine"

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", as_per_unit("threshold", self.threshold, -1, 1))
        check_every = as_per_unit("check_every", self.check_every, 1, float("inf"))
        object.__setattr__(self, "check_every", check_every)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"layer_similarity"})

    def decide(self, signals: StepSignals) -> Array:
        similarity = signals.layer_similarity
        due = (signals.step + 1) % signals.per_unit(self.check_every) < 1
        turned_away = due & ~(similarity >= signals.per_unit(self.threshold))
        return turned_away | (similarity != similarity)
