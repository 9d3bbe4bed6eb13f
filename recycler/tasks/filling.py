"""Filling a context with as many drawn items as it has room for."""

from collections.abc import Callable, Sequence


def longest_fitting(build: Callable[[int], Sequence[int]], n_items: int, n_tokens: int) -> int:
    """How many items fit: a number whose tokens fit where those of one more do not.

    Args:
        build: the tokens of so many items; of enough items they are more than `n_tokens`.
        n_items: a number that fits.
        n_tokens: the room.
    """
    fits, step = n_items, max(1, n_items)
    while len(build(fits + step)) <= n_tokens:
        fits += step
        step *= 2
    fails = fits + step
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if len(build(middle)) <= n_tokens:
            fits = middle
        else:
            fails = middle
    return fits
