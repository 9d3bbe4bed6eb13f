from __future__ import annotations

from collections.abc import Callable

from policies import AlwaysFull, NeverFull

FullSteps = Callable[..., list[int]]


def test_always_full_is_full_at_every_step(full_steps: FullSteps) -> None:
    assert full_steps(AlwaysFull(), 5) == [0, 1, 2, 3, 4]


def test_never_full_is_full_at_no_step(full_steps: FullSteps) -> None:
    assert full_steps(NeverFull(), 50) == []
