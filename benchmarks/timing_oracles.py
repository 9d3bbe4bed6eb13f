"""Schedules on recorded losses, at one budget: clocks, who is told or detects when the output turns, and sensors.

Units do not see each other, so each takes the schedule that is best for it at one price of a full step for all
(Lagrange); prices are found such that the traces that are judged keep the budget together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from policies import StepPolicy
from tuning.divide.allocation import STRIDES
from tuning.divide.hindsight import follow
from tuning.divide.price import lowest_price
from tuning.replay.run import replay_policy
from tuning.replay.trace_batch import TraceBatch

_GOLDEN = 0.6180339887498949
_N_HALVINGS = 40
# Steps after an event at which who is told of it looks; () is not told.
OFFSETS: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (2,), (4,), (0, 2), (1, 4))


@dataclass(frozen=True)
class Losses:
    """What sets of every age lose on some traces.

    Attributes:
        lost: float32 `(steps, max_age, units)` by trace: lost mass, times what it costs in the unit.
    """

    lost: Sequence[np.ndarray]

    @classmethod
    def of(cls, traces: TraceBatch, unit_cost: np.ndarray) -> Losses:
        """Of recorded traces."""
        cost = unit_cost.ravel()
        at_ages = (1 - traces.at_all_ages("recovered_mass", trace) for trace in range(len(traces)))
        # Ages that no set has yet are never met.
        return cls([(np.nan_to_num(lost) * cost).astype(np.float32) for lost in at_ages])


@dataclass(frozen=True)
class Options:
    """Schedules that a unit may have, and what they do on traces that are learned from and on others.

    Attributes:
        loss: float64 `(options, units)`: mean on the traces that are learned from.
        share: float64 of the same shape: share of full steps there.
        full: bool `(options, traces, steps, units)` on the traces that are judged.
        left: float32 of the same shape: what is lost there, times cost.
    """

    loss: np.ndarray
    share: np.ndarray
    full: np.ndarray
    left: np.ndarray

    @classmethod
    def of(cls, learned: tuple[np.ndarray, np.ndarray], judged: tuple[np.ndarray, np.ndarray]) -> Options:
        """Of full steps and losses `(options, traces, steps, units)`."""
        full, left = learned
        return cls(left.mean((1, 2), dtype=np.float64), full.mean((1, 2), dtype=np.float64), *judged)

    def among(self, chosen: Sequence[int]) -> Options:
        """Some of them."""
        index = list(chosen)
        return Options(self.loss[index], self.share[index], self.full[index], self.left[index])

    def on(self, traces: Sequence[int]) -> Options:
        """The same, judged on some of the traces."""
        index = list(traces)
        return Options(self.loss, self.share, self.full[:, index], self.left[:, index])

    def best(self, budget: float) -> tuple[np.ndarray, np.ndarray]:
        """What units do who choose among these: full steps and losses `(traces, steps, units)` at a budget."""
        units = np.arange(self.loss.shape[1])
        judged_share = self.full.mean((1, 2))

        def at(price: float) -> np.ndarray:
            return (self.loss + price * self.share).argmin(0)

        highest = float(self.loss.max()) * self.full.shape[2] + 1
        chosen = at(lowest_price(lambda price: judged_share[at(price), units].mean() > budget, highest, _N_HALVINGS))
        return self.full[chosen, :, :, units].transpose(1, 2, 0), self.left[chosen, :, :, units].transpose(1, 2, 0)


def clocks_and_told(losses: Losses, events: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Every clock, alone and with a look at some steps after every event: `(options, traces, steps, units)`.

    Options are ordered by `OFFSETS`, those of who is not told first, and within them by stride. Clocks of units are out
    of step with each other; who is told starts its clock anew when it looks.
    """
    found = [_on_trace(lost, some) for lost, some in zip(losses.lost, events, strict=True)]
    return np.stack([full for full, _ in found], axis=1), np.stack([left for _, left in found], axis=1)


def _on_trace(lost: np.ndarray, events: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    n_steps, _, n_units = lost.shape
    told = np.zeros((len(OFFSETS), n_steps), dtype=bool)
    for row, offsets in enumerate(OFFSETS):
        at = [event + offset for event, offset in itertools.product(events, offsets)]
        told[row, [step for step in at if step < n_steps]] = True
    told = told.repeat(len(STRIDES), axis=0)
    stride = np.tile(STRIDES, len(OFFSETS))[:, None]
    shape = (len(told), n_units)
    units = np.broadcast_to(np.arange(n_units), shape)
    age = np.ones(shape, dtype=np.intp)
    clock = 1 + np.floor((np.arange(n_units) * _GOLDEN % 1) * stride).astype(np.intp)
    full = np.empty((n_steps, *shape), dtype=bool)
    left = np.empty((n_steps, *shape), dtype=np.float32)
    for step in range(n_steps):
        now = (clock >= stride) | told[:, step, None]
        full[step] = now
        left[step] = np.where(now, 0, lost[step, age - 1, units])
        age = np.where(now, 1, age + 1)
        clock = np.where(now, 1, clock + 1)
    return full.transpose(1, 0, 2), left.transpose(1, 0, 2)


def of_policies(
    traces: TraceBatch, policies: Sequence[StepPolicy], unit_cost: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What policies without accounts do, in replay: `(options, traces, steps, units)`."""
    full, left = [], []
    for policy in policies:
        replay = replay_policy(traces, policy)
        by_trace = (array.swapaxes(0, 1) for array in (replay.full, (replay.lost_mass * unit_cost).astype(np.float32)))
        replayed_full, replayed_left = (array.reshape(*array.shape[:2], -1) for array in by_trace)
        full.append(replayed_full)
        left.append(replayed_left)
    return np.stack(full), np.stack(left)


def sensor(lost: np.ndarray, budget: float) -> np.ndarray:
    """Who knows at every step what it would lose there, and nothing else: full steps `(steps, units)` of a trace.

    It looks where that is above one threshold for all units, the lowest that keeps the budget.
    """

    def at(threshold: float) -> np.ndarray:
        return follow(lost, lost > threshold)[0]

    return at(lowest_price(lambda threshold: at(threshold).mean() > budget, float(lost.max()), 20))


def detected(signal: np.ndarray, share: float, least_gap: int) -> list[int]:
    """Steps at which a signal `(steps,)` is among its highest, none within `least_gap` steps of the one before."""
    threshold = np.quantile(signal, 1 - share)
    found: list[int] = []
    for step in np.flatnonzero(signal >= threshold).tolist():
        if not found or step - found[-1] >= least_gap:
            found.append(step)
    return found


def squared(left: np.ndarray) -> float:
    """What divergence follows: the square of what all units lose at a step, mean over steps."""
    return float((left.mean(-1, dtype=np.float64) ** 2).mean())
