"""One price for all units: how a budget is divided where each unit takes what is best for it (Lagrange)."""

from __future__ import annotations

from collections.abc import Callable


def lowest_price(overspends: Callable[[float], bool], highest: float, n_halvings: int) -> float:
    """The lowest price, of those tried by bisection, at which a budget is kept.

    Args:
        overspends: Whether units together take more than the budget at a price; False from some price on.
        highest: A price at which they do not; returned where nothing below keeps the budget.
        n_halvings: Of the interval from 0 to `highest`.
    """
    low, high = 0.0, highest
    for _ in range(n_halvings):
        price = (low + high) / 2
        if overspends(price):
            low = price
        else:
            high = price
    return high
