"""Full attention on a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals


@dataclass(frozen=True)
class FixedStride(StepPolicy):
    """Run full every `stride` steps, counted from the end of prefill.

    Source: the fixed schedule of Recycled Attention (arXiv 2411.05787), where one stride serves all units. Here both
    numbers may be per unit, and a stride need not be whole: 2.5 gives gaps of 2 and 3.

    Attributes:
        stride: Steps from one full step to the next, at least 1. With phase 0 the first full step is step
            `stride - 1`, so that at any prefix at most one step in `stride` ran full.
        phase: Steps by which the clock is ahead, at least 0. Different phases spread the full steps of the units over
            time.
    """

    stride: PerUnit
    phase: PerUnit = 0
    kind: ClassVar[str] = "fixed_stride"

    def __post_init__(self) -> None:
        object.__setattr__(self, "stride", as_per_unit("stride", self.stride, 1, float("inf")))
        object.__setattr__(self, "phase", as_per_unit("phase", self.phase, 0, float("inf")))

    @property
    def always_full(self) -> PerUnit:
        return as_per_unit("always_full", np.asarray(self.stride) == 1, 0, 1)

    @property
    def highest_rate(self) -> PerUnit:
        return as_per_unit("highest_rate", 1 / np.asarray(self.stride), 0, 1)

    def decide(self, signals: StepSignals) -> Array:
        stride = signals.per_unit(self.stride)
        before = signals.step + signals.per_unit(self.phase)
        return (before + 1) // stride > before // stride
