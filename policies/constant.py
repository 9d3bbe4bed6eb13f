"""The two ends of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit
from policies.signals import StepSignals


@dataclass(frozen=True)
class AlwaysFull(StepPolicy):
    """Full attention at every step: the quality ceiling, and the price of it."""

    kind: ClassVar[str] = "always_full"

    @property
    def always_full(self) -> PerUnit:
        return 1

    def decide(self, signals: StepSignals) -> Array:
        return signals.age >= 0


@dataclass(frozen=True)
class NeverFull(StepPolicy):
    """The set chosen at the end of prefill, for ever: the floor."""

    kind: ClassVar[str] = "never_full"

    @property
    def highest_rate(self) -> PerUnit:
        return 0

    def decide(self, signals: StepSignals) -> Array:
        return signals.age < 0
