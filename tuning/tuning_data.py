"""What families tune on: traces, a budget, and what lost mass costs in each unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from policies import StepPolicy
from traces.sensitivity import Sensitivity
from tuning.allocation import allocate, loss_by_stride
from tuning.replay import Replay, replay_policy
from tuning.trace_batch import TraceBatch

# Share of the mean cost that every unit keeps: an ablation that happened to do no harm is no proof that none can.
_COST_FLOOR = 0.01


@dataclass(frozen=True)
class TuningData:
    """Input of every family.

    Attributes:
        traces: Tuning prompts only.
        budget: Share of unit-steps that may run full, in (0, 1].
        unit_cost: float64 `(layers, kv_heads)`, mean 1: how much a lost share of mass moves the output, in each unit.
    """

    traces: TraceBatch
    budget: float
    unit_cost: np.ndarray

    def __post_init__(self) -> None:
        check_budget(self.budget)

    def loss(self, policy: StepPolicy) -> float:
        """Replay loss: the square of the lost mass of a step, weighted by unit cost; mean over steps and traces.

        Divergence grows with the square of a perturbation, and what units add to it at a step adds up. Over policies of
        all families its rank correlation with closed-loop KL is 0.98 (`benchmarks/fidelity.py`).
        """
        return self.loss_of(replay_policy(self.traces, policy))

    def loss_of(self, replay: Replay) -> float:
        """The same of what was replayed already."""
        perturbation = np.einsum("...lh,lh->...", replay.lost_mass, self.unit_cost, dtype=np.float64)
        return float(((perturbation / self.unit_cost.size) ** 2).mean())

    def rates(self, sharpness: float) -> np.ndarray:
        """Full steps per step `(layers, kv_heads)` that the budget buys each unit, with mean at most the budget.

        Args:
            sharpness: Power of the unit costs: 1 trusts them, 0 divides the budget by lost mass alone.
        """
        by_age = self.traces.lost_by_age.mean(0)
        recorded = by_age[~np.isnan(by_age).any((1, 2))]
        loss = loss_by_stride(recorded * self.unit_cost**sharpness)
        return allocate(loss.reshape(len(loss), -1), self.budget).reshape(self.traces.units)


def check_budget(budget: float) -> None:
    """Refuse a budget that is no share.

    Raises:
        ValueError: If it is outside (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"the budget is the share of unit-steps that may run full, in (0, 1], not {budget:g}.")


def unit_cost(traces: TraceBatch, sensitivity: Sensitivity | None) -> np.ndarray:
    """Cost of lost mass per unit, from ablations: root of the damage done by each unit alone over the mass it lost.

    Mass lost is a poor guide by itself: in the default model one KV head of ninety does more than half of the damage
    on copied text, and loses less mass than most. The root, because damage is a divergence, quadratic in the
    perturbation that caused it: small damages of many units together are more than their sum.

    Args:
        traces: Tuning prompts; those that were not ablated are passed over.
        sensitivity: Ablations, or None to count all units alike.

    Returns:
        float64 `(layers, kv_heads)` with mean 1.
    """
    names = [str(header.prompt["name"]) for header in traces.headers]
    measured = [] if sensitivity is None else [name for name in names if name in sensitivity.kl]
    if sensitivity is None or not measured:
        return np.ones(traces.units)
    damage = np.sum([np.sqrt(np.maximum(sensitivity.kl[name], 0)) for name in measured], axis=0)
    if not damage.any():
        # As where sets hold the whole context.
        return np.ones(traces.units)
    ages = min(sensitivity.n_steps, traces.max_age)
    rows = [names.index(name) for name in measured]
    lost = np.nanmean(traces.lost_by_age[rows, :ages], axis=1).sum(0)
    cost = damage / np.maximum(lost, 1e-6)
    cost = np.maximum(cost, _COST_FLOOR * cost.mean())
    return np.asarray(cost / cost.mean())
