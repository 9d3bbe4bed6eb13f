"""Traces of outputs that turn, which `benchmarks/timing.py` and `benchmarks/timing_signals.py` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies import Selection
from recycler.measure.ablation import measure_prompt_sensitivity
from recycler.model.loading import LoadedModel
from recycler.prompts import TURNING_KINDS, Prompt, default_prompts
from recycler.record.folder import record_prompts
from tuning.divide.tuning_data import unit_cost
from tuning.replay.trace_batch import TraceBatch
from tuning.search.split import split_by_prompt


@dataclass(frozen=True)
class TurningTraces:
    """Half of the prompts are learned from, and the others judged.

    Attributes:
        learned: Prompts.
        judged: The others.
        learn: Their traces.
        judge: Those of the others.
        unit_cost: float64 `(layers, kv_heads)`, mean 1: what lost mass costs in each unit.
    """

    learned: Sequence[Prompt]
    judged: Sequence[Prompt]
    learn: TraceBatch
    judge: TraceBatch
    unit_cost: np.ndarray


def turning_traces(
    loaded: LoadedModel, selection: Selection, out: Path, *, steps: int, context_tokens: int, per_kind: int
) -> TurningTraces:
    """Record prompts of `TURNING_KINDS`, and measure damage, as far as a folder does not hold them.

    Args:
        loaded: The model.
        selection: Whose sets are recorded.
        out: The folder.
        steps: Decode steps, and oldest age.
        context_tokens: Prompt tokens.
        per_kind: Prompts of each kind, at least 2.
    """
    prompts = default_prompts(
        loaded.tokenizer, n_per_kind=per_kind, context_tokens=context_tokens, n_steps=steps, kinds=list(TURNING_KINDS)
    )
    split = split_by_prompt(prompts)
    damage = measure_prompt_sensitivity(loaded, out / "sensitivity", split.ablate, selection)
    traces = {file.name: file for file in record_prompts(loaded, prompts, selection, out / "traces", max_age=steps)}
    learn, judge = (TraceBatch([traces[prompt.name] for prompt in some]) for some in (split.tune, split.held_out))
    return TurningTraces(split.tune, split.held_out, learn, judge, unit_cost(learn, damage))
