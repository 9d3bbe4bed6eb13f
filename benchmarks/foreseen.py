"""Schedules that were fixed beforehand, by somebody who knows what will happen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies import StepPolicy, StepSignals
from policies.arrays import Array, like


@dataclass(frozen=True)
class Foreseen(StepPolicy):
    """Full steps that were fixed beforehand, as by `tuning.divide.hindsight`.

    Attributes:
        full: Numbers 0 or 1, `(steps, layers, kv_heads)`.
    """

    full: tuple[tuple[tuple[float, ...], ...], ...]
    kind: ClassVar[str] = "foreseen"

    @classmethod
    def of(cls, full: np.ndarray) -> Foreseen:
        """The schedule of bool `(steps, layers, kv_heads)`."""
        return cls(tuple(tuple(tuple(row) for row in step) for step in full.astype(float).tolist()))

    def decide(self, signals: StepSignals) -> Array:
        now = self.full[int(signals.step.max())]
        table = now if signals.layer is None else now[signals.layer]
        return (like(table, signals.age) + 0 * signals.age) > 0.5
