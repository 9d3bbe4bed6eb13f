"""Rows that decode from one prompt, each with a policy of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import Selection, StepPolicy, check_fits
from recycler.decode.counts import full_counts
from recycler.decode.engine import Decoding
from recycler.decode.engines import begin_decoding
from recycler.decode.per_row import PerRow
from recycler.decode.read_prompt import ReadPrompt
from recycler.model.shape import max_positions, model_shape


class RowsStep(NamedTuple):
    """What a step of some rows leaves.

    Attributes:
        logits: `(rows, vocabulary)`.
        full: float64 `(rows, layers, kv_heads)`: what each unit counts in the full share: 1 if it attended to the whole
            cache, 1/2 for a keys-only refresh, else 0.
        tokens_read: float64 of the same shape: what each unit read of the cache, in tokens: keys and values of one
            token count 1, keys alone one half.
        dense_tokens: Tokens in the cache, the fed one included.
    """

    logits: Tensor
    full: np.ndarray
    tokens_read: np.ndarray
    dense_tokens: int


class Rows:
    """Rows after a prompt, or after several in turn; the model is touched only during a step.

    Args:
        decoding: What runs them.
        n_rows: How many.
        n_prompt: Tokens of each prompt.
    """

    def __init__(self, decoding: Decoding, n_rows: int, n_prompt: int) -> None:
        self.decoding, self.n_rows = decoding, n_rows
        self._n_tokens = n_prompt

    def step(self, tokens: Tensor) -> RowsStep:
        """Feed every row its next token, int64 `(rows,)`."""
        with torch.inference_mode():
            logits = self.decoding.step(tokens, torch.tensor([self._n_tokens], device=tokens.device))
        self._n_tokens += 1
        done = self.decoding
        return RowsStep(logits, full_counts(done.full, done.keys_only), done.tokens_read, self._n_tokens)


def decode_rows(
    model: PreTrainedModel,
    prompt: ReadPrompt,
    policies: Sequence[StepPolicy],
    selection: Selection,
    *,
    fast: bool = True,
) -> Rows:
    """Begin to decode, one row per policy.

    Rows share the prompt's cache and the reading of the weights; with several prompts row i decodes from prompt i
    modulo their number. Where no engine covers the model or the selection they take the plain path, which is slower,
    and as right.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        policies: One for each row.
        selection: How sets are chosen, by all of them.
        fast: False keeps to the plain path where an engine would do.

    Raises:
        ValueError: If a policy or the selection is for another model shape.
    """
    shape = model_shape(model)
    for policy in policies:
        check_fits(policy, shape)
    check_fits(selection, shape)
    n_rows = len(policies)
    with torch.inference_mode():
        first = prompt.first_sets(selection.within(max_positions(model)), n_rows)
        layers, passing = prompt.caches(n_rows), prompt.passing_cache(n_rows)
        begun = begin_decoding(model, layers, first, PerRow(tuple(policies)), passing=passing, fast=fast)
    return Rows(begun.decoding, n_rows, prompt.n_tokens)
