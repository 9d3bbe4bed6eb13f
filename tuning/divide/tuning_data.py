"""What families tune on: traces, a budget, and what lost mass costs in each unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from policies import StepPolicy
from traces.sensitivity import Sensitivity
from tuning.divide.allocation import STRIDES, allocate, loss_by_stride, who_refreshes_by_keys
from tuning.replay.run import Replay, replay_policy
from tuning.replay.trace_batch import TraceBatch

# Share of the mean cost that every unit keeps: an ablation that happened to do no harm is no proof that none can.
_COST_FLOOR = 0.01


@dataclass(frozen=True)
class Division:
    """A budget divided among units.

    Attributes:
        rates: float64 `(layers, kv_heads)`: full steps per step; the mean of rate x cost is at most the budget.
        keys_only: bool of the same shape: units that refresh by keys alone, which costs half.
    """

    rates: np.ndarray
    keys_only: np.ndarray


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

        Divergence grows with the square of a perturbation, and what units add to it at a step adds up. Over 51 policies
        of all families its rank correlation with closed-loop KL is 0.89; with pooled sets of one size it was 0.98
        (`benchmarks/fidelity.py`).
        """
        return self.loss_of(replay_policy(self.traces, policy))

    def loss_of(self, replay: Replay) -> float:
        """The same of what was replayed already."""
        perturbation = np.einsum("...lh,lh->...", replay.lost_mass, self.unit_cost, dtype=np.float64)
        return float(((perturbation / self.unit_cost.size) ** 2).mean())

    def divide(self, sharpness: float, *, keys_only: bool = False) -> Division:
        """Divide the budget among units by what refreshing each of them is worth.

        Args:
            sharpness: Power of the unit costs: 1 trusts them, 0 divides the budget by lost mass alone.
            keys_only: Whether units may refresh by keys alone where that is worth more.
        """
        by_age, since_prompt = self.traces.lost_by_age.mean(0), self.traces.lost_since_prompt.mean(0)
        recorded = by_age[~np.isnan(by_age).any((1, 2))]
        weight = self.unit_cost**sharpness
        loss = loss_by_stride(recorded * weight, since_prompt * weight).reshape(len(STRIDES), -1)
        by_keys = np.zeros(loss.shape[1], dtype=bool)
        if keys_only:
            missed_by_new_set = (1 - self.traces.fresh_mass[1:].astype(np.float64)).mean((0, 1))
            by_keys = who_refreshes_by_keys(loss, (missed_by_new_set * weight).ravel(), self.budget)
            rates = 1 / STRIDES.astype(np.float64)
            loss = loss + np.where(by_keys, rates[:, None] * (missed_by_new_set * weight).ravel(), 0)
        rates = allocate(loss, self.budget, full_cost=1 - by_keys / 2)
        return Division(rates.reshape(self.traces.units), by_keys.reshape(self.traces.units))


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
    rows = [names.index(name) for name in measured]
    return cost_of_lost_mass(sensitivity, dict(zip(measured, traces.lost_since_prompt[rows], strict=True)))


def cost_of_lost_mass(sensitivity: Sensitivity, lost_since_prompt: Mapping[str, np.ndarray]) -> np.ndarray:
    """The same from what the prompt's set lost at each step, `(steps, layers, kv_heads)` by ablated prompt."""
    damage = np.sum([np.sqrt(np.maximum(sensitivity.kl[name], 0)) for name in lost_since_prompt], axis=0)
    if not damage.any():
        # As where sets hold the whole context.
        return np.ones(damage.shape)
    lost = np.sum([lost[: sensitivity.n_steps].mean(0) for lost in lost_since_prompt.values()], axis=0)
    cost = damage / np.maximum(lost, 1e-6)
    cost = np.maximum(cost, _COST_FLOOR * cost.mean())
    return np.asarray(cost / cost.mean())
