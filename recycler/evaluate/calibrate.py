"""Tuning the one number of RefreshKV's dynamic schedule to a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import LayerCosine, Selection
from recycler.evaluate.baselines import CHECKS_EVERY, OUR_SET, dynamic_name, refreshkv_set
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt

_THRESHOLDS = tuple(round(0.30 + 0.03 * i, 2) for i in range(24))


def calibrated_thresholds(
    loaded: LoadedModel, prompts: Sequence[Prompt], k: int, budget: float, our_set: Selection | None
) -> dict[str, float]:
    """The highest cosine thresholds whose full share in closed loop stays within a budget.

    A higher threshold runs full more often, so the highest one that the budget allows is the best of its kind.

    Args:
        loaded: The model.
        prompts: Texts to tune on; none of those that are measured.
        k: Tokens of a set.
        budget: Share of unit-steps that may run full, on average over the prompts.
        our_set: The selection of the second half of the methods, or None.

    Returns:
        Thresholds by name of the method; 1, always full at a check, where looking at all is rare enough.
    """
    sets: Mapping[str, Selection] = {"": refreshkv_set(k)} | ({} if our_set is None else {OUR_SET: our_set})
    found: dict[str, float] = {}
    for suffix, selection in sets.items():
        wanted = [every for every in CHECKS_EVERY if 1 / every > budget]
        policies = [LayerCosine(threshold, every) for every in wanted for threshold in _THRESHOLDS]
        shares = [
            run_closed_loop(loaded.model, prompt.tokens, prompt.n_prompt_tokens, policies, selection).full_share
            for prompt in tqdm(prompts if wanted else (), desc="tuning thresholds", unit="prompt", disable=not wanted)
        ]
        mean = np.mean(shares, axis=0).reshape(len(wanted), len(_THRESHOLDS)) if wanted else np.empty((0, 0))
        for every in CHECKS_EVERY:
            best = 1.0
            if every in wanted:
                within = np.flatnonzero(mean[wanted.index(every)] <= budget)
                best = _THRESHOLDS[within[-1]] if len(within) else -1.0
            found[dynamic_name(every, "tuned") + suffix] = best
    return found
