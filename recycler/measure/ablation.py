"""What each unit alone does to the model when it is never refreshed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from policies import FixedStride, Selection
from policies.shown import sentence
from recycler.measure.closed_loop import run_closed_loop
from recycler.measure.store import digest_of_tokens
from recycler.model.loading import LoadedModel
from recycler.model.shape import model_shape
from recycler.model.versions import versions
from recycler.prompts import Prompt
from recycler.record.one_prompt import trace_header
from traces import TraceFile
from traces.reporting.differences import differences
from traces.sensitivity import FILE_NAME, Sensitivity

_NEVER = 1e9


def one_never_looks(units: tuple[int, int]) -> list[FixedStride]:
    """For each unit the policy under which it alone keeps the prompt's set and all others run full.

    Args:
        units: `(layers, kv_heads)`.
    """
    policies = []
    for unit in range(units[0] * units[1]):
        strides = np.ones(units)
        strides.flat[unit] = _NEVER
        policies.append(FixedStride(strides.tolist()))
    return policies


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
    policies = one_never_looks(units)
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

    Prompts that the folder's file holds already are not measured again; the file is written after each prompt. What is
    damaged or edited, or was measured on another text or with other weights, selection, steps or versions, is measured
    anew, with a warning.

    Args:
        loaded: The model of the traces.
        folder: Where the file is kept.
        files: Traces of one model and selection.
        n_steps: Decode steps, at least 1; no more than the traces have.

    Raises:
        ValueError: If a text is longer than the model's positions or reaches a sliding window.
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
    folder, nothing = Path(folder), Sensitivity(model, selection, n_steps, {})
    known = Sensitivity.read(folder) or nothing
    theirs = {**known.model, **known.selection, "steps": known.n_steps}
    if found := differences(theirs, {**model, **selection, "steps": n_steps}):
        warnings.warn(sentence(f"{folder / FILE_NAME} was measured with {found}: measuring it anew."), stacklevel=3)
        known = nothing
    measured_on = {name: _identity(loaded, *text) for name, text in texts.items()}
    fresh = {name for name in texts if name in known.kl and known.measured_on.get(name) == measured_on[name]}
    if stale := [name for name in texts if name in known.kl and name not in fresh]:
        other = f"{folder / FILE_NAME} has {stale[0]} of another text, other weights or versions: measuring it anew."
        warnings.warn(sentence(other), stacklevel=3)
    for name, (tokens, n_prompt_tokens) in tqdm(
        texts.items(), desc="sensitivity", unit="prompt", disable=len(fresh) >= len(texts)
    ):
        if name in fresh:
            continue
        some = tokens[: n_prompt_tokens + n_steps]
        table = unit_sensitivity(loaded, some, n_prompt_tokens, Selection(**selection))
        known = dataclasses.replace(
            known,
            kl={**known.kl, name: table},
            measured_on={**known.measured_on, name: measured_on[name]},
        )
        folder.mkdir(parents=True, exist_ok=True)
        known.write(folder)
    return known


def _identity(loaded: LoadedModel, tokens: np.ndarray, n_prompt_tokens: int) -> str:
    """Digest of what a table depends on besides model, selection and steps."""
    parts = [digest_of_tokens(tokens), n_prompt_tokens, loaded.weights_digest, str(loaded.model.dtype), versions()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
