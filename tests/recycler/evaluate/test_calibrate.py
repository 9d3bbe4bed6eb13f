"""Thresholds of the dynamic schedule: the highest that the budget allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from policies import LayerCosine, Selection
from recycler.evaluate import calibrate
from recycler.evaluate.baselines import DynamicSchedule, dynamic_schedules, refreshkv_set
from recycler.evaluate.calibrate import calibrated_thresholds
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt

K = 12
OURS = Selection(K, sinks=2, window=4)
GRID = np.round(np.arange(0.30, 1.0, 0.03), 2)


@pytest.fixture
def prompts() -> list[Prompt]:
    """Texts that say five words over and over, so that queries turn away at some looks and not at others."""
    words = (np.random.default_rng(seed).integers(1, 61, 5) for seed in range(2))
    return [
        Prompt(f"song-{index:03d}", "song", np.tile(five, 16), 40, "drawn", "CC0-1.0")
        for index, five in enumerate(words)
    ]


def shares(loaded: LoadedModel, prompts: Sequence[Prompt], every: int, selection: Selection) -> np.ndarray:
    """Mean full share of every threshold of the grid."""
    policies = [LayerCosine(float(threshold), every) for threshold in GRID]
    loops = [
        run_closed_loop(loaded.model, one.tokens, one.n_prompt_tokens, policies, selection, fast=False)
        for one in prompts
    ]
    mean: np.ndarray = np.mean([loop.full_share for loop in loops], axis=0)
    return mean


@pytest.mark.parametrize(("budget", "every"), [(0.11, 5), (0.07, 10)])
def test_a_threshold_is_the_highest_of_the_grid_whose_share_stays_within_the_budget(
    loaded: LoadedModel, prompts: list[Prompt], budget: float, every: int
) -> None:
    found = calibrated_thresholds(loaded, prompts, K, budget, OURS)
    for ours, selection in ((False, refreshkv_set(K)), (True, OURS)):
        by_threshold = shares(loaded, prompts, every, selection)
        within = by_threshold <= budget
        assert within.any()
        assert not within.all()
        assert found[DynamicSchedule(every, ours)] == GRID[within].max()


def test_where_looks_are_rarer_than_the_budget_every_look_is_full(
    loaded: LoadedModel, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = calibrated_thresholds(loaded, prompts, K, 0.1, None)
    assert found[DynamicSchedule(10, False)] == 1
    policy = LayerCosine(1.0, 10)
    (share,) = run_closed_loop(
        loaded.model, prompts[0].tokens, prompts[0].n_prompt_tokens, [policy], refreshkv_set(K)
    ).full_share
    assert share == pytest.approx(0.1)

    def run(*arguments: object) -> object:
        raise AssertionError("there is nothing to tune")

    monkeypatch.setattr(calibrate, "run_closed_loop", run)
    assert calibrated_thresholds(loaded, prompts, K, 0.2, OURS) == dict.fromkeys(dynamic_schedules(OURS), 1.0)


def test_where_even_the_lowest_threshold_asks_too_often_the_layer_is_never_full(
    loaded: LoadedModel, prompts: list[Prompt]
) -> None:
    found = calibrated_thresholds(loaded, prompts, K, 0.0, None)
    assert found == dict.fromkeys(dynamic_schedules(None), -1.0)
    (share,) = run_closed_loop(
        loaded.model, prompts[0].tokens, prompts[0].n_prompt_tokens, [LayerCosine(-1.0, 5)], refreshkv_set(K)
    ).full_share
    assert share == 0
