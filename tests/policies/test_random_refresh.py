from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from policies import RandomRefresh, StepPolicy

Drive = Callable[..., np.ndarray]

N_STEPS, UNITS = 2000, (8, 5)


def table(drive: Drive, share: float, seed: int = 0) -> np.ndarray:
    """Decisions `(steps, units)`."""
    full = drive(RandomRefresh.drawn(share, UNITS, seed), N_STEPS, zeros=np.zeros((1, *UNITS)))
    return full.reshape(N_STEPS, -1)


def test_by_hand(full_steps: Callable[[StepPolicy, int], list[int]]) -> None:
    # 0.5 + 0.25 n^2 modulo 1 is 0.75, 0.5, 0.75, 0.5, ...
    assert full_steps(RandomRefresh(0.6, rate=0.25, phase=0.5), 6) == [1, 3, 5]
    # 0.125 n^2 modulo 1 is 0.125, 0.5, 0.125, 0, 0.125, 0.5, 0.125, 0; at the share itself a unit does not run full.
    assert full_steps(RandomRefresh(0.125, rate=0.125, phase=0), 8) == [3, 7]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5])
def test_the_share_of_full_steps_is_that_of_chance(drive: Drive, share: float) -> None:
    full = table(drive, share)
    error = (share * (1 - share) / full.size) ** 0.5
    assert abs(full.mean() - share) < 3 * error
    # And every unit has its share, up to the error of as many throws.
    assert np.abs(full.mean(0) - share).max() < 4 * (share * (1 - share) / N_STEPS) ** 0.5


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_none_and_all_are_exact(drive: Drive, share: float) -> None:
    assert (table(drive, share) == bool(share)).all()


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_gaps_between_full_steps_are_nearly_geometric(drive: Drive, share: float) -> None:
    full = table(drive, share)
    gaps = np.concatenate([np.diff(np.flatnonzero(unit)) for unit in full.T])
    longest = int(2 / share)
    found = np.array([(gaps <= gap).mean() for gap in range(1, longest)])
    expected = 1 - (1 - share) ** np.arange(1, longest)
    assert np.abs(found - expected).max() < 0.03
    # A clock with the same share has gaps of one length, and a linear sequence of three.
    assert gaps.std() == pytest.approx((1 - share) ** 0.5 / share, rel=0.15)
    assert len(set(gaps.tolist())) > 2 / share


def test_units_are_uncorrelated_with_each_other_and_with_themselves_a_step_later(drive: Drive) -> None:
    full = table(drive, 0.2).astype(float)
    across = np.corrcoef(full.T)[np.triu_indices(full.shape[1], 1)]
    later = [np.corrcoef(unit[1:], unit[:-1])[0, 1] for unit in full.T]
    for correlations in (across, np.array(later)):
        assert abs(correlations.mean()) < 3 / (N_STEPS * len(correlations)) ** 0.5
        assert correlations.std() < 1.5 / N_STEPS**0.5


def test_a_draw_is_repeated_by_its_seed_and_by_no_other() -> None:
    drawn = RandomRefresh.drawn(0.1, UNITS, seed=3)
    assert drawn == RandomRefresh.drawn(0.1, UNITS, seed=3)
    assert drawn != RandomRefresh.drawn(0.1, UNITS, seed=4)
    assert drawn.unit_shapes() == {UNITS}


def test_torch_throws_the_same_dice_over_a_long_run(drive: Drive) -> None:
    policy = RandomRefresh.drawn(0.2, (2, 3), seed=1)
    on_torch = drive(policy, N_STEPS, zeros=torch.zeros((1, 2, 3), dtype=torch.float64))
    np.testing.assert_array_equal(on_torch, drive(policy, N_STEPS, zeros=np.zeros((1, 2, 3))))


@pytest.mark.parametrize("name", ["rate", "phase"])
@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_place_outside_the_circle_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be between 0 and 1, not "):
        RandomRefresh(**({"share": 0.1, "rate": 0.3, "phase": 0.2} | {name: value}))


def test_a_share_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share must be between 0 and 1, not 1\.5"):
        RandomRefresh(1.5, 0.1, 0.1)
