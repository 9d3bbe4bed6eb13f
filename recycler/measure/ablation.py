"""What each unit alone does to the model when it is never refreshed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import FixedStride, Selection
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.model.shape import model_shape
from recycler.prompts import Prompt
from recycler.record.one_prompt import trace_header
from traces import TraceFile
from traces.reporting.differences import differences
from traces.sensitivity import FILE_NAME, Sensitivity

_NEVER = 1e9


def unit_sensitivity(
    loaded: LoadedModel,
    tokens: np.ndarray,
    n_prompt_tokens: int,
    selection: Selection,
    *,
    units_at_once: int = 96,
) -> np.ndarray:
    """Mean KL to full attention when one unit keeps the prompt's set and all others run full, for every unit.

    The ablations are rows of one batch, so the weights are read once per step for `units_at_once` of them.

    Args:
        loaded: The model.
        tokens: int `(n_prompt_tokens + steps,)`.
        n_prompt_tokens: Where decoding begins.
        selection: How sets are chosen.
        units_at_once: Rows of the batch.

    Returns:
        float64 `(layers, kv_heads)`, nats per step.
    """
    units = model_shape(loaded.model, loaded.id).units
    policies = []
    for unit in range(units[0] * units[1]):
        strides = np.ones(units)
        strides.flat[unit] = _NEVER
        policies.append(FixedStride(strides.tolist()))
    kl = np.concatenate(
        [
            run_closed_loop(
                loaded.model, tokens, n_prompt_tokens, policies[begin : begin + units_at_once], selection
            ).kl.mean(1)
            for begin in range(0, len(policies), units_at_once)
        ]
    )
    return kl.reshape(units)


def measure_sensitivity(
    loaded: LoadedModel, folder: Path | str, files: Sequence[TraceFile], *, n_steps: int = 24
) -> Sensitivity:
    """Measure the prompts of some traces and keep the results in their folder.

    Prompts that the folder's file holds already are not measured again; the file is written after each prompt.

    Args:
        loaded: The model of the traces.
        folder: Where the file is kept.
        files: Traces of one model and selection.
        n_steps: Decode steps, at least 1; no more than the traces have.

    Raises:
        ValueError: If the folder's file is damaged or was measured with another model, selection or number of steps.
    """
    first = files[0].header
    texts = {file.name: (file.array("tokens"), int(file.header.prompt["n_prompt_tokens"])) for file in files}
    return _measure(loaded, folder, texts, first.model, first.selection, min(n_steps, first.n_steps))


def measure_prompt_sensitivity(
    loaded: LoadedModel, folder: Path | str, prompts: Sequence[Prompt], selection: Selection, *, n_steps: int = 24
) -> Sensitivity:
    """The same for prompts that were not recorded, with any selection that can be."""
    first = prompts[0]
    header = trace_header(loaded.model, first, selection, max_age=1, model_id=loaded.id)
    texts = {prompt.name: (prompt.tokens, prompt.n_prompt_tokens) for prompt in prompts}
    return _measure(loaded, folder, texts, header.model, header.selection, min(n_steps, first.n_steps))


def _measure(
    loaded: LoadedModel,
    folder: Path | str,
    texts: Mapping[str, tuple[np.ndarray, int]],
    model: Mapping[str, Any],
    selection: Mapping[str, Any],
    n_steps: int,
) -> Sensitivity:
    known = Sensitivity.read(folder) or Sensitivity(model, selection, n_steps, {})
    theirs = {**known.model, **known.selection, "steps": known.n_steps}
    if found := differences(theirs, {**model, **selection, "steps": n_steps}):
        raise ValueError(f"{Path(folder) / FILE_NAME} was measured with {found}: remove it and measure again.")
    for name, (tokens, n_prompt_tokens) in tqdm(
        texts.items(), desc="sensitivity", unit="prompt", disable=len(known.kl) >= len(texts)
    ):
        if name in known.kl:
            continue
        some = tokens[: n_prompt_tokens + n_steps]
        table = unit_sensitivity(loaded, some, n_prompt_tokens, Selection(**selection))
        known = dataclasses.replace(known, kl={**known.kl, name: table})
        Path(folder).mkdir(parents=True, exist_ok=True)
        known.write(folder)
    return known
