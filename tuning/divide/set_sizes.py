"""Dividing the tokens of all sets, and the full steps with them, by what each buys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from policies import Selection
from traces.sensitivity import Sensitivity
from traces.size_losses import SetLosses, SizeLosses
from tuning.divide.allocation import STRIDES, loss_by_stride
from tuning.divide.price import lowest_price
from tuning.divide.tuning_data import cost_of_lost_mass

# Bisections of each of the two prices.
_N_HALVINGS = 40
# Sizes are chosen for this budget whatever the budget of the search, so that one set of traces serves all.
SIZES_BUDGET = 0.1


@dataclass(frozen=True)
class SizedSets:
    """What sizes were chosen, and by what costs.

    Attributes:
        selection: With `unit_k`.
        unit_cost: float64 `(layers, kv_heads)`, mean 1; see `tuning.divide.tuning_data.unit_cost`.
    """

    selection: Selection
    unit_cost: np.ndarray


def size_sets(selection: Selection, losses: SizeLosses, sensitivity: Sensitivity) -> SizedSets:
    """Give every unit a size, with the selection's k as their mean.

    Args:
        selection: How sets are chosen, and their mean size.
        losses: Of the tuning prompts, with this selection.
        sensitivity: Of some of them, with this selection.
    """
    at_k = losses.sizes.index(selection.k)
    cost = cost_of_lost_mass(sensitivity, {name: losses.lost[name].since_prompt[at_k] for name in sensitivity.kl})
    by_age, since_prompt = (
        np.mean([getattr(lost, field) for lost in losses.lost.values()], axis=0) * cost for field in SetLosses._fields
    )
    # (sizes, strides, units)
    losses_by_size = zip(by_age, since_prompt, strict=True)
    loss = np.stack([loss_by_stride(*of_size).reshape(len(STRIDES), -1) for of_size in losses_by_size])
    sizes = allocate_sizes(loss, np.array(losses.sizes), SIZES_BUDGET, selection.k).reshape(cost.shape)
    return SizedSets(dataclasses.replace(selection, unit_k=sizes.tolist()), cost)


def allocate_sizes(
    loss: np.ndarray, sizes: np.ndarray, budget: float, k: float, strides: np.ndarray = STRIDES
) -> np.ndarray:
    """Sizes of sets that lose least, when full steps are divided as well as they can be at the same time.

    Every unit takes the size and stride of least loss + price of a full step x rate + price of a token x size, with
    one pair of prices for all (Lagrange): that of full steps such that the mean rate is at most the budget, that of
    tokens such that the mean size is at most k. The schedule itself is tuned later, on traces of these sets.

    Args:
        loss: `(sizes, strides, units)`, loss per step of each unit with sets of each size at each stride.
        sizes: Tokens `(sizes,)`, rising.
        budget: Mean rate of full steps, in (0, 1].
        k: Mean size, at least the least of `sizes`.
        strides: Strides that units may take.

    Returns:
        int64 `(units,)`: one of `sizes` for each unit, with mean at most k.

    Raises:
        ValueError: If k is below the least size.
    """
    if k < sizes[0]:
        raise ValueError(f"sets of {k:g} tokens on average are below the least size, {sizes[0]}.")
    rates = 1 / strides.astype(np.float64)

    def at(token_price: float) -> np.ndarray:
        """The index of each unit's size, with full steps priced to keep the budget."""
        priced = loss + token_price * sizes[:, None, None]

        def chosen(price: float) -> np.ndarray:
            best: np.ndarray = (priced + price * rates[:, None]).reshape(-1, loss.shape[2]).argmin(0)
            return best

        highest = float(loss.max()) * float(strides[-1]) + 1.0
        price = lowest_price(lambda price: rates[chosen(price) % len(strides)].mean() > budget, highest, _N_HALVINGS)
        found: np.ndarray = chosen(price) // len(strides)
        return found

    if sizes[at(0.0)].mean() <= k:
        return np.asarray(sizes[at(0.0)])
    token_price = lowest_price(lambda price: sizes[at(price)].mean() > k, float(loss.max()) + 1.0, _N_HALVINGS)
    return np.asarray(sizes[at(token_price)])
