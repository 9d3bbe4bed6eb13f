"""Refreshing sets without reading values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit, numbers
from policies.signals import StepSignals


@dataclass(frozen=True)
class RefreshKeys(StepPolicy):
    """Decide as `policy` does, and let some units carry out their full decisions as keys-only refreshes.

    Such a unit scores all tokens by its query, chooses its new set from these scores as a full step does, and attends,
    at this very step, to that set alone: it reads the keys of the whole cache and the values of k tokens, which over
    and above a recycled step is half of what a full step reads. From then on it is as after a full step.

    Source: an ablation of RefreshKV (arXiv 2411.05787), in which choosing anew alone does as well as a full step.

    Around or inside of a budget the decisions are the same; inside, the budget's `mean_budget` knows what they cost.

    Attributes:
        policy: Who decides.
        units: 1 for units that refresh by their keys alone, 0 for those that run full steps, whatever `policy` says of
            them.
    """

    policy: StepPolicy
    units: PerUnit = 1
    kind: ClassVar[str] = "refresh_keys"

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", as_per_unit("units", self.units, 0, 1))
        wrong = [number for number in numbers(self.units) if number not in (0, 1)]
        if wrong:
            raise ValueError(f"units must be 0 or 1, not {wrong[0]:g}.")

    @property
    def keys_only(self) -> PerUnit:
        return self.units

    @property
    def always_full(self) -> PerUnit:
        return self.policy.always_full

    @property
    def highest_rate(self) -> PerUnit:
        return self.policy.highest_rate

    def decide(self, signals: StepSignals) -> Array:
        return self.policy.decide(signals)
