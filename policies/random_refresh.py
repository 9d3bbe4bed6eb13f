"""Full attention at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from policies.arrays import Array
from policies.base import StepPolicy
from policies.per_unit import PerUnit, as_per_unit
from policies.signals import StepSignals

_BELOW_ONE = float(np.nextafter(1, 0))


@dataclass(frozen=True)
class RandomRefresh(StepPolicy):
    """Run every unit full at random, with probability `share`: the comparison for schedules that claim to know when.

    A policy has no state and no generator, so chance is a quadratic Weyl sequence: at step n, counted from 1, a unit
    runs full if (phase + rate x n^2) mod 1 < share. For irrational rates it is equidistributed (H. Weyl, Math. Ann. 77,
    1916), so that the share of full steps tends to `share`; and unlike the linear sequence, whose gaps take three
    lengths at most (three-gap theorem) and would make a regular clock, values at two consecutive steps are independent
    in the limit. Only longer runs betray it: third differences are 0. Over random rates the gaps between full steps
    are close to geometric, and units are uncorrelated. SFI's ablation of triggers (arXiv 2603.12038) has a random
    schedule too, drawn once for all units.

    Attributes:
        share: Probability in [0, 1].
        rate: In [0, 1), a number per unit; two units of the same rate and phase run full together.
        phase: In [0, 1).
    """

    share: PerUnit
    rate: PerUnit
    phase: PerUnit
    kind: ClassVar[str] = "random_refresh"

    def __post_init__(self) -> None:
        object.__setattr__(self, "share", as_per_unit("share", self.share, 0, 1))
        object.__setattr__(self, "rate", as_per_unit("rate", self.rate, 0, _BELOW_ONE))
        object.__setattr__(self, "phase", as_per_unit("phase", self.phase, 0, _BELOW_ONE))

    @classmethod
    def drawn(cls, share: PerUnit, shape: tuple[int, int], seed: int) -> RandomRefresh:
        """Draw rate and phase of every unit evenly from [0, 1).

        Args:
            share: Probability in [0, 1].
            shape: `(layers, kv_heads)`.
            seed: Of the draw; the same seed gives the same policy.
        """
        rate, phase = np.random.default_rng(seed).random((2, *shape))
        return cls(share, rate.tolist(), phase.tolist())

    def decide(self, signals: StepSignals) -> Array:
        n = signals.step + 1
        return (signals.per_unit(self.phase) + signals.per_unit(self.rate) * n * n) % 1 < signals.per_unit(self.share)
