"""Measuring how much sets of several sizes would miss, in one pass over each prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import Selection
from recycler.model.loading import LoadedModel
from recycler.model.shape import model_shape
from recycler.prompts import Prompt
from recycler.record.one_prompt import heads_at_once, n_voters, trace_header
from recycler.record.step_attention import StepAttention, watch_steps
from traces.ages import mean_by_age, recorded_ages, since_prompt
from traces.reporting.differences import differences
from traces.size_losses import FILE_NAME, SetLosses, SizeLosses

# Sizes that units may be given, as shares of k: a set that is never refreshed gains by more, one of sinks by none.
_SHARES_OF_K = (0.375, 0.75, 1, 1.5, 2.5)
# Means over steps are wanted: sets of every so many steps tell them, the prompt's among them.
_SOURCES_APART = 8


def set_sizes(selection: Selection) -> tuple[int, ...]:
    """Sizes among which units may choose: some shares of k, each with room for sinks and window; k is one of them."""
    least = selection.sinks + max(selection.window, 1)
    return tuple(sorted({max(round(share * selection.k), least) for share in _SHARES_OF_K}))


def measure_size_losses(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    selection: Selection,
    folder: Path | str,
    *,
    memory_mib: int = 1024,
    chunk_tokens: int = 4096,
) -> SizeLosses:
    """Measure prompts at every size of `set_sizes` and keep the results in a folder.

    Prompts that the folder's file holds already are not measured again; the file is written after each prompt.

    Args:
        loaded: The model.
        prompts: Texts with different names.
        selection: How sets are chosen; its `k` is varied.
        folder: Where the file is kept.
        memory_mib: As in `record_trace`.
        chunk_tokens: Prompt tokens per forward.

    Raises:
        ValueError: If the folder's file is damaged or was measured with another model or selection.
    """
    sizes = set_sizes(selection)
    headers = [
        trace_header(loaded.model, prompt, selection, max_age=prompt.n_steps, model_id=loaded.id) for prompt in prompts
    ]
    first = headers[0]
    known = SizeLosses.read(folder) or SizeLosses(first.model, first.selection, sizes, {})
    if found := differences({**known.model, **known.selection}, {**first.model, **first.selection}):
        raise ValueError(f"{Path(folder) / FILE_NAME} was measured with {found}: remove it and measure again.")
    missing = [prompt for prompt in prompts if prompt.name not in known.lost]
    for prompt in tqdm(missing, desc="set sizes", unit="prompt", disable=not missing):
        lost = _lost_by_size(loaded, prompt, selection, sizes, memory_mib, chunk_tokens)
        known = dataclasses.replace(known, lost={**known.lost, prompt.name: lost})
        known.write(folder)
    return known


def _lost_by_size(
    loaded: LoadedModel,
    prompt: Prompt,
    selection: Selection,
    sizes: Sequence[int],
    memory_mib: int,
    chunk_tokens: int,
) -> SetLosses:
    n_heads = heads_at_once(loaded.model, prompt, selection, memory_mib)
    ages = recorded_ages(prompt.n_steps)
    units = model_shape(loaded.model).units
    lost = SetLosses(*(np.empty((len(sizes), prompt.n_steps, *units), dtype=np.float32) for _ in SetLosses._fields))

    def watch(layer: int, heads: slice, attention: StepAttention) -> None:
        for place, size in enumerate(sizes):
            aged, _ = attention.sets(dataclasses.replace(selection, k=size), ages, None, apart=_SOURCES_APART)
            # Row 0 is the prompt's end, which is no decode step.
            missed = 1 - aged.recovered_mass[:, 1:].movedim(0, -1).float().cpu().numpy()
            lost.by_age[place, :, layer, heads] = mean_by_age(missed, np.array(ages))
            lost.since_prompt[place, :, layer, heads] = since_prompt(missed, np.array(ages))

    watch_steps(
        loaded.model,
        prompt,
        watch,
        n_voters=n_voters(prompt, selection),
        n_heads=n_heads,
        chunk_tokens=chunk_tokens,
    )
    return lost
