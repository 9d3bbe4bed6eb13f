"""Tuning the one number of RefreshKV's dynamic schedule to a budget."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import LayerCosine, Selection
from recycler.evaluate.baselines import DynamicSchedule, dynamic_schedules, refreshkv_set
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt

_THRESHOLDS = tuple(round(0.30 + 0.03 * i, 2) for i in range(24))


def calibrated_thresholds(
    loaded: LoadedModel, prompts: Sequence[Prompt], k: int, budget: float, our_set: Selection | None
) -> dict[DynamicSchedule, float]:
    """The highest cosine thresholds whose full share in closed loop stays within a budget.

    A higher threshold runs full more often, so the highest one that the budget allows is the best of its kind.

    Args:
        loaded: The model.
        prompts: Texts to tune on; none of those that are measured.
        k: Tokens of a set.
        budget: Share of unit-steps that may run full, on average over the prompts.
        our_set: The selection of the second half of the methods, or None.

    Returns:
        The thresholds; 1, always full at a check, where looking at all is rare enough.
    """
    found: dict[DynamicSchedule, float] = {}
    for with_our_set, of_set in itertools.groupby(dynamic_schedules(our_set), lambda one: one.with_our_set):
        some = tuple(of_set)
        selection = our_set if with_our_set and our_set is not None else refreshkv_set(k)
        wanted = [one for one in some if 1 / one.check_every > budget]
        policies = [LayerCosine(threshold, one.check_every) for one in wanted for threshold in _THRESHOLDS]
        shares = [
            run_closed_loop(loaded.model, prompt.tokens, prompt.n_prompt_tokens, policies, selection).full_share
            for prompt in tqdm(prompts if wanted else (), desc="tuning thresholds", unit="prompt", disable=not wanted)
        ]
        mean = np.mean(shares, axis=0).reshape(len(wanted), len(_THRESHOLDS)) if wanted else np.empty((0, 0))
        found |= dict.fromkeys(some, 1.0)
        for one, by_threshold in zip(wanted, mean, strict=True):
            within = np.flatnonzero(by_threshold <= budget)
            found[one] = _THRESHOLDS[within[-1]] if len(within) else -1.0
    return found
